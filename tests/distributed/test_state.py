"""State, wrappers and helpers of torch around ``Disco``: FSDP2, checkpoints at another world size, scaler, clipping."""

import copy
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from meshes import mesh_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import disco


class Net(nn.Module):
    """An embedding, two hidden layers with biases, one of uneven size, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.lm_head = nn.Linear(12, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(torch.relu(self.up(self.emb(tokens)))))


def build(layout: str) -> nn.Module:
    torch.manual_seed(0)
    model = disco.init_(Net())
    size = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "fsdp":
        fully_shard(model, mesh=mesh_of(size))
    elif layout == "hsdp":
        fully_shard(model, mesh=mesh_of(2, size // 2, names=("replicate", "shard")))
    elif layout in ("tp", "fsdp_tp"):
        shape = (1, size) if layout == "tp" else (2, size // 2)
        mesh = mesh_of(*shape, names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if layout == "fsdp_tp":
            fully_shard(model, mesh=mesh["data"])
    return model


def optimizer_for(model: nn.Module, **options: Any) -> Any:
    overrides = {"emb.weight": {"rule": "adamw"}}
    groups = disco.param_groups(model, ratios={"output": 0.5}, overrides=overrides)
    cls = options.pop("cls", disco.Disco)
    return cls(groups, momentum=0.9, weight_decay=0.01, orthogonalize="svd", **options)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Every data rank sees the same batch, so the mean gradient is that of one process."""
    for step in range(first, last):
        tokens = torch.randint(11, (64,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: problems.whole(param).clone() for name, param in model.named_parameters()}


def trained(rank: int, size: int, layout: str, steps: int) -> dict[str, torch.Tensor]:
    model = build(layout)
    train(model, optimizer_for(model), 0, steps)
    return weights(model)


def reference(steps: int) -> dict[str, torch.Tensor]:
    model = build("single")
    train(model, optimizer_for(model, cls=disco.Scion), 0, steps)
    return weights(model)


@pytest.mark.parametrize(
    ("size", "layout"), [(1, "fsdp"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (2, "tp"), (4, "tp"), (4, "fsdp_tp")]
)
def test_wrapped_models_train_as_one_process(world, size, layout):
    expected = reference(5)
    for found in world(size).run(trained, layout, 5):
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def saved(rank: int, size: int, layout: str, folder: str) -> list[str]:
    model = build(layout)
    optimizer = optimizer_for(model)
    train(model, optimizer, 0, 3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return sorted(optimizer_state["state"])


def resumed(rank: int, size: int, layout: str, folder: str) -> dict[str, torch.Tensor]:
    model = build(layout)
    optimizer = optimizer_for(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, 3, 6)
    return weights(model)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "fsdp"), (4, "fsdp")), ((4, "fsdp"), (1, "fsdp")), ((2, "fsdp"), (2, "tp")), ((4, "fsdp_tp"), (2, "fsdp"))],
)
def test_checkpoint_loads_at_another_size_and_layout(world, tmp_path: Path, before, after):
    keys = world(before[0]).run(saved, before[1], str(tmp_path))
    assert all(key == keys[0] for key in keys)
    expected = reference(6)
    for found in world(after[0]).run(resumed, after[1], str(tmp_path)):
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted, rtol=5e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_state_dict_is_that_of_scion_and_loads_into_it():
    model = build("single")
    optimizer = optimizer_for(model)
    train(model, optimizer, 0, 3)
    twin = copy.deepcopy(model)
    other = optimizer_for(twin, cls=disco.Scion)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, 5)
    train(twin, other, 3, 5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_zero_gradients_and_rate_change_nothing():
    model = build("single")
    optimizer = optimizer_for(model)
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, value in weights(model).items():
        assert torch.equal(value, before[name])


def clipped(rank: int, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = build("fsdp")
    optimizer = optimizer_for(model)
    tokens = torch.arange(11)
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm), weights(model)


def test_clipping_works_as_with_torch_optimizers(world):
    model = build("single")
    optimizer = optimizer_for(model, cls=disco.Scion)
    tokens = torch.arange(11)
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    wanted = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    optimizer.step()
    for norm, found in world(2).run(clipped):
        assert norm == pytest.approx(wanted, rel=1e-5)
        for name, value in weights(model).items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_gradient_scaler_unscales_and_skips_overflow():
    model, twin = build("single"), build("single")
    optimizer, other = optimizer_for(model), optimizer_for(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    tokens = torch.arange(11)
    scaler.scale(nn.functional.cross_entropy(model(tokens), tokens)).backward()
    nn.functional.cross_entropy(twin(tokens), tokens).backward()
    scaler.step(optimizer)
    scaler.update()
    other.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = weights(model)
    optimizer.zero_grad()
    (scaler.scale(nn.functional.cross_entropy(model(tokens), tokens)) * float("inf")).backward()
    scaler.step(optimizer)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name])


def test_momentum_dtype_and_groups_added_later():
    model = build("single")
    groups = disco.param_groups(model)
    optimizer = disco.Disco(groups[:1], momentum=0.9, momentum_dtype=torch.bfloat16)
    optimizer.add_param_group(groups[1])
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert {optimizer.state[param]["momentum"].dtype for param in params} == {torch.bfloat16}
    assert len(params) == len(groups[0]["params"]) + len(groups[1]["params"])


def test_schedulers_set_the_rate_of_each_group():
    model = build("single")
    optimizer = optimizer_for(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 0, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in rates]


def norms(rank: int, size: int, layout: str, which: str | None, of: str) -> dict[str, float]:
    model = build(layout)
    optimizer = optimizer_for(model, keep_updates=True)
    train(model, optimizer, 0, 2)
    return optimizer.norms(which, of)


NORMS = [None, "rms_to_inf", "one_to_rms", "one_to_inf", "rms_to_rms", "frobenius", "max_abs", "stable_rank"]


@pytest.mark.parametrize("of", ["weights", "updates", "momentum"])
@pytest.mark.parametrize(("size", "layout"), [(2, "fsdp"), (4, "hsdp"), (4, "fsdp_tp")])
@pytest.mark.parametrize("which", NORMS)
def test_norms_are_those_of_one_process(world, size, layout, which, of):
    model = build("single")
    optimizer = optimizer_for(model, cls=disco.Scion, keep_updates=True)
    train(model, optimizer, 0, 2)
    expected = optimizer.norms(which, of)
    assert expected
    for found in world(size).run(norms, layout, which, of):
        assert found == pytest.approx(expected, rel=1e-3 if "rank" in str(which) else 2e-4)
