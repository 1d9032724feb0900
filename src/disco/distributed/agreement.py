"""All ranks must plan the same step; if they do not, say which line of their plans differs instead of hanging."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from disco.distributed.reduce import all_gather

WHAT = "the comparison of the ranks' plans"


def agree(group: ProcessGroup, lines: Sequence[str], device: torch.device) -> None:
    """Compares ``lines`` over the ranks of the group, all of which must call it.

    Raises:
        ValueError: they differ; the message has the first line that does, on every rank.
        RuntimeError: ranks are missing.
    """
    ranks = dist.get_process_group_ranks(group)
    text = "\n".join(lines).encode()
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.int64).to(device)
    if (all_gather(digest, group, WHAT) == digest).all():
        return
    lengths = all_gather(torch.tensor([len(text)], device=device), group, WHAT).flatten()
    mine = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=device)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    plans = [
        bytes(row[:size].tolist()).decode().split("\n")
        for row, size in zip(all_gather(mine, group, WHAT), lengths.tolist(), strict=True)
    ]
    for rank, plan in zip(ranks, plans, strict=True):
        for ours, theirs in itertools.zip_longest(plans[0], plan, fillvalue="nothing"):
            if ours != theirs:
                raise ValueError(
                    f"ranks {ranks[0]} and {rank} plan different steps: the first has {ours}, the other {theirs}; "
                    "parameters and gradients must be the same, in the same order, on all ranks that share them"
                )
