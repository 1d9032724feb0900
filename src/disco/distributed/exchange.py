"""Moves tensors between the ranks of a group, many packed into one collective. No maths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed.failure import explained


@dataclass
class Pending:
    """An exchange under way."""

    group: ProcessGroup
    what: str
    work: Any
    buffers: tuple[Tensor, Tensor]
    sizes: list[int]
    order: list[int]

    def wait(self) -> list[Tensor]:
        """What was received, one flat tensor for each of ``receives``, in their order.

        Raises:
            RuntimeError: ranks are missing.
        """
        with explained(self.what, self.group):
            self.work.wait()
        flat = self.buffers[1].split(self.sizes)
        result = [flat[0]] * len(self.order) if flat else []
        for tensor, index in zip(flat, self.order, strict=True):
            result[index] = tensor
        return result


def start(
    group: ProcessGroup,
    sends: Sequence[tuple[int, Tensor]],
    receives: Sequence[tuple[int, int]],
    like: Tensor,
    what: str = "an exchange of tensors",
) -> Pending:
    """Starts one all-to-all; every rank of the group must call it.

    Args:
        group: the ranks that take part.
        sends: (global rank, tensor); to each rank in the order in which it lists its receives from this one.
        receives: (global rank, number of elements).
        like: dtype and device of what moves.
        what: named by an error.

    Raises:
        RuntimeError: ranks are missing.
    """
    ranks = dist.get_process_group_ranks(group)
    place = {rank: position for position, rank in enumerate(ranks)}
    outgoing, incoming = [0] * len(ranks), [0] * len(ranks)
    for rank, tensor in sends:
        outgoing[place[rank]] += tensor.numel()
    for rank, size in receives:
        incoming[place[rank]] += size
    packed = [tensor.reshape(-1) for _, tensor in sorted(sends, key=lambda send: place[send[0]])]
    buffer = torch.cat(packed) if packed else like.new_empty(0)
    received = like.new_empty(sum(incoming))
    with explained(what, group):
        work = dist.all_to_all_single(received, buffer, incoming, outgoing, group=group, async_op=True)
    order = sorted(range(len(receives)), key=lambda index: place[receives[index][0]])
    return Pending(group, what, work, (buffer, received), [receives[index][1] for index in order], order)
