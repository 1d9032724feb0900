"""Real schedulers, started for these tests; where one cannot be, the tests fail with the reason."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # sweeps.py

from daemons import Ray, Slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with Slurm() as running:
        yield running


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    with Ray() as running:
        yield running
