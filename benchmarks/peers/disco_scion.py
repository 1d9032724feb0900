"""``disco.Scion``: this project's reference on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peers import MOMENTUM, WEIGHT_DECAY, Built, Weight, World, together

NAME = "scion"
FOLDERS = ()
LAYOUTS = {"single": "plain tensors"}
SETTINGS = "Polar Express (default); embeddings and gains by their norms"

NORMS = {
    "matrix": {"norm": "rms_to_rms"},
    "input": {"norm": "one_to_rms", "layout": "in_out"},
    "output": {"norm": "rms_to_inf"},
    "vector": {"norm": "rms"},
}
"""Role of a weight -> norm and storage."""


def groups(weights: Sequence[Weight]) -> list[dict[str, Any]]:
    """A parameter group for each role that occurs."""
    result = []
    for role, norm in NORMS.items():
        of_role = [weight for weight in weights if weight.role == role]
        if of_role:
            names = [weight.name for weight in of_role]
            result.append({"params": [weight.param for weight in of_role], "names": names, **norm})
    return result


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    import disco

    return together([disco.Scion(groups(weights), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)])


def scale(shape: tuple[int, int]) -> float:
    return float((shape[0] / shape[1]) ** 0.5)
