"""DistributedMuon of pytorch/torchtitan: exact regions, owners by FLOPs, one packed all_to_all_single each way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peers import MOMENTUM, WEIGHT_DECAY, Built, Weight, World, adamw, stand_ins, together

NAME = "torchtitan"
FOLDERS = ("torchtitan",)
LAYOUTS = {"fsdp": "Owned(), a bucket for two layers as its configurations have it"}
SETTINGS = (
    "Muon's triple, nesterov (defaults); the rest to AdamW; float32; one stream: packed exchanges do not overlap, "
    "which costs wall time only"
)


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    folder = Path(folders["torchtitan"])
    stand_ins.empty_packages(folder, "torchtitan", "torchtitan.distributed")
    from torchtitan.distributed.flex_shard import (
        BucketConfig,
        ComputeLayout,
        Owned,
        _optimizer_reshard_runtime,
        build_dist_muon,
        dist_muon,
    )

    stand_ins.single_precision(dist_muon, _optimizer_reshard_runtime)
    device = stand_ins.one_stream()
    _optimizer_reshard_runtime.torch.get_device_module = lambda _: device
    dist_muon.DistMuon._validate_parameter_storage = lambda self: self.param_groups[0]["params"][0].to_local().device
    of_muon = [weight for weight in weights if weight.role == "matrix"]
    names = [weight.name for weight in of_muon]
    owned = ComputeLayout(shardings_by_mesh_axis={world.mesh.mesh_dim_names[0]: Owned()})
    muon = build_dist_muon(
        [{"params": [weight.param for weight in of_muon], "param_names": names}],
        compute_sharding_by_fqn=dict.fromkeys(names, owned),
        bucket_configs=[BucketConfig(patterns=tuple(bucket)) for bucket in _pairs_of_layers(names)],
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    return together([muon, *adamw(weights, lr)])


def _pairs_of_layers(names: Sequence[str]) -> list[list[str]]:
    """Names such as layers.3.attention.wq.weight, those of layers 0 and 1 first; other names are a bucket."""
    buckets: dict[int, list[str]] = {}
    for name in names:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        buckets.setdefault(layer // 2, []).append(name)
    return list(buckets.values())


def scale(shape: tuple[int, int]) -> float:
    return float(max(1.0, shape[0] / shape[1]) ** 0.5)
