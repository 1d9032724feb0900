"""KellerJordan/Muon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peers import ADAM, MOMENTUM, WEIGHT_DECAY, Built, Weight, World, matrices, others, stand_ins, together

NAME = "muon"
FOLDERS = ("muon",)
LAYOUTS = {"single": "its single-device class", "ddp": "owners compute, all_gather of parameters"}
SETTINGS = "Muon's triple, nesterov; the rest to its auxiliary Adam; float32 for bfloat16"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    stand_ins.add_path(folders["muon"])
    from muon import MuonWithAuxAdam, SingleDeviceMuonWithAuxAdam

    stand_ins.single_precision()
    shared = {"lr": lr, "weight_decay": WEIGHT_DECAY}
    groups: list[dict[str, Any]] = [
        {"params": matrices(weights), "momentum": MOMENTUM, "use_muon": True, **shared},
    ]
    if others(weights):
        groups.append({"params": others(weights), "use_muon": False, **ADAM, **shared})
    kind = SingleDeviceMuonWithAuxAdam if world.layout == "single" else MuonWithAuxAdam
    return together([kind(groups)])


def scale(shape: tuple[int, int]) -> float:
    return float(max(1.0, shape[0] / shape[1]) ** 0.5)
