"""The worlds of gloo workers that the distributed tests share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pool import World

sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # small_disk.py


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """``world(size).run(function, *args)`` runs ``function(rank, size, *args)`` on every rank."""
    worlds = {size: World(size) for size in (1, 2, 4)}
    yield worlds.__getitem__
    for each in worlds.values():
        each.stop()
