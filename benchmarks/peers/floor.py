"""The matrix products of the standard quintic alone; see ``problem.floor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peers import Built, Weight, World, matrices
from peers.problem import floor, share

NAME = "floor"
FOLDERS = ()
_SHARED = "every matrix on one rank, balanced; nothing is sent"
LAYOUTS = {"single": "all matrices", "ddp": _SHARED, "fsdp": _SHARED}
SETTINGS = "products of the standard quintic alone, 5 steps"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    shapes = [(param.shape[0], param.shape[1]) for param in matrices(weights)]
    return Built(floor(share(shapes, world.rank, world.size)))


scale = None  # it makes no update
