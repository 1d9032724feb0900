"""All-reduces of many small tensors over several groups, packed, and gathers. No maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed.failure import explained

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX


def all_reduce(
    tensors: Sequence[tuple[Tensor, Sequence[ProcessGroup]]],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    what: str = "the sums over shards",
) -> None:
    """Reduces each tensor over its groups, one after the other, in place.

    All tensors that share a group and a dtype take one collective. The ranks of a group must pass the same tensors in
    the same order.

    Raises:
        RuntimeError: ranks are missing; the message says that ``what`` failed.
    """
    for stage in range(max((len(groups) for _, groups in tensors), default=0)):
        shared: dict[tuple[tuple[int, ...], str], tuple[ProcessGroup, list[Tensor]]] = {}
        for tensor, groups in tensors:
            if stage < len(groups):
                key = (tuple(dist.get_process_group_ranks(groups[stage])), str(tensor.dtype))
                shared.setdefault(key, (groups[stage], []))[1].append(tensor)
        for key in sorted(shared):  # in an order that all ranks share
            group, same = shared[key]
            flat = torch.cat([tensor.flatten() for tensor in same])
            with explained(what, group):
                dist.all_reduce(flat, op, group=group)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def all_gather(tensor: Tensor, group: ProcessGroup, what: str = "a gather over ranks") -> Tensor:
    """The tensors of all ranks, of one shape, stacked in the order of the group.

    Raises:
        RuntimeError: ranks are missing; the message says that ``what`` failed.
    """
    result = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    with explained(what, group):
        dist.all_gather(list(result.unbind()), tensor, group=group)
    return result
