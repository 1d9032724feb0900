"""From DTensors and plain tensors to layouts."""

from __future__ import annotations

import math

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
    _check_order(layout, tensor)
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


def _check_order(layout: Layout, tensor: DTensor) -> None:
    """FSDP2 cuts what tensor parallelism has cut before; _StridedShard says the same from left to right.

    As of torch 2.13 the two can differ where tensor parallelism cuts unevenly and there are 3 or more FSDP ranks: of 9
    rows over 4 x 2 ranks the last is held by rank 7, and according to the placements by rank 6.
    """
    cuts = list(zip(layout.cuts, layout.mesh, strict=True))
    strided = [
        cut
        for i, (cut, _) in enumerate(cuts)
        if cut is not None and cut.strides > 1
        if cut.strides == math.prod(parts for other, parts in cuts[i + 1 :] if other == Cut(cut.dim))
    ]
    if not strided:
        return
    ranks = tensor.device_mesh.mesh.permute(*reversed(range(len(layout.mesh)))).flatten().tolist()
    reverse = tuple(None if cut is None else Cut(cut.dim) for cut in reversed(layout.cuts))
    held = Layout(layout.shape, tuple(ranks), layout.mesh[::-1], reverse)
    if any(layout.pieces(rank) != held.pieces(rank) for rank in layout.ranks):
        lengths = " and ".join(f"{layout.shape[cut.dim]} to a multiple of {cut.strides}" for cut in strided)
        raise ValueError(
            f"a DTensor with placements {tensor.placements} on a mesh of {layout.mesh} is cut so unevenly that they do "
            f"not tell what each rank holds; pad its dimension of {lengths}"
        )


def _cut(placement: object, ndim: int) -> Cut | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Cut(placement.dim % ndim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Cut(placement.dim % ndim)
    raise ValueError(f"placement {placement} is not supported; a parameter must be sharded or replicated")
