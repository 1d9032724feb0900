"""Shards of matrices of one shape and layout, as [batch, out, in], and the groups of ranks that hold the rest."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed.layout import Interval, Layout, index_runs
from disco.norms import OperatorNorm, Spectral, sum_of_squares
from disco.split import out_dim


@dataclass(frozen=True)
class Geometry:
    """How a batch of matrices, one of the fused parts of a parameter, lies.

    Attributes:
        shape: (batch, out, in) of the whole, kernels flattened into the inputs; the batch is the largest of any rank's.
        rows: the outputs of the local tensor that belong to the part.
        size: factor between the largest singular value and the norm.
        across_out, across_in: mesh dimensions that cut outputs and inputs.
        on_inputs: the side on which an iteration keeps its vectors, whole on all ranks: the one that is not cut, or the
            shorter.
        runs: for each dimension of that side the indices that this rank holds, and the dimension's length.
    """

    shape: tuple[int, int, int]
    rows: Interval
    size: float
    across_out: tuple[int, ...]
    across_in: tuple[int, ...]
    on_inputs: bool
    runs: tuple[tuple[tuple[Interval, ...], int], ...]


@functools.cache
def geometry(layout: Layout, rank: int, operator: OperatorNorm, split: tuple[int, ...], position: int) -> Geometry:
    """The geometry of the fused part ``position``; a vector is one row."""
    first, dims = operator.batch_dims, len(layout.shape)
    out = None if operator.name == "rms" else out_dim(operator)
    ins = [d for d in range(first, dims) if d != out]
    runs, lengths, rows = index_runs(layout, layout.ranks.index(rank)), list(layout.shape), (0, 1)
    if out is not None:
        start = sum(split[:position])
        lengths[out] = split[position] if split else lengths[out]
        stop = start + lengths[out]
        rows = _below(runs[out], start), _below(runs[out], stop)
        runs[out] = [(max(a, start) - start, min(b, stop) - start) for a, b in runs[out] if a < stop and b > start]
    batch = math.prod(layout.shape[:first])
    for i in layout.mesh_dims_cutting(range(first)):
        batch = -(-batch // layout.mesh[i])
    outs, into = 1 if out is None else lengths[out], math.prod(lengths[d] for d in ins)
    across_out = layout.mesh_dims_cutting([] if out is None else [out])
    across_in = layout.mesh_dims_cutting(ins)
    on_inputs = into <= outs if bool(across_out) == bool(across_in) else bool(across_out)
    side = ins if on_inputs or out is None else [out]
    return Geometry(
        (batch, outs, into),
        rows,
        operator.size(lengths) if isinstance(operator, Spectral) and 0 not in lengths else 1.0,
        across_out,
        across_in,
        on_inputs,
        tuple((tuple(runs[d]), lengths[d]) for d in side),
    )


def _below(runs: Sequence[Interval], bound: int) -> int:
    """How many of the held indices lie below a bound; they ascend."""
    return sum(max(0, min(stop, bound) - start) for start, stop in runs)


@dataclass
class Shards:
    """What this rank holds of matrices of one geometry.

    Attributes:
        local: [batch, out, in] of each matrix.
    """

    geometry: Geometry
    groups: tuple[ProcessGroup | None, ...]
    local: list[Tensor]

    @property
    def everyone(self) -> list[ProcessGroup]:
        """All groups, also those of replicas and of other matrices of the batch."""
        return [group for group in self.groups if group is not None]

    @property
    def across_out(self) -> list[ProcessGroup]:
        """Groups over which a sum over the outputs must be taken."""
        return self._over(self.geometry.across_out)

    @property
    def across_in(self) -> list[ProcessGroup]:
        """Groups over which a sum over the inputs must be taken."""
        return self._over(self.geometry.across_in)

    def _over(self, mesh_dims: Sequence[int]) -> list[ProcessGroup]:
        return [group for i in mesh_dims if (group := self.groups[i]) is not None]


def view(tensor: Tensor, operator: OperatorNorm, geometry: Geometry) -> Tensor:
    """A local tensor as [batch, out, in], of which only the part that ``geometry`` is of."""
    first = operator.batch_dims
    x, batch = tensor.detach(), math.prod(tensor.shape[:first])
    if operator.name == "rms":
        return x.reshape(batch, 1, math.prod(x.shape[first:]))
    if operator.layout == "in_out":
        x = x.transpose(first, first + 1)
    x = x.reshape(batch, x.shape[first], math.prod(x.shape[first + 1 :]))
    return x[:, slice(*geometry.rows)]


def precise(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def max_abs(local: Sequence[Tensor]) -> Tensor:
    """Largest entries, [matrices, batch], 0 of what is empty."""
    return torch.stack(
        [
            precise(torch.maximum(x.amax((-2, -1)), -x.amin((-2, -1))) if x.numel() else x.new_zeros(len(x)))
            for x in local
        ]
    )


def sums_of_squares(local: Sequence[Tensor], dims: tuple[int, ...]) -> Tensor:
    """Of each matrix over ``dims``, [matrices, batch, ...]."""
    return torch.stack([sum_of_squares(x, dims).squeeze(dims) for x in local])


def largest(x: Tensor) -> Tensor:
    """Maximum over all dimensions but the first, 0 of what is empty."""
    flat = x.flatten(1)
    return flat.amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
