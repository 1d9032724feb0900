"""``disco.Disco`` with 4 steps of ``polar_sharp``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peers import MOMENTUM, WEIGHT_DECAY, Built, Weight, World, together
from peers.disco_disco import LAYOUTS
from peers.disco_scion import groups, scale

NAME = "disco-sharp"
FOLDERS = ()
SETTINGS = "polar_sharp, 4 steps; embeddings and gains by their norms"

__all__ = ["FOLDERS", "LAYOUTS", "NAME", "SETTINGS", "build", "scale"]


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    import disco

    settings = {"lr": lr, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    settings |= {"orthogonalize": "polar_sharp", "steps": 4}
    replicas = {"replicas": world.group} if world.layout == "ddp" else {}
    return together([disco.Disco(groups(weights), **settings, **replicas)])
