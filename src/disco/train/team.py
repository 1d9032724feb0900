"""The processes that train runs together. Here: one, alone; ``launch`` has those that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from disco.train.cohort import Program
from disco.train.config import TrainConfig
from disco.train.trainer import Trainer

T = TypeVar("T")


class Team:
    """This process alone.

    Attributes:
        size: number of processes.
        leads: whether this one writes the records.
        part, parts: which part of each batch it trains on, and of how many.
    """

    size = 1
    leads = True
    part, parts = 0, 1

    def program(self, configs: Sequence[TrainConfig], compiled: bool) -> Trainer:
        """What trains these runs.

        Raises:
            UserError: they cannot be trained by this team.
        """
        return Program(configs, compiled)

    def first(self, work: Callable[[], T]) -> T:
        """What the leader's ``work`` returns (JSON), on all processes.

        Raises:
            UserError: the leader's, on all of them.
        """
        return work()

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag


@contextmanager
def started(config: TrainConfig) -> Iterator[Team]:
    """The team that a run trains with: the processes that torchrun has started, or this one alone.

    Raises:
        UserError: it is not as large as the configuration's ``parallel`` section asks for.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    config.parallel.fits(size)
    if size == 1:
        yield Team()
        return
    from disco.train.launch import ranks

    with ranks(config) as team:
        yield team
