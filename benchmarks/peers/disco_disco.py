"""``disco.Disco``: this project's distributed optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peers import MOMENTUM, WEIGHT_DECAY, Built, Weight, World, together
from peers.disco_scion import groups, scale

NAME = "disco"
FOLDERS = ()
LAYOUTS = {
    "single": "plain tensors",
    "ddp": "plain tensors, replicas=group: the work is shared",
    "fsdp": "DTensors in Shard(0)",
}
SETTINGS = "Polar Express (default); embeddings and gains by their norms"

__all__ = ["FOLDERS", "LAYOUTS", "NAME", "SETTINGS", "build", "scale"]


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    import disco

    replicas = {"replicas": world.group} if world.layout == "ddp" else {}
    settings = {"lr": lr, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    return together([disco.Disco(groups(weights), **settings, **replicas)])
