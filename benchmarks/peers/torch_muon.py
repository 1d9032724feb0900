"""``torch.optim.Muon``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from peers import MOMENTUM, WEIGHT_DECAY, Built, Weight, World, adamw, matrices, stand_ins, together

NAME = "torch-muon"
FOLDERS = ()
LAYOUTS = {"single": "plain tensors", "fsdp": "DTensors: every product is gathered, every rank computes all"}
SETTINGS = "Muon's triple, nesterov (defaults); the rest to AdamW; float32 for bfloat16"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    stand_ins.single_precision()
    muon = torch.optim.Muon(matrices(weights), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return together([muon, *adamw(weights, lr)])


def scale(shape: tuple[int, int]) -> float:
    return float(max(1.0, shape[0] / shape[1]) ** 0.5)
