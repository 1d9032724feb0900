"""What the cluster engine needs of a scheduler. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from disco.errors import UserError
from disco.sweep.clusters import JobConfig


class QueueError(UserError):
    """The scheduler refused, or could not be asked."""


class FullError(QueueError):
    """The scheduler takes no more jobs for now: one of its limits is reached."""


class Phase(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    """However it ended; whether its runs did is in their records."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What the scheduler says of a job."""

    id: str
    """The scheduler's own."""
    phase: Phase
    word: str
    """The scheduler's word for it, such as PENDING."""
    reason: str = ""
    requeues: int = 0

    @property
    def live(self) -> bool:
        """Whether it runs or is still to run."""
        return self.phase in (Phase.QUEUED, Phase.RUNNING)

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


class Queue(Protocol):
    """A scheduler. Jobs have keys "<name>.<index>"; every method raises ``QueueError``."""

    engine: str

    @property
    def config(self) -> JobConfig:
        """What each job asks for."""

    def submit(self, name: str, orders: Sequence[Path]) -> None:
        """Submits a job for each of the files <name>.<index>.json, in order (see ``task.py``).

        Raises:
            FullError: there is no room for so many jobs now.
        """

    def requeue(self, key: str, order: Path) -> None:
        """Starts a job that has ended once more, under the same key and from the same file."""

    def states(self, keys: Collection[str]) -> Mapping[str, JobState]:
        """What it knows of these jobs; those that it has forgotten are missing."""

    def cancel(self, keys: Collection[str]) -> None:
        """Ends these jobs; those that have ended are left alone."""
