"""Scion: growth bound, momentum, decay, AdamW groups, light mode, state dicts, misuse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disco import Scion, norm, param_groups


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drive(optimizer: Scion, params: list[Tensor], steps: int, seed: int = 0) -> None:
    """Steps with gradients that come from backward()."""
    for step in range(steps):
        optimizer.zero_grad()
        sum((p * random(*p.shape, seed=seed + 100 * step + i)).sum() for i, p in enumerate(params)).backward()
        optimizer.step()


def one(shape: tuple[int, ...] = (6, 4), kind: str = "rms_to_rms", **settings: Any) -> tuple[nn.Parameter, Scion]:
    param = nn.Parameter(random(*shape, seed=9))
    return param, Scion([{"params": [param], "norm": kind}], **{"lr": 0.1, "orthogonalize": "svd", **settings})


@pytest.mark.parametrize("method", ["svd", "newton_schulz", "polar_express"])
@pytest.mark.parametrize("kind", ["one_to_rms", "rms_to_rms", "rms_to_inf", "one_to_inf"])
def test_norm_grows_by_at_most_lr_times_maximum(method: str, kind: str) -> None:
    param, optimizer = one(kind=kind, orthogonalize=method, momentum=0.5)
    operator = norm(kind, orthogonalize=method)
    start, eta = float(operator.value(param.detach(), exact=True)), 0.1
    for k in range(1, 9):
        drive(optimizer, [param], 1, seed=k)
        assert float(operator.value(param.detach(), exact=True)) <= start + eta * k * operator.maximum + 1e-5


def test_momentum_is_the_weight_of_the_old_buffer() -> None:
    param, optimizer = one(kind="one_to_inf", momentum=0.75)
    buffer, expected = torch.zeros(6, 4), param.detach().clone()
    for step in range(4):
        gradient = random(6, 4, seed=step)
        param.grad = gradient.clone()
        optimizer.step()
        buffer = 0.75 * buffer + 0.25 * gradient
        expected -= 0.1 * buffer.sign() / 4
        torch.testing.assert_close(param.detach(), expected)


def test_nesterov_looks_one_update_ahead() -> None:
    param, optimizer = one(kind="rms_to_inf", momentum=0.5, nesterov=True)
    buffer, expected = torch.zeros(6, 4), param.detach().clone()
    for step in range(3):
        gradient = random(6, 4, seed=step)
        param.grad = gradient.clone()
        optimizer.step()
        buffer = 0.5 * buffer + 0.5 * gradient
        expected -= 0.1 * norm("rms_to_inf").lmo(0.5 * buffer + 0.5 * gradient)
        torch.testing.assert_close(param.detach(), expected)


def test_weight_decay_settles_near_one_over_lambda() -> None:
    param, optimizer = one(weight_decay=0.5)
    gradient = random(6, 4)
    for _ in range(400):
        param.grad = gradient.clone()
        optimizer.step()
    assert float(norm("rms_to_rms").value(param.detach(), exact=True)) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.95)])
def test_adamw_groups_equal_torch(betas: tuple[float, float]) -> None:
    ours, theirs = nn.Parameter(random(6, 4)), nn.Parameter(random(6, 4))
    group = {"params": [ours], "norm": "rms_to_rms", "rule": "adamw"}
    mine = Scion([group], lr=0.01, weight_decay=0.1, betas=betas, eps=1e-8)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=betas, eps=1e-8)
    for step in range(20):
        ours.grad, theirs.grad = random(6, 4, seed=step), random(6, 4, seed=step)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_scales() -> None:
    for scale, size in ((3.0, 3 * (6 / 4) ** 0.5), ("max_spectral", (6 / 4) ** 0.5), ("match_adamw_rms", 0.2 * 6**0.5)):
        param, optimizer = one(scale=scale)
        before = param.detach().clone()
        drive(optimizer, [param], 1)
        torch.testing.assert_close(torch.linalg.svdvals(before - param.detach()), torch.full((4,), 0.1 * size))


def test_tensor_learning_rate_equals_number() -> None:
    a, first = one(weight_decay=0.1)
    b, second = one(weight_decay=0.1, lr=torch.tensor(0.1))
    drive(first, [a], 3)
    drive(second, [b], 3)
    torch.testing.assert_close(a, b)


def test_adamw_groups_take_a_number_as_scale() -> None:
    steps = []
    for scale in (1.0, 0.25):
        param = nn.Parameter(random(6, 4))
        optimizer = Scion([{"params": [param], "norm": "rms_to_rms", "rule": "adamw", "scale": scale}], lr=0.1)
        before = param.detach().clone()
        drive(optimizer, [param], 2)
        steps.append(param.detach() - before)
    torch.testing.assert_close(steps[1], 0.25 * steps[0])


def test_updates_follow_a_learning_rate_for_each_run() -> None:
    rates = torch.tensor([0.1, 0.4])
    group = {"params": [nn.Parameter(random(2, 6, 4))], "norm": "rms_to_rms", "batch_dims": 1}
    optimizer = Scion([group], lr=rates, scale=2.0, orthogonalize="svd", keep_updates=True)
    (param,) = group["params"]
    before = param.detach().clone()
    drive(optimizer, [param], 1)
    update = optimizer.state[param]["update"]
    torch.testing.assert_close(before - update, param.detach())
    torch.testing.assert_close(norm("rms_to_rms", batch_dims=1).value(update), 2 * rates)


@pytest.mark.parametrize("light", [False, True])
def test_momentum_switched_on_later_starts_from_nothing(light: bool) -> None:
    param, optimizer = one(kind="one_to_inf", light=light)
    drive(optimizer, [param], 2)
    twin = nn.Parameter(param.detach().clone())
    fresh = Scion([{"params": [twin], "norm": "one_to_inf"}], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["momentum"] = 0.9
    drive(optimizer, [param], 3, seed=5)
    drive(fresh, [twin], 3, seed=5)
    torch.testing.assert_close(param, twin)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_deep_copy_steps_identically(light: bool, fresh: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = Scion(
        param_groups(model, lr=0.1),
        momentum=0.9,
        orthogonalize="newton_schulz",
        steps=3,
        keep_updates=True,
        light=light,
    )
    drive(optimizer, list(model.parameters()), 2)
    if fresh:  # a gradient that waits for its step
        model(random(5, 4)).square().sum().backward()
    twin, copied = copy.deepcopy((model, optimizer))
    if fresh and not light:  # torch copies no gradients
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
    for net, its in ((model, optimizer), (twin, copied)):
        if fresh:
            its.step()
        drive(its, list(net.parameters()), 3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert copied.norms(of="updates") == optimizer.norms(of="updates")
    copied.add_param_group({"params": [nn.Parameter(torch.ones(3))], "norm": "rms"})
    assert len(optimizer.param_groups) == len(copied.param_groups) - 1


def test_zero_gradient_and_zero_lr_change_nothing_and_missing_gradients_are_skipped() -> None:
    param, optimizer = one(lr=0.0, momentum=0.9, weight_decay=0.1)
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    param, optimizer = one()
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before)


class TestLight:
    def pair(self) -> tuple[list[Tensor], Scion]:
        params = [nn.Parameter(random(6, 4, seed=1)), nn.Parameter(random(5, seed=2)), nn.Parameter(random(3, 4))]
        groups = [
            {"params": params[:1], "norm": "rms_to_rms"},
            {"params": params[1:2], "norm": "rms"},
            {"params": params[2:], "norm": "rms_to_inf", "rule": "adamw"},
        ]
        return params, Scion(groups, lr=0.1, momentum=0.8, light=True)

    def test_equals_the_buffered_form(self) -> None:
        params, light = self.pair()
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        groups = [{**g, "params": [t]} for g, t in zip(light.param_groups, twins, strict=True)]
        full = Scion(groups, lr=0.1, momentum=0.8)
        drive(light, params, 6)
        drive(full, twins, 6)
        for ours, theirs in zip(params, twins, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert not any("momentum" in state for state in light.state.values())

    def test_momentum_survives_save_and_load(self) -> None:
        params, optimizer = self.pair()
        drive(optimizer, params, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        others, restored = self.pair()
        with torch.no_grad():
            for other, param in zip(others, params, strict=True):
                other.copy_(param)
        restored.load_state_dict(saved)
        drive(optimizer, params, 3, seed=7)
        kept = saved["state"][0]["grad"].clone()
        drive(restored, others, 3, seed=7)
        assert torch.equal(saved["state"][0]["grad"], kept)
        for ours, theirs in zip(params, others, strict=True):
            assert torch.equal(ours, theirs)

    def test_gradient_clipping_raises(self) -> None:
        params, optimizer = self.pair()
        drive(optimizer, params, 1)
        sum((p * random(*p.shape)).sum() for p in params).backward()
        nn.utils.clip_grad_norm_(params, 0.01)
        with pytest.raises(RuntimeError, match="clipping"):
            optimizer.step()

    def test_momentum_passes_between_the_modes(self) -> None:
        for light in (False, True):
            param, optimizer = one(momentum=0.8, light=light)
            drive(optimizer, [param], 3)
            other, restored = one(momentum=0.8, light=not light)
            with torch.no_grad():
                other.copy_(param)
            restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert restored.norms(of="momentum") == pytest.approx(optimizer.norms(of="momentum"), rel=1e-5)
            drive(optimizer, [param], 3, seed=7)
            drive(restored, [other], 3, seed=7)
            torch.testing.assert_close(param, other, atol=1e-5, rtol=1e-5)

    def test_norm_of_the_momentum(self) -> None:
        (param, light), (twin, full) = one(momentum=0.8, light=True), one(momentum=0.8)
        for step in range(3):
            drive(light, [param], 1, seed=step)
            drive(full, [twin], 1, seed=step)
            assert light.norms(of="momentum") == pytest.approx(full.norms(of="momentum"), rel=1e-5)
        (param * random(6, 4)).sum().backward()
        after_backward = light.norms(of="momentum")
        light.step()
        assert light.norms(of="momentum") == pytest.approx(after_backward, rel=1e-5)

    def test_saving_leaves_kept_updates_alone(self) -> None:
        param, optimizer = one(momentum=0.8, light=True, keep_updates=True)
        drive(optimizer, [param], 1)
        assert set(optimizer.state_dict()["state"][0]) == {"grad", "update"}
        assert set(optimizer.state[param]) == {"update"}
        (param * random(6, 4)).sum().backward()
        with pytest.raises(RuntimeError, match=r"saved after step\(\)"):
            optimizer.state_dict()

    def test_a_gradient_scaler_raises(self) -> None:
        params, optimizer = self.pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(sum((p * random(*p.shape)).sum() for p in params)).backward()
        with pytest.raises(RuntimeError, match="gradient scaler"):
            scaler.step(optimizer)

    @pytest.mark.parametrize("set_to_none", [False, True])
    @pytest.mark.parametrize("backward", [False, True])
    def test_zero_grad_of_the_model_raises(self, set_to_none: bool, backward: bool) -> None:
        model = nn.Linear(4, 3)
        optimizer = Scion(param_groups(model), momentum=0.8, light=True)
        drive(optimizer, list(model.parameters()), 1)
        model.zero_grad(set_to_none=set_to_none)
        if backward:
            model(random(5, 4)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"changed or dropped it.*zero_grad\(\) of the model"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_another_tensor_as_gradient_raises(self) -> None:
        param, optimizer = one(momentum=0.8, light=True)
        drive(optimizer, [param], 1)
        param.grad = random(6, 4)
        with pytest.raises(RuntimeError, match="set by hand"):
            optimizer.step()

    def test_another_momentum_raises(self) -> None:
        param, optimizer = one(momentum=0.8, light=True)
        drive(optimizer, [param], 1)
        optimizer.param_groups[0]["momentum"] = 0.5
        with pytest.raises(RuntimeError, match=r"cannot change from 0\.8 to 0\.5"):
            drive(optimizer, [param], 1)

    @pytest.mark.parametrize("momentum", [0.0, 0.8])
    def test_an_unused_parameter_waits(self, momentum: float) -> None:
        settings = {"momentum": momentum, "weight_decay": 0.1, "lr": 0.1, "orthogonalize": "svd"}
        trained = []
        for light in (False, True):
            params = [nn.Parameter(random(6, 4, seed=i)) for i in range(2)]
            optimizer = Scion([{"params": params, "norm": "rms_to_rms"}], light=light, **settings)
            for step, used in enumerate([params, params[:1], params[:1], params]):
                optimizer.zero_grad()
                sum((p * random(6, 4, seed=step)).sum() for p in used).backward()
                optimizer.step()
            trained.append(params)
        for full, light_ in zip(*trained, strict=True):
            torch.testing.assert_close(full, light_, atol=1e-5, rtol=1e-5)

    def test_gradient_accumulation_works(self) -> None:
        params, optimizer = self.pair()
        for _ in range(3):
            sum((p * random(*p.shape)).sum() for p in params).backward()
        optimizer.step()

    def test_nesterov_is_refused(self) -> None:
        with pytest.raises(ValueError, match="nesterov"):
            one(momentum=0.5, nesterov=True, light=True)


@pytest.mark.parametrize("rule", ["lmo", "adamw"])
def test_state_dict_resumes_exactly_and_exists_before_the_first_step(rule: str) -> None:
    def make() -> tuple[list[Tensor], Scion]:
        params = [nn.Parameter(random(6, 4)), nn.Parameter(random(4, 4))]
        return params, Scion([{"params": params, "norm": "rms_to_rms", "rule": rule}], lr=0.1, momentum=0.9)

    params, optimizer = make()
    keys = {k: set(v) for k, v in optimizer.state_dict()["state"].items()}
    drive(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {k: set(v) for k, v in saved["state"].items()} == keys
    others, restored = make()
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    restored.load_state_dict(saved)
    drive(optimizer, params, 3, seed=5)
    drive(restored, others, 3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_schedulers_and_closures_work() -> None:
    param, optimizer = one(kind="one_to_inf")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = param.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    assert loss.item() == pytest.approx(float((before**2).sum()))
    scheduler.step()
    optimizer.step(closure)
    assert float((param - before).detach().abs().max()) == pytest.approx((0.1 + 0.05) / 4, rel=1e-4)


def test_norms_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.Linear(6, 10))
    optimizer = Scion(param_groups(model, lr=0.1), momentum=0.5, orthogonalize="svd", keep_updates=True)
    model(torch.arange(10)).logsumexp(-1).sum().backward()
    optimizer.step()
    weights, hidden = optimizer.norms(), model[1].weight.detach()
    assert set(weights) == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}
    sigma = float(torch.linalg.svdvals(hidden)[0])
    assert weights["1.weight"] == pytest.approx(sigma * (4 / 6) ** 0.5, rel=1e-5)
    assert optimizer.norms("rms_to_inf", groups=["output"]) == {
        "2.weight": pytest.approx(float(model[2].weight.detach().norm(dim=1).max()) * 6**0.5)
    }
    assert optimizer.norms(of="updates") == pytest.approx(dict.fromkeys(weights, 0.1), rel=1e-5)
    momentum = float(torch.linalg.svdvals(optimizer.state[model[1].weight]["momentum"])[0])
    assert optimizer.norms("rms_to_rms", of="momentum")["1.weight"] == pytest.approx(momentum * (4 / 6) ** 0.5)
    with pytest.raises(ValueError, match="got 'gradients'"):
        optimizer.norms(of="gradients")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "names no norm; build groups with disco.param_groups"),
        ({"norm": "rms"}, r"parameter body: norm rms is for a vector.*\(6, 4\)"),
        ({"norm": "rms_to_l1"}, "unknown norm 'rms_to_l1'"),
        ({"norm": "rms_to_rms", "layout": "oi"}, "got 'oi'"),
        ({"norm": "rms_to_rms", "rule": "sgd"}, "got 'sgd' for body"),
        ({"norm": "rms_to_rms", "momentum": 1.0}, "got 1.0"),
        ({"norm": "rms_to_rms", "lr": -0.1}, "lr must be 0 or more, got -0.1 for body"),
        ({"norm": "rms_to_rms", "weight_decay": -1}, "weight_decay must be 0 or more"),
        ({"norm": "rms_to_rms", "scale": "muon"}, "got 'muon'"),
        ({"norm": "rms_to_rms", "rule": "adamw", "scale": "unit"}, "takes a number as scale, got 'unit' for body"),
        ({"norm": "rms_to_rms", "betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\) for body"),
        ({"norm": "rms_to_rms", "betas": (-0.1, 0.9)}, "betas must lie"),
        ({"norm": "rms_to_rms", "eps": -1e-8}, "eps must be 0 or more, got -1e-08 for body"),
        ({"norm": "rms_to_rms", "mometum": 0.5}, r"unknown keys \['mometum'\]"),
    ],
)
def test_misuse_names_the_parameter(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scion([{"params": [nn.Parameter(torch.ones(6, 4))], "names": ["body"], **group}])


def test_parameters_twice() -> None:
    param = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Scion([{"params": [param], "norm": "rms_to_rms"}, {"params": [param], "norm": "rms_to_rms"}])
