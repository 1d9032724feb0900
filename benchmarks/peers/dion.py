"""Muon of microsoft/dion: same-shape matrices in one batch, all-to-all for shards, all-gather for replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peers import ADAM, MOMENTUM, WEIGHT_DECAY, Built, Weight, World, matrices, others, stand_ins, together

NAME = "dion"
FOLDERS = ("dion",)
LAYOUTS = {
    "single": "plain tensors",
    "ddp": "process group: owners compute, all_gather of updates",
    "fsdp": "device mesh: all_to_all out and back for each shape",
}
SETTINGS = "its Polar Express (default); the rest to its AdamW; float32 for bfloat16; no torch.compile"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str], **settings: Any) -> Built:
    stand_ins.add_path(folders["dion"])
    from dion import Muon, muon, newton_schulz_triton, polar_express

    stand_ins.single_precision(muon, newton_schulz_triton, polar_express)
    mesh = {"single": None, "ddp": world.group, "fsdp": world.mesh}[world.layout]
    groups: list[dict[str, Any]] = [{"params": matrices(weights)}]
    if others(weights):
        groups.append({"params": others(weights), "algorithm": "adamw", "epsilon": ADAM["eps"]})
    settings = {"mu": MOMENTUM, "betas": ADAM["betas"], "weight_decay": WEIGHT_DECAY, **settings}
    return together([Muon(groups, distributed_mesh=mesh, lr=lr, **settings)])


def scale(shape: tuple[int, int]) -> float:
    return float((shape[0] / shape[1]) ** 0.5)
