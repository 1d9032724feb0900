"""The norm-everywhere model, trained on real text, ends where one process ends, whatever the layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from meshes import mesh_of
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import disco
from disco import corpus
from disco.train.config import ModelConfig
from disco.train.model import Llama
from disco.train.parallel import tensor_parallel

CONTEXT, ROWS = 32, 8


def build(layout: str, size: int, noise: int = 0) -> tuple[Any, Any]:
    """The model under a layout, and its optimizer."""
    model = Llama(ModelConfig(width=32, depth=2, head_size=8, context=CONTEXT), 256)
    disco.init_(model, model.init_scales(), generator=torch.Generator().manual_seed(0))
    if noise:
        with torch.no_grad():
            for param in model.parameters():
                param += 1e-7 * torch.randn(param.shape, generator=torch.Generator().manual_seed(noise))
    replicas = None
    wrapped: Any = model
    if layout == "ddp":
        wrapped, replicas = DistributedDataParallel(model), dist.group.WORLD
    elif layout == "fsdp":
        fully_shard(model, mesh=mesh_of(size))
    elif layout == "hsdp":
        fully_shard(model, mesh=mesh_of(2, size // 2, names=("replicate", "shard")))
    elif layout in ("tp", "fsdp_tp"):
        shape = (1, size) if layout == "tp" else (2, size // 2)
        mesh = mesh_of(*shape, names=("data", "tensor"))
        tensor_parallel(model, mesh["tensor"])
        if layout == "fsdp_tp":
            fully_shard(model, mesh=mesh["data"])
    groups = disco.param_groups(model, lr=2**-5)
    options: dict[str, Any] = {"momentum": 0.9, "orthogonalize": "newton_schulz"}
    optimizer = disco.Scion(groups, **options) if size == 0 else disco.Disco(groups, replicas=replicas, **options)
    return wrapped, optimizer


def text() -> np.ndarray:
    return np.frombuffer(corpus.text()[:400_000], dtype=np.uint8)


def train(model: Any, optimizer: Any, first: int, last: int, part: int = 0, parts: int = 1) -> list[float]:
    """Losses of steps ``first`` to ``last`` on this data rank's part of each batch."""
    data, losses = text(), []
    for step in range(first, last):
        starts = np.random.default_rng(step).integers(0, len(data) - CONTEXT - 1, ROWS)[part::parts]
        rows = np.stack([data[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def data_part(layout: str, rank: int, size: int) -> tuple[int, int]:
    """Which part of the batch a rank trains on: tensor-parallel ranks share one."""
    parts = {"tp": 1, "fsdp_tp": 2}.get(layout, size)
    return (rank * parts // size, parts)


def run(rank: int, size: int, layout: str, steps: int) -> list[float]:
    model, optimizer = build(layout, size)
    losses = torch.tensor(train(model, optimizer, 0, steps, *data_part(layout, rank, size)), dtype=torch.float64)
    dist.all_reduce(losses)
    return (losses / size).tolist()


def end(losses: list[float]) -> float:
    return float(np.mean(losses[-10:]))


_spread: dict[tuple[int, int], list[float]] = {}


def spread(steps: int, count: int) -> list[float]:
    """Final losses of single-process runs with ``Scion`` whose inits differ by 1e-7."""
    key = (steps, count)
    if key not in _spread:
        _spread[key] = [end(train(*build("single", 0, noise), 0, steps)) for noise in range(1, count + 1)]
    return _spread[key]


LAYOUTS = [(2, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (2, "tp"), (4, "tp"), (4, "fsdp_tp")]


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_ends_within_the_spread_of_single_process_runs(world, size, layout, request):
    full = request.config.getoption("--full")
    steps, count = (200, 10) if full else (60, 4)
    ends = spread(steps, count)
    width = max(ends) - min(ends)  # one more run lies outside that of ten in two of eleven cases; hence the margin
    for losses in world(size).run(run, layout, steps, timeout=300):
        assert min(ends) - width - 1e-5 <= end(losses) <= max(ends) + width + 1e-5, (end(losses), ends)
        assert end(losses) < losses[0] - 1.0


def first_half(rank: int, size: int, layout: str, folder: str, steps: int) -> None:
    model, optimizer = build(layout, size)
    train(model, optimizer, 0, steps, *data_part(layout, rank, size))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder)


def second_half(rank: int, size: int, layout: str, folder: str, steps: int) -> list[float]:
    model, optimizer = build(layout, size)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    part = data_part(layout, rank, size)
    losses = torch.tensor(train(model, optimizer, steps, 2 * steps, *part), dtype=torch.float64)
    dist.all_reduce(losses)
    return (losses / size).tolist()


@pytest.mark.parametrize("after", [4, 1])
def test_resumes_after_a_change_of_world_size(world, tmp_path: Path, after, request):
    steps, count = (100, 10) if request.config.getoption("--full") else (30, 4)
    world(2).run(first_half, "fsdp", str(tmp_path), steps, timeout=300)
    ends = spread(2 * steps, count)
    width = max(ends) - min(ends)
    for losses in world(after).run(second_half, "fsdp", str(tmp_path), steps, timeout=300):
        assert min(ends) - width - 1e-5 <= end(losses) <= max(ends) + width + 1e-5, (end(losses), ends)
