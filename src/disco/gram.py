"""The polynomials of ``polar`` with fewer operations: through the Gram matrix, and with symmetric products.

All iterates of p_k(...p_1(X)) are Q X with a symmetric Q, a polynomial in G = X X^T. For X of m x n, m <= n, the plain
form costs 3 products of size m m n or m m m a step; the Gram form X X^T and Q X once, and four of m m m a step. Of a
symmetric product half is computed and mirrored where that is faster.

Forming G squares the condition number. Singular values below ``polar.SMALLEST`` suffer from that in float32; below
float32 the Gram form is not used at all (see ``uses_gram``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from disco import polar
from disco.polar import EPS, Method

F = TypeVar("F", bound=Callable[..., Tensor])
Product = Callable[[Tensor, Tensor], Tensor]
"""(A, B) -> A B of two matrices whose product is symmetric."""

WIDE = 1.5
"""n / m from which the Gram form is the cheaper one."""

SMALL = 64
"""Short side from which it does; below, starting the products costs more than they do."""

PANEL = 128
"""Fewest rows of a panel of a symmetric product; smaller ones lose more speed than they save work."""


BAND = 32
"""Rows of a band of a packed symmetric matrix: few copies, and not many more elements than the triangle has."""


def pays(m: int, n: int) -> bool:
    """Whether the Gram form of m x n matrices is the cheaper one."""
    return min(m, n) >= SMALL and max(m, n) >= WIDE * min(m, n)


def uses_gram(m: int, n: int, dtype: torch.dtype) -> bool:
    """Whether ``orthogonalize`` takes the Gram form of m x n matrices."""
    return dtype in (torch.float32, torch.float64) and pays(m, n)


def flops(m: int, n: int, steps: int, *, gram: bool, halved: bool = False) -> int:
    """Floating-point operations of one m x n matrix; ``halved`` where symmetric products do half of theirs."""
    m, n = min(m, n), max(m, n)
    symmetric = 1 if halved else 2
    if gram:
        products = 4 * steps - 3
        return m * m * n * (symmetric + 2) + products * symmetric * m**3
    return steps * (m * m * n * (symmetric + 2) + symmetric * m**3)


def orthogonalize(
    matrix: Tensor, method: Method = "polar_express", steps: int = 5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """What ``polar.orthogonalize`` computes, to rounding, in the cheapest form; same arguments."""
    polar.check(method, steps)
    x = matrix.to(dtype or polar.working_dtype(matrix))
    m, n = matrix.shape[-2:]
    if method == "svd" or matrix.numel() == 0 or not (uses_gram(m, n, x.dtype) or halves(x, min(m, n))):
        return polar.orthogonalize(matrix, method, steps, dtype=dtype)
    if x.ndim > 2:  # the products are large: one by one is as fast as a batch, and needs less memory
        return torch.stack([orthogonalize(one, method, steps, dtype=dtype) for one in matrix])
    x = x.mT if m > n else x
    gram_form = uses_gram(m, n, x.dtype)
    x = factor(symmetric(x, x.mT), method, steps) @ x if gram_form else _iterate(x, method, steps)
    return (x.mT if m > n else x).to(matrix.dtype)


@functools.cache
def compiled(function: F) -> F:
    """``orthogonalize`` or ``factor`` by ``torch.compile``, one graph for each shape."""
    return cast(F, torch.compile(function, dynamic=False))


def factor(gram: Tensor, method: Method, steps: int, product: Product | None = None) -> Tensor:
    """The symmetric Q with Q X = ``polar.orthogonalize(X)`` of a wide X with X X^T = ``gram``.

    Args:
        gram: [m, m], overwritten.
        method, steps: not ``svd``.
        product: how symmetric products are computed.
    """
    product = product or symmetric
    triples = polar.working_coefficients(method, steps, gram.dtype)
    scale = gram.diagonal().sum().clamp_min(EPS**2)  # squared norm of X
    gram /= scale
    square = product(gram, gram)
    if method == "polar_sharp":
        squared_bound = torch.linalg.matrix_norm(square).sqrt().clamp_min(EPS**2)
        gram /= squared_bound
        square /= squared_bound**2
        scale = scale * squared_bound
    q: Tensor | None = None
    for index, (a, b, c) in enumerate(triples):
        if index:
            square = product(gram, gram)
        z = _quadratic(gram, square, a, b, c)
        q = z if q is None else product(q, z)
        if index + 1 < len(triples):
            gram = product(product(gram, z), z)
    assert q is not None
    return q.div_(scale.sqrt())


def _iterate(x: Tensor, method: Method, steps: int) -> Tensor:
    """The plain form with symmetric products."""
    x = x / torch.linalg.matrix_norm(x).clamp_min(EPS)
    for index, (a, b, c) in enumerate(polar.working_coefficients(method, steps, x.dtype)):
        gram = symmetric(x, x.mT)
        square = symmetric(gram, gram)
        if index == 0 and method == "polar_sharp":
            bound = torch.linalg.matrix_norm(square).pow(0.25).clamp_min(EPS)
            x, gram, square = x / bound, gram.div_(bound**2), square.div_(bound**4)
        x = _quadratic(gram, square, a, b, c) @ x
    return x


def _quadratic(gram: Tensor, square: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b G + c G^2, in the memory of G^2."""
    z = square.mul_(c).add_(gram, alpha=b)
    z.diagonal().add_(a)
    return z


def halves(x: Tensor, m: int) -> bool:
    """Whether ``symmetric`` computes only half of an m x m product; a GPU runs the whole as one kernel faster."""
    return x.device.type == "cpu" and m >= 4 * PANEL


def panel(m: int) -> int:
    """Rows of the panels by which ``symmetric`` computes one half."""
    return max(PANEL, -(-m // 8))


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    """The symmetric product a b of [m, k] and [k, m]; on a CPU one half of a large one, which is mirrored."""
    m = a.shape[0]
    if not halves(a, m):
        return a @ b
    out = a.new_empty(m, m)
    rows = panel(m)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        torch.mm(a[start:stop], b[:, :stop], out=out[start:stop, :stop])
        out[:start, start:stop] = out[start:stop, :start].mT
    return out


def packed(side: int) -> int:
    """Elements of a packed symmetric matrix."""
    return sum((min(start + BAND, side) - start) * min(start + BAND, side) for start in range(0, side, BAND))


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix in bands of rows, each up to its last diagonal entry; flat."""
    side = matrix.shape[0]
    return torch.cat([matrix[i : i + BAND, : min(i + BAND, side)].reshape(-1) for i in range(0, side, BAND)])


def unpack(flat: Tensor, side: int) -> Tensor:
    """The inverse of ``pack``."""
    matrix = flat.new_empty(side, side)
    at = 0
    for start in range(0, side, BAND):
        stop = min(start + BAND, side)
        size = (stop - start) * stop
        matrix[start:stop, :stop] = flat[at : at + size].view(stop - start, stop)
        matrix[:start, start:stop] = matrix[start:stop, :start].mT
        at += size
    return matrix
