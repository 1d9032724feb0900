"""The layouts of parallel training by name: who holds what of a dict of tensors, uneven and empty shards included.

Updates are compared where they lie, each rank's local tensor with its part of the wanted one. So every replica is
checked, and nothing rests on how torch gathers.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from meshes import mesh_of
from problems import Problem, full_rank
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

Place = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From full tensors to those that this rank has a part in."""

_TWO = ("ddp", "fsdp0", "fsdp1", "tp_col", "tp_row", "ep", "pp")
LAYOUTS = {
    1: ("single", "fsdp0", "tp_col", "tp_row", "ep"),
    2: ("single", *_TWO),
    4: (*_TWO, "hsdp", "fsdp_tp", "fsdp_tp_row", "hsdp_tp", "ep_fsdp", "cp", "mixed"),
}
"""World size -> the layouts that make sense there."""

MIXED = ("fsdp0", "hsdp", "tp_row", "fsdp_tp", "ep_fsdp", "cp", "single", "fsdp1")
"""What the parameters of "mixed" take in turn: several meshes in one optimizer."""


def distribute(tensors: dict[str, Tensor], layout: str, size: int) -> dict[str, Tensor]:
    """``tensors`` under a named layout; all ranks must call it."""
    if layout == "pp":
        return _stages(tensors, size)
    if layout == "mixed":
        return {name: _placed(t, MIXED[i % len(MIXED)], size) for i, (name, t) in enumerate(tensors.items())}
    return {name: _placed(tensor, layout, size) for name, tensor in tensors.items()}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def updates(
    optimizer_class: Any,
    problem: Problem,
    place: Place = dict,
    *,
    count: int = 5,
    idle: Collection[str] = (),
    **settings: Any,
) -> dict[str, Tensor]:
    """Change of each local tensor after ``count`` steps; parameters in ``idle`` have no gradient in every other one."""
    starts = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for seed, (name, shape, _) in enumerate(problem)
    }
    params = {name: torch.nn.Parameter(tensor) for name, tensor in place(starts).items()}
    before = {name: local(param.detach()).clone() for name, param in params.items()}
    groups = [{"params": [params[name]], "names": [name], **group} for name, _, group in problem if name in params]
    optimizer = optimizer_class(groups, **{"lr": 0.1, "momentum": 0.9, **settings})
    for step in range(count):
        gradients = place(
            {
                name: full_rank(shape, group.get("batch_dims", 0), 1000 * step + seed)
                for seed, (name, shape, group) in enumerate(problem)
            }
        )
        for name, param in params.items():
            param.grad = None if name in idle and step % 2 else gradients[name]
        optimizer.step()
    return {name: local(param.detach()) - before[name] for name, param in params.items()}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor], place: Place) -> dict[str, float]:
    """||local difference|| / ||wanted||, by name."""
    parts = place(wanted)
    assert found.keys() == parts.keys()
    return {
        name: float((found[name] - local(parts[name])).norm() / wanted[name].norm().clamp_min(0.1)) for name in found
    }


def mesh(*dims: tuple[str, int]) -> DeviceMesh:
    """The mesh of these names and sizes."""
    return mesh_of(*(size for _, size in dims), names=tuple(name for name, _ in dims))


@functools.cache
def flattened(size: int) -> DeviceMesh:
    return mesh(("data", 2), ("context", size // 2))._flatten("both")


def _placed(tensor: Tensor, layout: str, size: int) -> Tensor:
    last = tensor.ndim - 1
    inner = Shard(min(1, last))
    if layout in ("single", "ddp"):
        return tensor.clone()
    if layout == "fsdp0":
        return distribute_tensor(tensor, mesh(("shard", size)), [Shard(0)])
    if layout == "fsdp1":
        return distribute_tensor(tensor, mesh(("shard", size)), [inner])
    if layout == "hsdp":
        return distribute_tensor(tensor, mesh(("replicate", 2), ("shard", size // 2)), [Replicate(), Shard(0)])
    if layout == "tp_col":
        return distribute_tensor(tensor, mesh(("tensor", size)), [Shard(0)])
    if layout == "tp_row":
        return distribute_tensor(tensor, mesh(("tensor", size)), [Shard(last) if last else Replicate()])
    if layout == "fsdp_tp":
        return _fully_sharded(tensor, mesh(("shard", 2), ("tensor", size // 2)), [])
    if layout == "hsdp_tp":
        return _fully_sharded(tensor, mesh(("replicate", 2), ("shard", 1), ("tensor", size // 2)), [Replicate()])
    if layout == "fsdp_tp_row":
        placements = [Shard(0), Shard(last) if last else Replicate()]
        return distribute_tensor(tensor, mesh(("shard", 2), ("tensor", size // 2)), placements)
    if layout == "cp":
        return distribute_tensor(tensor, flattened(size), [Shard(0)])
    if layout == "ep":
        return distribute_tensor(tensor, mesh(("expert" if tensor.ndim == 3 else "shard", size)), [Shard(0)])
    if layout == "ep_fsdp":
        if tensor.ndim == 3:
            return distribute_tensor(tensor, mesh(("shard", 2), ("expert", size // 2)), [Shard(1), Shard(0)])
        return distribute_tensor(tensor, mesh(("shard", size)), [Shard(0)])
    raise ValueError(f"unknown layout {layout!r}")


def _fully_sharded(tensor: Tensor, over: DeviceMesh, replicate: list[Replicate]) -> DTensor:
    """What ``fully_shard`` makes of a column-wise tensor-parallel weight; ``test_layout`` holds it to the real one."""
    shards, parallel = over.size(-2), over.size(-1)
    column = _chunk(tensor, parallel, over.get_local_rank(-1))
    part = _chunk(column, shards, over.get_local_rank(-2))
    placements = [*replicate, _StridedShard(0, split_factor=parallel), Shard(0)]
    return DTensor.from_local(
        part.contiguous(), over, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _chunk(tensor: Tensor, parts: int, index: int) -> Tensor:
    chunks = tensor.chunk(parts)
    return chunks[index] if index < len(chunks) else tensor[:0]


def _stages(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Two pipeline stages that own every other tensor, in a world of 4 sharded over the two ranks of the stage."""
    over = mesh(("stage", 2), ("shard", size // 2))
    mine = [name for i, name in enumerate(tensors) if i % 2 == over.get_local_rank("stage")]
    if size == 2:
        return {name: tensors[name].clone() for name in mine}
    return {name: distribute_tensor(tensors[name], over["shard"], [Shard(0)]) for name in mine}
