"""Ways to run ``Disco`` that change where its state lies or how it computes: light mode, offload, compilation."""

from typing import Any

import problems
import pytest
import test_state
import torch
from meshes import mesh_of
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import disco


def optimizer_for(model: nn.Module, cls: Any = disco.Disco, **options: Any) -> Any:
    groups = disco.param_groups(model, ratios={"output": 0.5}, overrides={"emb.weight": {"rule": "adamw"}})
    return cls(groups, **{"momentum": 0.9, "weight_decay": 0.01, "orthogonalize": "svd"} | options)


def trained(rank: int, size: int, layout: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = test_state.build(layout)
    test_state.train(model, optimizer_for(model, **options), 0, 5)
    return test_state.weights(model)


def reference(**options: Any) -> dict[str, torch.Tensor]:
    model = test_state.build("single")
    test_state.train(model, optimizer_for(model, disco.Scion, **options), 0, 5)
    return test_state.weights(model)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("size", "layout"), [(1, "fsdp"), (2, "fsdp"), (4, "hsdp"), (2, "tp"), (4, "fsdp_tp")])
def test_light_mode_is_the_same_step(world, size, layout):
    expected = reference()
    for found in world(size).run(trained, layout, {"light": True}):
        assert_close(found, expected)


def clipped(rank: int, size: int, layout: str) -> str:
    model = test_state.build(layout)
    optimizer = optimizer_for(model, light=True)
    test_state.train(model, optimizer, 0, 1)
    nn.functional.cross_entropy(model(torch.arange(11)), torch.arange(11)).backward()
    for param in model.parameters():  # torch cannot clip plain and distributed ones together
        nn.utils.clip_grad_norm_(param, 0.01)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_light_mode_refuses_clipped_gradients(world, layout):
    for message in world(2).run(clipped, layout):
        assert "light mode keeps the momentum in .grad" in message


def offloaded(rank: int, size: int) -> tuple[set[str], dict[str, torch.Tensor]]:
    model = test_state.build("single")
    fully_shard(model, mesh=mesh_of(size), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = optimizer_for(model)
    test_state.train(model, optimizer, 0, 5)
    devices = {value.device.type for state in optimizer.state.values() for value in state.values()}
    return devices, test_state.weights(model)


def test_offloaded_parameters_keep_their_state_beside_them(world):
    expected = reference()
    for devices, found in world(2).run(offloaded):
        assert devices == {"cpu"}
        assert_close(found, expected)


HIDDEN = {"norm": "rms_to_rms"}
MATRICES: problems.Problem = [("wide", (64, 160), HIDDEN), ("square", (24, 24), HIDDEN), ("long", (64, 1024), HIDDEN)]
"""The last is cut along its long side, so that its route is gram."""


def compiled(rank: int, size: int, problem: problems.Problem) -> tuple[dict[str, torch.Tensor], str, int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mesh = mesh_of(size)

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(int(name == "long"))])

    changes, optimizer = problems.steps(disco.Disco, problem, place, compile=True)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return changes, optimizer.describe(), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("problem", [MATRICES[-1:], pytest.param(MATRICES, marks=pytest.mark.full)], ids=len)
def test_compiled_orthogonalisation_is_the_same(world, problem):
    expected, _ = problems.steps(disco.Scion, problem, lambda name, t: t)
    ranks = world(2).run(compiled, problem, timeout=300)
    assert sum(graphs for *_, graphs in ranks) == len(problem)  # at the owner of each
    for changes, plan, _ in ranks:
        assert "long 64x1024: gram" in plan
        for name, change in changes.items():
            assert (change - expected[name]).norm() <= 5e-4 * expected[name].norm(), name
