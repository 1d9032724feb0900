"""Disco of rakkit/disco, the implementation of the paper. It imports as ``disco`` too."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peers import MOMENTUM, Built, Weight, World, stand_ins, together

NAME = "rakkit-disco"
FOLDERS = ("rakkit-disco",)
LAYOUTS = {
    "single": "a group of one",
    "ddp": "owners compute, all_gather of updates, a matrix for each rank at a time",
    "fsdp": "list all_to_all out and back, a matrix for each rank at a time",
}
SETTINGS = "Muon's triple (its example); embeddings by rows, gains by RMS; float32; given shape by shape (gloo)"

RULES: dict[str, dict[str, Any]] = {
    "matrix": {"norm_factor": "spectral", "backend": "newtonschulz5"},
    "input": {"norm_factor": "embed_sqrt", "backend": "identity"},
    "output": {"norm_factor": "unembed_sqrt", "backend": "identity"},
    "vector": {"norm_factor": "bias_rms", "backend": "identity"},
}


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    stand_ins.add_path(folders["rakkit-disco"])
    with stand_ins.triton():
        from disco import Disco, muon_utils

    stand_ins.single_precision(muon_utils)
    settings = {"lr": lr, "momentum": 1 - MOMENTUM, "weight_decay": 0.1, "nesterov": False, "eps": 1e-20}
    groups = []
    for role, rule in RULES.items():
        # gloo takes only tensors of one shape in a list, and the peer buckets by size in the order given
        of_role = sorted((weight for weight in weights if weight.role == role), key=lambda w: tuple(w.param.shape))
        if of_role:
            tensors = {"params": [w.param for w in of_role], "param_names": [w.name for w in of_role]}
            groups.append({**tensors, **settings, **rule, "backend_steps": 5})
    meshes = dict.fromkeys(("dp_cp", "dp_replicate", "dp_shard_cp"), world.mesh)
    dims = types.SimpleNamespace(
        world_mesh=meshes,
        fsdp_enabled=world.layout == "fsdp",
        dp_replicate_enabled=world.layout != "fsdp",
        ep_enabled=False,
        tp_enabled=False,
    )
    return together(
        [
            Disco(
                groups,
                is_light=False,
                parallel_dims=dims,
                communication_dtype=torch.float32,
                backend_steps=5,
                **settings,
                **RULES["matrix"],
            )
        ]
    )


def scale(shape: tuple[int, int]) -> float:
    return float((shape[0] / shape[1]) ** 0.5)
