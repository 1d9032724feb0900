"""Scion and ``newton_schulz_tp`` of NVIDIA-NeMo/Emerging-Optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peers import MOMENTUM, Built, Weight, World, adamw, stand_ins, together

NAME = "emerging-optimizers"
FOLDERS = ("emerging-optimizers",)
LAYOUTS = {
    "single": "its Scion",
    "fsdp": "its tensor-parallel Newton-Schulz on the shards: Gram all-reduce in every step where rows >= columns, "
    "else all_gather and every rank computes all",
}
SETTINGS = "its quintic (default), fp32_matmul_prec highest; the rest to AdamW"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    stand_ins.absl_logging()
    stand_ins.python_3_12(registry="emerging_optimizers.registry")
    stand_ins.add_path(folders["emerging-optimizers"])
    from emerging_optimizers.orthogonalized_optimizers import OrthogonalizedOptimizer, Scion, muon_utils

    of_muon = [weight for weight in weights if weight.role == "matrix"]
    rest = adamw(weights, lr)
    if world.layout == "single":
        settings: dict[str, Any] = {"momentum": MOMENTUM, "fp32_matmul_prec": "highest"}
        return together([Scion([weight.param for weight in of_muon], lr=lr, **settings), *rest])

    def orthogonalize(shard: Tensor) -> Tensor:
        rows, columns = shard.shape[0] * world.size, shard.shape[1]
        mode = "distributed" if rows >= columns else "duplicated"
        factor = muon_utils.newton_schulz_tp(shard, 5, "quintic", world.group, partition_dim=0, tp_mode=mode)
        return factor * scale((rows, columns))

    optimizer = OrthogonalizedOptimizer(
        [_shard(weight) for weight in of_muon],
        lr,
        MOMENTUM,
        weight_decay=1,
        nesterov=False,
        weight_decay_method="decoupled",
        fp32_matmul_prec="highest",
        scaled_orthogonalize_fn=orthogonalize,
    )
    return together([optimizer, *rest])


def _shard(weight: Weight) -> nn.Parameter:
    """A plain parameter on the memory of a DTensor's shard, gradient included."""
    param = nn.Parameter(weight.param.detach().to_local())  # type: ignore[operator]
    param.grad = weight.grad.to_local()  # type: ignore[operator]
    return param


def scale(shape: tuple[int, int] | torch.Size) -> float:
    return float((shape[0] / shape[1]) ** 0.5)
