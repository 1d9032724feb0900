"""The matrix products alone that Disco chooses to make; see ``problem.own_floor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peers import Built, Weight, World, matrices
from peers.problem import own_floor, share

NAME = "own-floor"
FOLDERS = ()
_SHARED = "every matrix on one rank, balanced; nothing is sent"
LAYOUTS = {"single": "all matrices", "ddp": _SHARED, "fsdp": _SHARED}
SETTINGS = "products of the forms that Disco takes alone, 5 steps"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    shapes = [(param.shape[0], param.shape[1]) for param in matrices(weights)]
    return Built(own_floor(share(shapes, world.rank, world.size)))


scale = None  # it makes no update
