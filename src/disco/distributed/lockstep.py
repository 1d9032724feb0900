"""Jobs that need numbers of other ranks, run in lockstep so that they share their all-reduces.

A job is a generator. It yields what is to be reduced and goes on once that is done; whatever several jobs ask for at
the same time takes one all-reduce for each group of ranks and kind of reduction, and one copy from the device.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed.reduce import MAX, SUM, all_reduce

WHAT = "the measurement of norms"


@dataclass(frozen=True)
class Reduce:
    """A tensor to be reduced in place, over several groups one after the other."""

    op: dist.ReduceOp.RedOpType
    tensor: Tensor
    groups: Sequence[ProcessGroup]


@dataclass(frozen=True)
class Tell:
    """A vector whose maximum over all groups is sent back as floats: NaN if it is NaN or infinite anywhere."""

    tensor: Tensor
    groups: Sequence[ProcessGroup]


Job = Generator[Reduce | Tell, Any, list[float]]


def run(jobs: Sequence[Job]) -> list[list[float]]:
    """What the jobs return.

    The ranks of a group must run the same jobs that use it, in the same order; other jobs may differ. Floats are told
    when all jobs wait for them.
    """
    results: dict[int, list[float]] = {}
    sent: dict[int, Any] = dict.fromkeys(range(len(jobs)))
    while sent:
        told: dict[int, Tell] = {}
        while sent:
            reductions: dict[int, Reduce] = {}
            for i, answer in sent.items():
                try:
                    request = jobs[i].send(answer)
                except StopIteration as stop:
                    results[i] = stop.value
                    continue
                if isinstance(request, Tell):
                    told[i] = request
                else:
                    reductions[i] = request
            for op in (SUM, MAX):
                all_reduce([(r.tensor, r.groups) for r in reductions.values() if r.op == op], op, WHAT)
            sent = dict.fromkeys(reductions)
        sent = dict(zip(told, _floats(list(told.values())), strict=True))
    return [results[i] for i in range(len(jobs))]


def _floats(requests: list[Tell]) -> list[list[float]]:
    # NaN crosses as infinity, for not every backend's maximum keeps NaN
    tensors = [request.tensor.double().nan_to_num(nan=math.inf, posinf=math.inf) for request in requests]
    all_reduce([(tensor, r.groups) for tensor, r in zip(tensors, requests, strict=True)], MAX, WHAT)
    together = torch.cat([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []
    numbers = iter([math.nan if number == math.inf else number for number in together])
    return [[next(numbers) for _ in range(len(tensor))] for tensor in tensors]
