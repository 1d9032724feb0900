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


def accumulated(rank: int, size: int, parts: int) -> dict[str, torch.Tensor]:
    model = test_state.build("fsdp")
    optimizer = optimizer_for(model)
    for step in range(3):
        for tokens in torch.randint(11, (64,), generator=torch.Generator().manual_seed(step)).chunk(parts):
            (nn.functional.cross_entropy(model(tokens), (tokens + 1) % 11) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return test_state.weights(model)


def test_accumulated_gradients_are_those_of_the_whole_batch(world):
    whole, parts = (world(2).run(accumulated, count)[0] for count in (1, 4))
    assert_close(parts, whole)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body, self.lm_head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.relu(self.body(self.emb(tokens))))


def tied(rank: int, size: int, sharded: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    torch.manual_seed(0)
    model = disco.init_(Tied())
    if sharded:
        fully_shard(model, mesh=mesh_of(size))
    groups = disco.param_groups(model)
    optimizer = (disco.Disco if sharded else disco.Scion)(groups, momentum=0.9, orthogonalize="svd")
    test_state.train(model, optimizer, 0, 5)
    return test_state.weights(model), groups.layers()["output"]


def test_tied_embeddings_step_once_as_the_output_layer(world):
    expected, _ = tied(0, 1, sharded=False)
    for found, output in world(2).run(tied, True):
        assert output == ["emb"]
        assert_close(found, expected)
