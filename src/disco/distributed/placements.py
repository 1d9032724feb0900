"""From DTensors and plain tensors to layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from disco.distributed.layout import Cut, Layout


def layout_of(tensor: DTensor) -> Layout:
    """Where the parts of a DTensor lie.

    Raises:
        ValueError: a placement other than Shard, _StridedShard and Replicate; or a local tensor of another shape than
            the placements give, where it is not empty.
    """
    layout, part, rank = _declared(tensor), tensor.to_local(), dist.get_rank()
    if rank in layout.ranks and layout.local_shape(rank) != part.shape and (part.numel() or layout.pieces(rank)):
        raise ValueError(
            f"a DTensor with placements {tensor.placements} on a mesh of {layout.mesh} should be "
            f"{layout.local_shape(rank)} on rank {rank}, but is {tuple(part.shape)}"
        )
    return layout


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor.

    An empty part has the shape that the layout gives: of a row-parallel weight with fewer columns than ranks, FSDP2 of
    torch 2.13 makes it (0, 0) where it should be (2, 0).
    """
    if not isinstance(tensor, DTensor):
        return tensor
    part, rank = tensor.to_local(), dist.get_rank()
    if part.numel():
        return part
    layout = _declared(tensor)
    return part.reshape(layout.local_shape(rank)) if rank in layout.ranks else part


def local_parts(tensor: Tensor) -> list[tuple[Tensor, tuple[slice, ...]]]:
    """The parts of a DTensor that this rank holds, as views, and where they are in the whole."""
    assert isinstance(tensor, DTensor)
    layout, part, rank = _declared(tensor), local(tensor), dist.get_rank()
    pieces = layout.pieces(rank) if rank in layout.ranks else ()
    return [(part[piece.within(piece.box)], tuple(slice(*along) for along in piece.box)) for piece in pieces]


def plain_layout(tensor: Tensor, rank: int, replicas: ProcessGroup | None) -> Layout:
    """A plain tensor: alone on its rank, or with a copy on each rank of ``replicas``."""
    ranks = (rank,) if replicas is None else tuple(dist.get_process_group_ranks(replicas))
    return Layout(tuple(tensor.shape), ranks, (len(ranks),), (None,))


def _declared(tensor: DTensor) -> Layout:
    """The layout that the placements declare."""
    mesh = tensor.device_mesh
    sizes = tuple(mesh.mesh.shape)
    cuts, order = _in_order([_cut(placement, tensor.ndim) for placement in tensor.placements], sizes)
    return Layout(tuple(tensor.shape), tuple(mesh.mesh.flatten().tolist()), sizes, cuts, order)


def _in_order(cuts: list[Cut | None], sizes: Sequence[int]) -> tuple[tuple[Cut | None, ...], tuple[int, ...]]:
    """The cuts, and the mesh dimensions in the order in which they cut; () if that is from left to right.

    FSDP2 cuts last, what tensor parallelism has cut before, though its mesh dimension comes first. The split factor of
    _StridedShard tells: it is the number of chunks in which mesh dimensions to the right have cut already. One that is
    not such a number remains a stride.
    """
    order: list[int] = []
    for i in reversed(range(len(cuts))):
        place, cut = 0, cuts[i]
        if cut is not None and cut.strides > 1:
            chunks = [
                math.prod(sizes[j] for j in order[:end] if (other := cuts[j]) is not None and other.dim == cut.dim)
                for end in range(len(order) + 1)
            ]
            if cut.strides in chunks:
                place, cuts[i] = chunks.index(cut.strides), replace(cut, strides=1)
        order.insert(place, i)
    return tuple(cuts), () if order == sorted(order) else tuple(order)


def _cut(placement: object, ndim: int) -> Cut | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Cut(placement.dim % ndim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Cut(placement.dim % ndim)
    raise ValueError(f"placement {placement} is not supported; a parameter must be sharded or replicated")
