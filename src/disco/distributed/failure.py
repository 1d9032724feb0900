"""A rank that is gone or too late: how soon that shows, and what the error says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup


def bound(group: ProcessGroup) -> ProcessGroup:
    """The group, which from now on waits no longer than the default group.

    Torch 2.13 gives every group but the default one, those of a mesh too, a timeout of 30 minutes (gloo) or 10 (NCCL),
    whatever ``init_process_group`` was told. A shorter one is kept.
    """
    longest, own = timeout(), timeout(group)
    if longest is not None and own is not None and own > longest:
        group.set_timeout(longest)
    return group


def timeout(group: ProcessGroup | None = None) -> timedelta | None:
    """How long the group, or the default one, waits for its ranks; None if its backend does not tell."""
    group = group or dist.group.WORLD
    assert group is not None
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, RuntimeError):
        return None


@contextmanager
def explained(what: str, group: ProcessGroup | None = None, members: Sequence[int] | None = None) -> Iterator[None]:
    """Around one collective of a group, or of ``members`` that form one: its error says what failed, where and why.

    Raises:
        RuntimeError: the collective did; that error is the cause of this one.
    """
    ranks = [str(rank) for rank in (members or dist.get_process_group_ranks(group))]
    limit = timeout(group)
    try:
        yield
    except RuntimeError as error:
        late = "in time" if limit is None else f"within the {limit.total_seconds():g} s of the process group's timeout"
        raise RuntimeError(
            f"Disco failed at {what} among ranks {listed(ranks)}: one of them has died, has stopped with an error, or "
            f"has not joined {late}. Start all of them again from the last checkpoint"
        ) from error


def listed(items: Sequence[str]) -> str:
    """Up to 8 items in words, and how many more there are."""
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return ", ".join(items[:8]) + more
