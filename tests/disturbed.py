"""Runs of one process whose initial weights are off by 1e-7: how far rounding alone carries a run."""

from typing import Any

import torch

from disco.train.cohort import Program
from disco.train.team import Team

SIZE = 1e-7


class Disturbed(Team):
    """One process, whose initial weights are off by ``SIZE`` times normal numbers of the seed ``noise``."""

    def __init__(self, noise: int) -> None:
        self._noise = noise

    def program(self, configs: Any, compiled: bool) -> Any:
        program = Program(configs, compiled)
        initialise = program.initialise

        def disturbed(run: int) -> None:
            initialise(run)
            generator = torch.Generator().manual_seed(self._noise)
            with torch.no_grad():
                for param in program.model.parameters():
                    param += SIZE * torch.randn(param.shape, generator=generator)

        program.initialise = disturbed  # type: ignore[method-assign]
        return program
