"""The worlds of gloo workers that the distributed tests share."""

from collections.abc import Callable, Iterator

import pytest
from pool import World


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """``world(size).run(function, *args)`` runs ``function(rank, size, *args)`` on every rank."""
    worlds = {size: World(size) for size in (1, 2, 4)}
    yield worlds.__getitem__
    for each in worlds.values():
        each.stop()
