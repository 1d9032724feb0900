"""A rank that dies or hangs: the others' next call of ``Disco`` says so within the process group's timeout.

Every case has processes of its own, for their process groups are of no use afterwards.
"""

import datetime
import functools
import multiprocessing
import os
import re
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import disco
from disco.distributed import failure

TIMEOUT = 10
"""Seconds, of the default process group."""

SLACK = 60
"""Seconds that a loaded machine may take on top; torch's own timeout of mesh groups is 1800."""


def build(layout: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8, bias=False))
    if layout == "matrices":
        fully_shard(model[1], mesh=init_device_mesh("cpu", (size,)))
        return model[1]
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("outer", "inner"))
    if layout == "fsdp_tp":
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["outer"] if layout in ("fsdp", "fsdp_tp") else mesh)
    return model


def work(rank: int, size: int, rendezvous: str, started: Any, pipe: Any, case: dict[str, Any]) -> None:
    """Steps, after which the last rank is lost; sends what becomes of this rank's next call."""
    torch.set_num_threads(1)
    started.wait()
    limit = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=limit)
    model = build(case["layout"], size)
    overrides = {"weight": {"norm": "rms_to_rms"}} if case["layout"] == "matrices" else {}
    optimizer = disco.Disco(disco.param_groups(model, overrides=overrides), momentum=0.9)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(case["steps"]):
        optimizer.step()
    if rank == size - 1:
        if case["fate"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.recv()  # hangs until the test ends it
    start = time.monotonic()
    try:
        getattr(optimizer, case["call"])()
        pipe.send(None)
    except Exception as error:
        cause = error.__cause__
        pipe.send((type(error), str(error), type(cause), str(cause), time.monotonic() - start))


Answer = tuple[type, str, type, str, float] | None


def survivors(size: int, folder: Path, **case: Any) -> list[Answer]:
    """What the other ranks sent; they must also end."""
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(size)
    processes, pipes = [], []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, str(folder / "rendezvous"), started, theirs, case)
            processes.append(context.Process(target=work, args=args, daemon=True))
            processes[-1].start()
            pipes.append(ours)
            theirs.close()
        answers = []
        deadline = time.monotonic() + 2 * SLACK + TIMEOUT
        for rank, pipe in enumerate(pipes[:-1]):
            assert wait([pipe], max(0.0, deadline - time.monotonic())), f"rank {rank} hangs"
            answers.append(pipe.recv())
        for rank, process in enumerate(processes[:-1]):
            process.join(SLACK)
            assert process.exitcode is not None, f"rank {rank} does not end"
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()


full = functools.partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("size", "layout", "fate", "steps", "call", "what"),
    [
        (2, "fsdp", "killed", 0, "step", r"the comparison of the ranks' plans among ranks 0, 1"),
        (2, "fsdp", "hangs", 2, "step", r"the sums over shards among ranks 0, 1"),
        (2, "matrices", "killed", 2, "step", r"the gathering of weight among ranks 0, 1"),
        (4, "fsdp_tp", "hangs", 2, "step", r"the .* among ranks \d, \d"),
        full(2, "matrices", "hangs", 2, "norms", r"the measurement of norms among ranks 0, 1"),
        full(4, "fsdp_tp", "killed", 2, "step", r"the .* among ranks \d, \d"),
        full(4, "hsdp", "hangs", 2, "step", r"the .* among ranks \d, \d"),
    ],
)
def test_a_lost_rank_is_named_in_time(tmp_path, size, layout, fate, steps, call, what):
    for answer in survivors(size, tmp_path, layout=layout, fate=fate, steps=steps, call=call):
        assert answer is not None, "the call ended as if all ranks were there"
        kind, message, cause, reason, seconds = answer
        assert kind is RuntimeError
        assert re.match(f"Disco failed at {what}", message), message
        assert f"has died, has stopped with an error, or has not joined within the {TIMEOUT} s" in message
        assert issubclass(cause, RuntimeError)
        assert ("Timed out" in reason or "Connection" in reason) if fate == "hangs" else "Connection" in reason
        assert seconds <= TIMEOUT + SLACK


def forming(rank: int, size: int) -> str:
    error = RuntimeError("Wait timeout")
    with pytest.raises(RuntimeError, match="Disco failed at") as caught, failure.explained("a test", members=range(12)):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_the_ranks_of_a_large_group_are_counted(world):
    (message,) = world(1).run(forming)
    assert "a test among ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more: one of them has died" in message
    assert "within the 30 s of the process group's timeout" in message


def bounds(rank: int, size: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    outer, inner = mesh.get_group("outer"), mesh.get_group("inner")
    inner.set_timeout(datetime.timedelta(seconds=7))
    before = failure.timeout(outer)
    layer = nn.Linear(4, 4)
    fully_shard(layer, mesh=mesh)
    disco.Disco(disco.param_groups(layer))
    return [before, failure.timeout(outer), failure.timeout(inner), failure.timeout()]


def test_groups_of_meshes_wait_no_longer_than_the_default_group(world):
    for before, outer, inner, default in world(4).run(bounds):
        assert before == datetime.timedelta(minutes=30)
        assert outer == default < before
        assert inner == datetime.timedelta(seconds=7)
