"""Norms of sharded matrices without gathering them.

Every rank adds what its shards contribute to a few numbers, and small all-reduces do the rest: sums of squares along
what is cut, maxima along the rest; ``spectral`` has the largest singular values. What several parameters need at the
same time shares one all-reduce (``lockstep``). Replicas compute the same, and are never added up.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed import spectral
from disco.distributed.layout import Layout
from disco.distributed.lockstep import Job, Reduce, Tell, run
from disco.distributed.reduce import SUM
from disco.distributed.shards import Shards, geometry, largest, max_abs, sums_of_squares, view
from disco.norms import NORMS, OperatorNorm, norm
from disco.polar import EPS
from disco.spectrum import MEASURES

SPECTRAL = ("rms_to_rms", "conv", "stable_rank")
"""What needs the largest singular value."""


@dataclass(frozen=True)
class Part:
    """One parameter, its momentum or its update, as this rank holds it.

    Attributes:
        local: this rank's local tensor; may be empty.
        layout: of the global tensor.
        rank: this global rank.
        groups: of each mesh dimension; None where its size is 1.
        operator: the norm to measure.
        split: sizes of fused parts along the output dimension; () if there is one.
        key: identifies the matrix between calls; None starts anew each time.
    """

    local: Tensor
    layout: Layout
    rank: int
    groups: tuple[ProcessGroup | None, ...]
    operator: OperatorNorm
    split: tuple[int, ...] = ()
    key: Hashable = None


@dataclass
class _Batch:
    """Matrices of one kind, shape and layout."""

    kind: str
    shards: Shards
    indices: list[int] = field(default_factory=list)
    """Of the parts that they belong to."""
    keys: list[Hashable] = field(default_factory=list)
    starts: list[Tensor | None] = field(default_factory=list)

    def take(self, some: slice) -> _Batch:
        shards = Shards(self.shards.geometry, self.shards.groups, self.shards.local[some])
        return _Batch(self.kind, shards, self.indices[some], self.keys[some], self.starts[some])


class Values:
    """Measures norms, and remembers the vectors of its iterations between calls.

    Args:
        limit: elements of working memory for matrices that are measured at the same time; one may exceed it.
    """

    def __init__(self, limit: int = 2**24) -> None:
        self._limit = limit
        self._vectors: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def measure(self, parts: Sequence[Part], which: str | None = None, *, exact: bool = False) -> list[float]:
        """The largest norm over the batch and the fused parts of each part; NaN if entries are not finite.

        Spectral norms are at most 1e-3 too small and never too large (``spectral``); of short sides right to 1e-5.

        Args:
            parts: the same on all ranks that share them, in the same order; all of these ranks must call this.
            which: a norm or one of ``MEASURES``; None takes each operator's own norm.
            exact: spectral norms to 1e-5, which costs more.

        Raises:
            ValueError: ``which`` is unknown or does not fit the dimensions of a part.
        """
        result = [0.0] * len(parts)
        for wave in self._waves(self._batches(parts, which), exact):
            for batch, values in zip(wave, run([self._job(batch, exact) for batch in wave]), strict=True):
                for index, value in zip(batch.indices, values, strict=True):
                    known = result[index]
                    result[index] = value if math.isnan(value) or value > known else known
        return result

    def _batches(self, parts: Sequence[Part], which: str | None) -> list[_Batch]:
        """Matrices that are computed together. Ranks that share them decide the same."""
        batches: dict[Hashable, _Batch] = {}
        for index, part in enumerate(parts):
            operator = _operator(part, which)
            kind = which if which in MEASURES else operator.name
            for position in range(max(1, len(part.split))):
                where = (part.layout, operator, part.split, position)
                key = None if part.key is None else (part.key, *where)
                start = self._vectors.get(key)
                shape = geometry(part.layout, part.rank, *where[1:])
                same = (*where, part.local.dtype, part.local.device, tuple(map(id, part.groups)), start is None)
                batch = batches.setdefault(same, _Batch(kind, Shards(shape, part.groups, [])))
                batch.shards.local.append(view(part.local, operator, shape))
                batch.indices.append(index)
                batch.keys.append(key)
                batch.starts.append(start)
        return list(batches.values())

    def _waves(self, batches: list[_Batch], exact: bool) -> list[list[_Batch]]:
        """What fits into the working memory together. Ranks that share a group decide the same about it."""
        waves: list[list[_Batch]] = []
        filled: dict[Hashable, tuple[int, int]] = {}
        for batch in batches:
            each = _working_memory(batch, exact)
            size = max(1, self._limit // each)
            for first in range(0, len(batch.indices), size):
                chunk = batch.take(slice(first, first + size))
                group, needs = tuple(map(id, chunk.shards.groups)), each * len(chunk.indices)
                wave, used = filled.get(group, (0, 0))
                if used and used + needs > self._limit:
                    wave, used = wave + 1, 0
                filled[group] = wave, used + needs
                waves.extend([] for _ in range(wave + 1 - len(waves)))
                waves[wave].append(chunk)
        return waves

    def _job(self, batch: _Batch, exact: bool) -> Job:
        kind, shards = batch.kind, batch.shards
        _, out, into = shards.geometry.shape
        if 0 in shards.geometry.shape:
            return _nothing(shards)
        if kind == "stable_rank":
            return self._stable_rank(batch, exact)
        if kind in SPECTRAL:
            return self._spectral(batch, exact, lambda sigma: largest(sigma) * shards.geometry.size)
        factors = {
            "one_to_inf": into, "one_to_rms": 1 / math.sqrt(out),
            "rms_to_inf": math.sqrt(into), "rms": 1 / math.sqrt(into),
        }  # fmt: skip
        if kind in ("one_to_inf", "max_abs"):
            return _entries(shards, factors.get(kind, 1.0))
        dims = {"one_to_rms": (-2,), "frobenius": (-2, -1)}
        return _lengths(shards, dims.get(kind, (-1,)), factors.get(kind, 1.0))

    def _spectral(self, batch: _Batch, exact: bool, finish: spectral.Finish) -> Job:
        def found(vectors: list[Tensor]) -> None:
            known = zip(batch.keys, vectors, strict=True)
            self._vectors |= {key: block for key, block in known if key is not None}

        return spectral.job(batch.shards, batch.starts, found, exact, finish)

    def _stable_rank(self, batch: _Batch, exact: bool) -> Job:
        shards = batch.shards
        squares = sums_of_squares(shards.local, (-2, -1))
        yield Reduce(SUM, squares, [*shards.across_out, *shards.across_in])

        def finish(sigma: Tensor) -> Tensor:
            return largest((squares.sqrt() / sigma.clamp_min(EPS)).square())

        return (yield from self._spectral(batch, exact, finish))


def _operator(part: Part, which: str | None) -> OperatorNorm:
    own = part.operator
    if which is None or which in MEASURES or which == own.name:
        return own
    if which not in NORMS:
        raise ValueError(f"which must be None or one of {', '.join((*NORMS, *MEASURES))}, got {which!r}")
    other = norm(which, layout=own.layout, batch_dims=own.batch_dims)
    other.check(torch.empty(part.layout.shape, device="meta"))
    return other


def _working_memory(batch: _Batch, exact: bool) -> int:
    """Elements for each matrix."""
    if batch.kind in SPECTRAL:
        return max(1, spectral.working_memory(batch.shards, None not in batch.starts, exact))
    return max(1, batch.shards.geometry.shape[0] * max(batch.shards.geometry.shape[1:]))


def _nothing(shards: Shards) -> Job:
    """Of matrices without entries."""
    return [0.0] * len(shards.local)
    yield


def _entries(shards: Shards, factor: float) -> Job:
    """The largest entry."""
    return (yield Tell(largest(max_abs(shards.local)) * factor, shards.everyone))


def _lengths(shards: Shards, dims: tuple[int, ...], factor: float) -> Job:
    """The largest root of a sum of squares over ``dims``."""
    squares = sums_of_squares(shards.local, dims)
    yield Reduce(SUM, squares, [*(shards.across_out if -2 in dims else ()), *(shards.across_in if -1 in dims else ())])
    return (yield Tell(largest(squares.sqrt()) * factor, shards.everyone))
