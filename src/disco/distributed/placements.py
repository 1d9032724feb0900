"""From DTensors and plain tensors to layouts."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from disco.distributed.layout import Cut, Layout


def layout_of(tensor: DTensor) -> Layout:
    """Where the parts of a DTensor lie.

    Raises:
        ValueError: a placement other than Shard, _StridedShard and Replicate; a local tensor of another shape than the
            placements give; or, on all ranks, strided shards whose placements do not tell where the parts lie.
    """
    mesh = tensor.device_mesh
    layout = Layout(
        tuple(tensor.shape),
        tuple(mesh.mesh.flatten().tolist()),
        tuple(mesh.mesh.shape),
        tuple(_cut(placement, tensor.ndim) for placement in tensor.placements),
    )
    _check_order(layout)
    rank = dist.get_rank()
    if rank in layout.ranks and tuple(tensor.to_local().shape) != layout.local_shape(rank):
        raise ValueError(
            f"a DTensor with placements {tensor.placements} on a mesh of {layout.mesh} should be "
            f"{layout.local_shape(rank)} on rank {rank}, but is {tuple(tensor.to_local().shape)}"
        )
    return layout


def plain_layout(tensor: Tensor, rank: int, replicas: ProcessGroup | None) -> Layout:
    """A plain tensor: alone on its rank, or with a copy on each rank of ``replicas``."""
    ranks = (rank,) if replicas is None else tuple(dist.get_process_group_ranks(replicas))
    return Layout(tuple(tensor.shape), ranks, (len(ranks),), (None,))


def _check_order(layout: Layout) -> None:
    """Raises ValueError for a tensor of which FSDP2 holds other parts than its placements say.

    FSDP2 cuts last, what tensor parallelism has cut before, and _StridedShard describes that from left to right. As of
    torch 2.13 the two can differ where tensor parallelism cuts unevenly and there are 3 or more FSDP ranks: of 9 rows
    over 4 x 2 ranks the last is held by rank 7, and by the placements by rank 6.
    """
    for i, cut in enumerate(layout.cuts):
        if cut is None or cut.strides == 1:
            continue
        later = zip(layout.cuts[i + 1 :], layout.mesh[i + 1 :], strict=True)
        if cut.strides != math.prod(parts for other, parts in later if other == Cut(cut.dim)):
            continue  # not of FSDP2 over the whole mesh
        held = _cut_last(layout, i)
        if any(layout.pieces(rank) != held.pieces(rank) for rank in layout.ranks):
            raise ValueError(
                f"dimension {cut.dim} of length {layout.shape[cut.dim]} is cut so unevenly over the mesh of "
                f"{layout.mesh} that FSDP2's placements do not tell what each rank holds; pad it to a multiple of "
                f"{cut.strides}"
            )


def _cut_last(layout: Layout, dim: int) -> Layout:
    """The layout with mesh dimension ``dim`` cutting what the others have left, without strides."""
    order = [*(i for i in range(len(layout.mesh)) if i != dim), dim]
    mesh = torch.tensor(layout.ranks).reshape(layout.mesh).permute(order)
    cut = cast(Cut, layout.cuts[dim])
    cuts = (*(layout.cuts[i] for i in order[:-1]), Cut(cut.dim))
    return Layout(layout.shape, tuple(mesh.flatten().tolist()), tuple(mesh.shape), cuts)


def _cut(placement: object, ndim: int) -> Cut | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Cut(placement.dim % ndim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Cut(placement.dim % ndim)
    raise ValueError(f"placement {placement} is not supported; a parameter must be sharded or replicated")
