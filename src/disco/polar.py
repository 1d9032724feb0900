"""Orthogonalisation: the polar factor U V^T of G = U S V^T, exactly by SVD or by an odd polynomial in matrix products.

A composition of odd quintics p(x) = a x + b x^3 + c x^5 acts on singular values and leaves singular vectors alone, so
p(X) = (a I + b X X^T + c (X X^T)^2) X drives a normalised X towards U V^T with matrix products only.

* ``newton_schulz``: Jordan et al. 2024 (Muon), one triple repeated. Singular values end near 1, not at 1.
* ``polar_express``: Amsel et al., arXiv:2505.16932, a different minimax quintic in each step.
* ``polar_sharp``: the same construction after division by a sharper bound of the largest singular value than the
  Frobenius norm, (sum s^8)^(1/8) = ||(X X^T)^2||_F^(1/4), which the first step computes anyway. Singular values then
  start larger: 4 steps are more accurate than 5 of ``polar_express``.
* ``svd``: exact; singular values that are zero to rounding stay zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Method = Literal["polar_express", "polar_sharp", "newton_schulz", "svd"]
Coefficients = tuple[tuple[float, float, float], ...]

EPS = 1e-20
"""Floor of every norm that is divided by (arXiv:2510.03871, appendix)."""

CACHED = 2**18
"""Elements that a CPU iterates on at once: a batch of many matrices would leave its cache in every product."""

MUON = (3.4445, -4.7750, 2.0315)
"""The triple of Jordan et al. 2024, chosen for a steep slope at 0."""

SMALLEST = {"polar_express": 1e-3, "polar_sharp": 5e-3, "newton_schulz": 1e-3}
"""Singular value, relative to the norm that X is divided by, from which a method aims at 1 (Amsel et al.'s l). Of
``polar_sharp`` the one with which 4 steps beat 5 of ``polar_express`` on each spectrum of docs/norms.md."""

CUSHION = 0.02407327424182761
"""Interval ends further apart than this ratio get the quintic of this ratio, for stability (Amsel et al., sec. 4.4)."""

SAFETY = {torch.float64: 1.0, torch.float32: 1 + 2**-19}
"""Shrinkage before each minimax quintic, by precision; ``HALF_SAFETY`` in any other. Rounding can push a
singular value past the end of the interval, where the next quintic grows fast (Amsel et al., sec. 4.4): without it the
largest singular value of a rank-one matrix comes out as 1.129 in float32, above the stated maximum."""
HALF_SAFETY = 1.01


@dataclass(frozen=True)
class Accuracy:
    """Image of the singular values in [``SMALLEST[method]``, 1], measured on a grid in float64.

    Attributes:
        maximum: the largest singular value that can come out, for any input.
        error: the largest distance from 1.
    """

    maximum: float
    error: float


def check(method: str, steps: int) -> None:
    """Raises ValueError for an unknown method or fewer than one step."""
    if method not in get_args(Method):
        raise ValueError(f"orthogonalize must be one of {', '.join(get_args(Method))}, got {method!r}")
    if steps < 1:
        raise ValueError(f"orthogonalisation needs at least 1 step, got steps={steps}")


@functools.cache
def coefficients(method: Method, steps: int = 5) -> Coefficients:
    """The triples (a, b, c), one for each step; none for ``svd``."""
    check(method, steps)
    if method == "svd":
        return ()
    return (MUON,) * steps if method == "newton_schulz" else _polar_express(steps, SMALLEST[method])


@torch.compiler.assume_constant_result
def working_coefficients(method: Method, steps: int, dtype: torch.dtype) -> Coefficients:
    """``coefficients`` with the shrinkage (``SAFETY``) that the precision needs."""
    triples = coefficients(method, steps)
    return triples if method == "newton_schulz" else shrunk(triples, SAFETY.get(dtype, HALF_SAFETY))


def shrunk(triples: Coefficients, factor: float) -> Coefficients:
    """The same quintics applied to s / factor."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in triples)


@functools.cache
def accuracy(method: Method, steps: int = 5) -> Accuracy:
    """What ``orthogonalize`` in exact arithmetic does to singular values; 1 and 0 for ``svd``."""
    if method == "svd":
        return Accuracy(maximum=1.0, error=0.0)
    smallest = SMALLEST[method]
    s = np.concatenate([np.linspace(0.0, smallest, 10_001), np.geomspace(smallest, 1.0, 200_001)])
    image = polynomial(s, coefficients(method, steps))
    return Accuracy(maximum=float(image.max()), error=float(np.abs(image - 1)[s >= smallest].max()))


def polynomial(s: np.ndarray, triples: Coefficients) -> np.ndarray:
    """The composed odd quintics at singular values ``s`` (float64)."""
    for a, b, c in triples:
        s = s * (a + s**2 * (b + c * s**2))
    return s


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Default precision: float64 stays, a CPU computes in float32, any other device in bfloat16."""
    if tensor.dtype == torch.float64:
        return torch.float64
    return torch.float32 if tensor.device.type == "cpu" else torch.bfloat16


def orthogonalize(
    matrix: Tensor, method: Method = "polar_express", steps: int = 5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Polar factor of each matrix in ``matrix``.

    Args:
        matrix: shape [..., m, n]; leading dimensions are a batch.
        method, steps: see the module; ``accuracy(method, steps)`` tells how close the result is.
        dtype: precision of the computation; None means ``working_dtype(matrix)``. ``svd`` takes at least float32.

    Returns:
        Same shape and dtype as ``matrix``. Zero matrices give zero, matrices with infinite or NaN entries NaN.

    Raises:
        ValueError: unknown method, steps below 1, or fewer than two dimensions.
    """
    check(method, steps)
    if matrix.ndim < 2:
        raise ValueError(f"only matrices have a polar factor, got shape {tuple(matrix.shape)}")
    if matrix.numel() == 0:
        return matrix.clone()
    if method == "svd":
        return _svd(matrix, dtype)
    x = matrix.to(dtype or working_dtype(matrix))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    triples = working_coefficients(method, steps, x.dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(EPS)
    if method == "polar_sharp":
        x = x / schatten8(x).clamp_min(EPS)
    x = iterate(x, triples)
    return (x.mT if tall else x).to(matrix.dtype)


def schatten8(x: Tensor) -> Tensor:
    """(sum s^8)^(1/8) of the singular values s of each matrix in [..., m, n]; a bound of the largest. [..., 1, 1]."""
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    return torch.linalg.matrix_norm(gram @ gram, keepdim=True) ** 0.25


def iterate(x: Tensor, triples: Coefficients) -> Tensor:
    """Applies the quintics to ``x`` of shape [..., m, n], m <= n, whose singular values lie in [0, 1]."""
    batch, x = x.shape[:-2], x.flatten(0, -3) if x.ndim > 3 else x
    if x.ndim == 3 and len(x) > 1 and x.device.type == "cpu" and x.numel() > CACHED:
        parts = x.split(max(1, CACHED // x[0].numel()))
        return torch.cat([iterate(part, triples) for part in parts]).unflatten(0, batch)
    fused = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        gram = x @ x.mT
        inner = fused(gram, gram, gram, beta=b, alpha=c)
        x = fused(x, inner, x, beta=a)
    return x.unflatten(0, batch) if len(batch) > 1 else x


def _svd(matrix: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = matrix.to(torch.promote_types(dtype or matrix.dtype, torch.float32))  # LAPACK knows no half precision
    finite = x.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, x, 0.0), full_matrices=False)
    rounding = torch.finfo(x.dtype).eps * max(x.shape[-2:])
    kept = s > rounding * s[..., :1]
    return torch.where(finite, (u * kept.unsqueeze(-2)) @ vh, torch.nan).to(matrix.dtype)


def _polar_express(steps: int, lower: float) -> Coefficients:
    """Greedy composition of minimax quintics on the interval [lower, 2 - lower] (Amsel et al., theorem 3.1)."""
    upper, triples = 1.0, []
    for _ in range(steps):
        a, b, c = _minimax_quintic(max(lower, CUSHION * upper), upper)
        low, high = polynomial(np.array([lower, upper]), ((a, b, c),))
        centre = 2 / (low + high)  # the cushion lifts the left end only; centre the image on 1 again
        triples.append((float(a * centre), float(b * centre), float(c * centre)))
        lower = float(low * centre)
        upper = 2 - lower
    return tuple(triples)


def _minimax_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """Odd quintic closest to 1 on [lower, upper] in the maximum norm, by Remez exchange."""
    if lower / upper > 1 - 5e-6:  # the limit of the exchange, where its equations become singular: Pade
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error = np.inf
    while True:
        x = np.array([lower, q, r, upper])
        a, b, c, new_error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        if abs(new_error - error) < 1e-15:
            return float(a), float(b), float(c)
        error = new_error
        # the interior extrema of the error are the roots of p'(x) = a + 3 b x^2 + 5 c x^4
        half, root = -3 * b / (10 * c), np.sqrt(9 * b**2 - 20 * a * c) / (10 * c)
        q, r = np.sqrt(half - root), np.sqrt(half + root)
