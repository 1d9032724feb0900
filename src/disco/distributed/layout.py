"""Where the parts of a tensor lie: from placements on a mesh to boxes of indices. Pure: no tensors, no communication.

A tensor is cut along tensor dimensions by mesh dimensions, or replicated over them. What one rank holds is a few
``Piece``s, usually one: a box of global indices, and where it starts in the rank's local tensor.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Interval = tuple[int, int]
Box = tuple[Interval, ...]
"""[start, stop) of global indices for each tensor dimension."""


@dataclass(frozen=True)
class Cut:
    """How one mesh dimension cuts one tensor dimension, in chunks of ceil(length / parts) as ``torch.chunk`` does.

    With ``strides`` > 1 the dimension is cut in ``strides`` chunks first, and each of them in ``parts``.
    """

    dim: int
    strides: int = 1


@dataclass(frozen=True)
class Piece:
    """A box of global indices held by a rank, and the index at which it starts in the rank's local tensor."""

    box: Box
    start: tuple[int, ...]

    def within(self, box: Box) -> tuple[slice, ...]:
        """Slices of the local tensor that hold ``box``, a part of this piece."""
        return tuple(
            slice(first - low + at, last - low + at)
            for (first, last), (low, _), at in zip(box, self.box, self.start, strict=True)
        )


@dataclass(frozen=True)
class Layout:
    """A tensor of ``shape`` on a mesh.

    Attributes:
        shape: the global shape.
        ranks: global ranks of the mesh, row-major.
        mesh: sizes of the mesh dimensions.
        cuts: for each mesh dimension how it cuts the tensor, None where it replicates it.
        order: the mesh dimensions in the order in which they cut what the ones before have left; () from left to right.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    mesh: tuple[int, ...]
    cuts: tuple[Cut | None, ...]
    order: tuple[int, ...] = ()

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What ``rank`` holds; empty pieces are left out."""
        return _pieces(self, self.ranks.index(rank))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the rank's local tensor."""
        runs = index_runs(self, self.ranks.index(rank))
        return tuple(sum(stop - start for start, stop in intervals) for intervals in runs)

    @functools.cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Groups of ranks that jointly hold the tensor once; their number is that of the replicas."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, rank in enumerate(self.ranks):
            coordinates = _coordinates(self.mesh, index)
            replica = tuple(c for c, cut in zip(coordinates, self.cuts, strict=True) if cut is None)
            groups.setdefault(replica, []).append(rank)
        return tuple(tuple(group) for group in groups.values())

    def mesh_dims_cutting(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Mesh dimensions over which a sum along the tensor dimensions ``dims`` must be taken."""
        return tuple(i for i, cut in enumerate(self.cuts) if cut is not None and cut.dim in dims and self.mesh[i] > 1)


def whole(shape: Sequence[int]) -> Box:
    """The box of all indices."""
    return tuple((0, length) for length in shape)


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes share; None if that is nothing."""
    both = tuple((max(p, q), min(r, s)) for (p, r), (q, s) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def volume(box: Box) -> int:
    """Number of elements."""
    return math.prod(stop - start for start, stop in box)


def shape_of(box: Box) -> tuple[int, ...]:
    """Lengths along each dimension."""
    return tuple(stop - start for start, stop in box)


def chunk(interval: Interval, parts: int, index: int) -> Interval:
    """Chunk ``index`` of an interval cut as ``torch.chunk`` does; the last ones may be empty."""
    start, stop = interval
    size = -(-(stop - start) // parts)
    return min(start + size * index, stop), min(start + size * (index + 1), stop)


def _coordinates(mesh: tuple[int, ...], index: int) -> tuple[int, ...]:
    coordinates = []
    for size in reversed(mesh):
        index, coordinate = divmod(index, size)
        coordinates.append(coordinate)
    return tuple(reversed(coordinates))


def index_runs(layout: Layout, index: int) -> list[list[Interval]]:
    """Of the rank at ``index`` in the mesh: its intervals along each tensor dimension, in the local tensor's order."""
    coordinates = _coordinates(layout.mesh, index)
    runs: list[list[Interval]] = [[(0, length)] if length else [] for length in layout.shape]
    for i in layout.order or range(len(layout.mesh)):
        cut = layout.cuts[i]
        if cut is not None:
            runs[cut.dim] = _cut(runs[cut.dim], cut.strides, layout.mesh[i], coordinates[i])
    return runs


def _cut(runs: list[Interval], strides: int, parts: int, coordinate: int) -> list[Interval]:
    length = sum(stop - start for start, stop in runs)
    wanted = [chunk(chunk((0, length), strides, stride), parts, coordinate) for stride in range(strides)]
    taken: list[Interval] = []
    for start, stop in wanted:  # positions along the runs laid end to end
        at = 0
        for low, high in runs:
            first, last = max(start, at), min(stop, at + high - low)
            if first < last:
                piece = (low + first - at, low + last - at)
                if taken and taken[-1][1] == piece[0]:
                    piece = (taken.pop()[0], piece[1])
                taken.append(piece)
            at += high - low
    return taken


@functools.cache
def _pieces(layout: Layout, index: int) -> tuple[Piece, ...]:
    along = []
    for intervals in index_runs(layout, index):
        starts = itertools.accumulate((stop - start for start, stop in intervals), initial=0)
        along.append(list(zip(intervals, starts, strict=False)))
    return tuple(
        Piece(tuple(interval for interval, _ in combination), tuple(start for _, start in combination))
        for combination in itertools.product(*along)
    )
