"""Parameters of every kind and gradients of full rank for the equality tests, and ways to lay them out."""

from collections.abc import Callable
from typing import Any

import torch
from meshes import mesh_of
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Problem = list[tuple[str, tuple[int, ...], dict[str, Any]]]
Place = Callable[[Tensor], Tensor]

EVERY_KIND: Problem = [
    ("square", (64, 64), {"norm": "rms_to_rms"}),
    ("uneven", (7, 5), {"norm": "rms_to_rms", "weight_decay": 0.1}),
    ("wide", (64, 128), {"norm": "rms_to_rms", "nesterov": True}),
    ("tall", (192, 64), {"norm": "rms_to_rms"}),
    ("empty", (2, 8), {"norm": "rms_to_rms"}),
    ("row", (1, 9), {"norm": "rms_to_rms"}),
    ("column", (9, 1), {"norm": "rms_to_rms", "layout": "in_out"}),
    ("stored_in_out", (24, 10), {"norm": "rms_to_rms", "layout": "in_out", "scale": "match_adamw_rms"}),
    ("embedding", (50, 16), {"norm": "one_to_rms", "layout": "in_out"}),
    ("output", (50, 16), {"norm": "rms_to_inf"}),
    ("sign", (10, 6), {"norm": "one_to_inf"}),
    ("gain", (13,), {"norm": "rms"}),
    ("bias", (3,), {"norm": "rms", "scale": 2.0}),
    ("experts", (6, 10, 12), {"norm": "rms_to_rms", "batch_dims": 1}),
    ("experts_in_out", (3, 10, 12), {"norm": "rms_to_rms", "batch_dims": 1, "layout": "in_out"}),
    ("conv", (8, 6, 3, 3), {"norm": "conv"}),
    ("qkv", (48, 16), {"norm": "rms_to_rms", "split": (32, 8, 8), "scale": "max_spectral"}),
    ("gate_up", (16, 40), {"norm": "rms_to_rms", "split": 2, "layout": "in_out"}),
    ("adam", (12, 8), {"norm": "rms_to_rms", "rule": "adamw"}),
]


def full_rank(shape: tuple[int, ...], batch_dims: int, seed: int) -> Tensor:
    """Random matrices with singular values in [0.1, 1]."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) - batch_dims < 2:
        return x
    u, s, vh = torch.linalg.svd(x.flatten(batch_dims + 1), full_matrices=False)
    return ((u * torch.linspace(1, 0.1, s.shape[-1])) @ vh).reshape(shape)


def placements(size: int) -> dict[str, Place]:
    """Layouts that make sense in a world of ``size``; must be called by all ranks."""
    result: dict[str, Place] = {"plain": torch.clone}
    if size > 1:
        mesh = mesh_of(size)
        result["fsdp"] = lambda t: distribute_tensor(t, mesh, [Shard(0)])
        result["last_dim"] = lambda t: distribute_tensor(t, mesh, [Shard(t.ndim - 1)])
        result["second_dim"] = lambda t: distribute_tensor(t, mesh, [Shard(min(1, t.ndim - 1))])
        result["replicated"] = lambda t: distribute_tensor(t, mesh, [Replicate()])
    if size == 4:
        square = mesh_of(2, 2, names=("outer", "inner"))
        # of a mesh of its own: torch 2.13 gathers a dimension that two mesh dimensions cut unevenly wrongly if the mesh
        # has been flattened
        flat = mesh_of(2, 2, names=("data", "context"))._flatten("both")
        result["hsdp"] = lambda t: distribute_tensor(t, square, [Replicate(), Shard(0)])
        result["two_dims"] = lambda t: distribute_tensor(t, square, [Shard(0), Shard(t.ndim - 1)])
        result["twice"] = lambda t: distribute_tensor(t, square, [Shard(0), Shard(0)])
        result["context"] = lambda t: distribute_tensor(t, flat, [Shard(0)])
        result["sub_mesh"] = lambda t: distribute_tensor(t, square["inner"], [Shard(0)])
    return result


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def steps(
    optimizer_class: Any, problem: Problem, place: Callable[[str, Tensor], Tensor], *, count: int = 5, **settings: Any
) -> tuple[dict[str, Tensor], Any]:
    """Change of every parameter, gathered, after ``count`` steps with the same gradients; and the optimizer."""
    starts, params, groups = {}, {}, []
    for seed, (name, shape, group) in enumerate(problem):
        starts[name] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        params[name] = torch.nn.Parameter(place(name, starts[name].clone()))
        groups.append({"params": [params[name]], "names": [name], **group})
    optimizer = optimizer_class(groups, lr=0.1, momentum=0.9, **settings)
    for step in range(count):
        for seed, (name, shape, group) in enumerate(problem):
            gradient = full_rank(shape, group.get("batch_dims", 0), 1000 * step + seed)
            params[name].grad = place(name, gradient)
        optimizer.step()
    return {name: whole(param) - starts[name] for name, param in params.items()}, optimizer
