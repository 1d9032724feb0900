"""Scion of LIONS-EPFL/scion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peers import MOMENTUM, Built, Weight, World, params, stand_ins, together

NAME = "lions-scion"
FOLDERS = ("lions-scion",)
LAYOUTS = {"single": "plain tensors"}
SETTINGS = "Muon's triple; embeddings by ColNorm and Sign, gains by BiasRMS; float32 for bfloat16; no torch.compile"

NORMS: dict[str, dict[str, Any]] = {
    "matrix": {"norm": "Spectral"},
    "input": {"norm": "ColNorm", "norm_kwargs": {"transpose": True}},
    "output": {"norm": "Sign"},
    "vector": {"norm": "BiasRMS"},
}


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    stand_ins.add_path(folders["lions-scion"])
    from scion import Scion

    stand_ins.single_precision()
    groups = [{"params": params(weights, role), **norm} for role, norm in NORMS.items() if params(weights, role)]
    return together([Scion(groups, lr=lr, momentum=1 - MOMENTUM)])


def scale(shape: tuple[int, int]) -> float:
    return float((shape[0] / shape[1]) ** 0.5)
