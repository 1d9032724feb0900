"""Largest singular values of sharded matrices, which are neither moved nor gathered.

Block Krylov iteration (Golub & Underwood 1977; Musco & Musco, arXiv:1504.05477): with A = W^T W, or W W^T, and an
orthonormal basis of the span of X, A X, A^2 X, ..., the eigenpairs of A within the basis approximate its largest.
Rounds start from the best vectors of the last round, the first from those of the last call, and go on until an estimate
of the error is small: with the residual r of the best vector, half of min(r, r^2 / gap) relative to its eigenvalue,
where the gap is that to the last of the block. No value exceeds the true one by more than rounding.

The residual cannot see a direction that the basis misses. One vector of each start is random, which finds a direction
that grows from call to call in time; one that appears between two calls, orthogonal to all known, is found at once if
it is 1.5 times as large as the others, otherwise by the third call.

The vectors live on the side that is not cut, whole on every rank, and all ranks compute the same from the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed.layout import Interval
from disco.distributed.lockstep import Job, Reduce, Tell
from disco.distributed.reduce import MAX, SUM
from disco.distributed.shards import Shards, largest, max_abs, precise
from disco.polar import EPS

GRAM = 64
"""Sides up to this length that are not cut take the eigenvalues of their Gram matrix."""

BLOCK = 8
"""Vectors of a block."""

COLD, WARM, ROUNDS = 8, 3, 12
"""Blocks of a basis; of that of a first round that starts from known vectors; rounds at most."""

TOLERANCE, EXACT = 3e-4, 2e-6
"""Estimated error of the last round, and that where ``exact`` is asked for. Where most singular values are about equal
the true error was seen at up to twice the estimate, elsewhere below it."""

NOISE = 1e-4
"""Random part of each block. Where a matrix has no more directions to offer it keeps the basis orthonormal."""

Finish = Callable[[Tensor], Tensor]
"""From largest singular values [matrices, batch] to values [matrices]."""


def job(
    shards: Shards, starts: list[Tensor | None], found: Callable[[list[Tensor]], None], exact: bool, finish: Finish
) -> Job:
    """Measures matrices that all have known vectors to start from, or none; gives new ones to ``found``."""
    if takes_gram(shards, exact):
        return _by_gram(shards, finish)
    return _by_iteration(shards, starts, found, EXACT if exact else TOLERANCE, finish)


def takes_gram(shards: Shards, exact: bool) -> bool:
    """Whether the eigenvalues of a Gram matrix are taken: of a short side, or if ``exact`` of the shorter; never of one
    that is cut."""
    side, other = _sides(shards)
    return not _over_side(shards) and (side <= GRAM or (exact and side <= other))


def working_memory(shards: Shards, warm: bool, exact: bool) -> int:
    """Elements for each matrix."""
    side, _ = _sides(shards)
    width = side if takes_gram(shards, exact) else 2 * BLOCK * (WARM if warm and not exact else COLD)
    return shards.geometry.shape[0] * side * width


def _sides(shards: Shards) -> tuple[int, int]:
    """Lengths of the vectors' side and of the other."""
    _, out, into = shards.geometry.shape
    return (into, out) if shards.geometry.on_inputs else (out, into)


def _over_side(shards: Shards) -> list[ProcessGroup]:
    return shards.across_in if shards.geometry.on_inputs else shards.across_out


def _over_other(shards: Shards) -> list[ProcessGroup]:
    return shards.across_out if shards.geometry.on_inputs else shards.across_in


def _matrices(shards: Shards) -> list[Tensor]:
    """[batch, other side, vectors' side]."""
    return shards.local if shards.geometry.on_inputs else [x.mT for x in shards.local]


def _by_gram(shards: Shards, finish: Finish) -> Job:
    finite, scale = yield from _scale(max_abs(shards.local), _over_other(shards))
    grams = torch.stack([_gram(x, s) for x, s in zip(_matrices(shards), scale, strict=True)])
    yield Reduce(SUM, grams, _over_other(shards))
    top = torch.linalg.eigvalsh(torch.where(finite[..., None, None], grams, 0.0))[..., -1].clamp_min(0).sqrt()
    return (yield Tell(finish(torch.where(finite, top * scale, torch.nan)), shards.everyone))


def _gram(x: Tensor, scale: Tensor) -> Tensor:
    x = precise(x) / scale[:, None, None]
    return x.mT @ x


def _scale(bound: Tensor, groups: list[ProcessGroup]) -> Generator[Reduce, Any, tuple[Tensor, Tensor]]:
    """Whether matrices are finite, and what to divide their entries by, from local bounds of them."""
    bound = bound.nan_to_num(nan=math.inf, posinf=math.inf)
    yield Reduce(MAX, bound, groups)
    finite = bound.isfinite()
    return finite, torch.where(finite & (bound > 0), bound, 1.0)


def _by_iteration(
    shards: Shards,
    starts: list[Tensor | None],
    found: Callable[[list[Tensor]], None],
    tolerance: float,
    finish: Finish,
) -> Job:
    count, batch = len(shards.local), len(shards.local[0])
    side, _ = _sides(shards)
    like = precise(shards.local[0][:0, :0, :0])
    width = side if side < 2 * BLOCK else BLOCK
    blocks = _random(0, width, side, like).repeat(count, batch, 1, 1)
    for block, start in zip(blocks, starts, strict=True):
        if start is not None:
            block[:, :-1] = start[:, :-1]  # one vector stays random, to find directions that are new
    sigma, error = like.new_zeros(count, batch), like.new_zeros(count)
    depth = COLD if None in starts else WARM
    left = list(range(count))
    told: list[float] = []
    for _ in range(ROUNDS):
        at = torch.tensor(left, device=like.device)
        matrices = [_matrices(shards)[i] for i in left]
        blocks[at], sigma[at], error[at] = yield from _round(shards, matrices, blocks[at], min(depth, side // width))
        told = yield Tell(torch.cat([finish(sigma), error]), shards.everyone)
        left = [i for i in left if told[count + i] > tolerance]
        if not left:
            break
        depth = COLD
    found(list(blocks))
    return told[:count]


def _round(
    shards: Shards, matrices: list[Tensor], start: Tensor, depth: int
) -> Generator[Reduce, Any, tuple[Tensor, Tensor, Tensor]]:
    """Best vectors [matrices, batch, width, side], largest singular values [matrices, batch], errors [matrices]."""
    width, side = start.shape[-2:]
    cut = _over_side(shards)
    held = _indices(shards.geometry.runs, start.device) if cut else None
    newest = basis = _orthonormal(start)
    images = start[..., :0, :]
    for step in range(depth):
        x = newest if held is None else newest[..., held]
        y = torch.stack([v @ w.to(v.dtype).mT for v, w in zip(x, matrices, strict=True)])
        yield Reduce(SUM, y, cut)
        if step == 0:
            bound = largest(y.abs().flatten(0, 1)).reshape(y.shape[:2])
            finite, scale = yield from _scale(bound, _over_other(shards))
            factor = scale[..., None, None].reciprocal()
        y = y * factor
        z = torch.stack([v @ w.to(v.dtype) for v, w in zip(y, matrices, strict=True)]) * factor
        if held is not None:
            z = z.new_zeros(*z.shape[:-1], side).index_copy_(-1, held, z)
        yield Reduce(SUM, z, [*_over_other(shards), *cut])
        z = torch.where(finite[..., None, None], z, 0.0)
        images = torch.cat([images, z], dim=-2)
        if step + 1 < depth:
            newest = _next_block(z, basis, step + 1)
            basis = torch.cat([basis, newest], dim=-2)
    small = (basis @ images.mT).double()
    s = torch.linalg.eigh((small + small.mT) / 2)[1][..., -width:].flip(-1).mT.to(basis.dtype)
    best, image = s @ basis, s @ images
    squares = best.square().sum(-1)
    theta = (best * image).sum(-1) / squares  # Rayleigh quotients: none is above the largest eigenvalue
    residual = torch.linalg.vector_norm(image - theta[..., None] * best, dim=-1) / squares.sqrt()
    top, r = theta[..., 0].clamp_min(0), residual[..., 0]
    gap = (top - theta[..., -1]).clamp_min(r).clamp_min(EPS)
    error = torch.where(finite, r * (r / gap) / (2 * top.clamp_min(EPS)), 0.0)
    return best, torch.where(finite, top.sqrt() * scale, torch.nan), largest(error)


def _next_block(z: Tensor, basis: Tensor, seed: int) -> Tensor:
    """The block by which z extends an orthonormal basis."""
    size = torch.linalg.matrix_norm(z, keepdim=True).clamp_min(1.0) / math.sqrt(z.shape[-2] * z.shape[-1])
    block = z + NOISE * size * _random(seed, z.shape[-2], z.shape[-1], z)
    for _ in range(2):
        block = _orthonormal(block - (block @ basis.mT) @ basis)
    return block


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT)[0].mT


def _random(seed: int, width: int, side: int, like: Tensor) -> Tensor:
    """The same on all ranks and in every call."""
    return torch.randn(width, side, generator=torch.Generator().manual_seed(seed)).to(like)


def _indices(runs: tuple[tuple[tuple[Interval, ...], int], ...], device: torch.device) -> Tensor:
    """Positions of the held indices among the flattened indices of a side."""
    result = torch.zeros(1, dtype=torch.long)
    for intervals, length in runs:
        held = torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in intervals)])
        result = (result[:, None] * length + held).flatten()
    return result.to(device)
