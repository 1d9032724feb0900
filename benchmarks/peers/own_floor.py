"""The matrix products alone that Disco chooses to make; see ``problem.own_floor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peers import Built, Weight, World
from peers.floor import FOLDERS, LAYOUTS, alone, scale
from peers.problem import own_floor

NAME = "own-floor"
SETTINGS = "products of the forms that Disco takes alone, 5 steps"

__all__ = ["FOLDERS", "LAYOUTS", "NAME", "SETTINGS", "build", "scale"]


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    return alone(own_floor, weights, world)
