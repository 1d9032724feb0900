"""From DTensors and plain tensors to layouts."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from disco.distributed.layout import Cut, Layout


def layout_of(tensor: DTensor) -> Layout:
    """Where the parts of a DTensor lie.

    Raises:
        ValueError: a placement other than Shard, _StridedShard and Replicate, or a local tensor of another shape than
            the placements give.
    """
    mesh = tensor.device_mesh
    layout = Layout(
        tuple(tensor.shape),
        tuple(mesh.mesh.flatten().tolist()),
        tuple(mesh.mesh.shape),
        tuple(_cut(placement, tensor.ndim) for placement in tensor.placements),
    )
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


def _cut(placement: object, ndim: int) -> Cut | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Cut(placement.dim % ndim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Cut(placement.dim % ndim)
    raise ValueError(f"placement {placement} is not supported; a parameter must be sharded or replicated")
