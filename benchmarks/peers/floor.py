"""The matrix products of the standard quintic alone; see ``problem.floor``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peers import Built, Weight, World, matrices
from peers.problem import floor, share

NAME = "floor"
FOLDERS = ()
_SHARED = "every matrix on one rank, balanced; nothing is sent"
LAYOUTS = {"single": "all matrices", "ddp": _SHARED, "fsdp": _SHARED}
SETTINGS = "products of the standard quintic alone, 5 steps"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    return alone(floor, weights, world)


def alone(products: Callable[..., Callable[[], None]], weights: Sequence[Weight], world: World) -> Built:
    """The ``products`` of this rank's share of the matrices."""
    shapes = [(param.shape[0], param.shape[1]) for param in matrices(weights)]
    return Built(products(share(shapes, world.rank, world.size)))


scale = None  # it makes no update
