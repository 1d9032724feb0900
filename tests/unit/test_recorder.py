"""The record that any loop writes: what is in it, and that it goes on where a checkpoint left it."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disco.integrations
from disco import Scion, param_groups
from disco.errors import UserError
from disco.integrations import Recorder
from disco.integrations.record import norm_optimizer
from disco.runs.reader import Run, read_run
from disco.runs.schema import Outcome, deterministic

BATCH, STEPS = 32, 12


def optimizer_of(lr: float = 0.25, **ratios: float) -> Scion:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6, bias=False), nn.Linear(6, 8, bias=False))
    return Scion(param_groups(model, lr, ratios), momentum=0.5)


def recorder_of(folder: Path, optimizer: Any, **settings: Any) -> Recorder:
    return Recorder(folder, optimizer, batch=BATCH, horizon=STEPS * BATCH, **settings)


def steps(optimizer: Scion, recorder: Recorder, first: int, last: int, save_at: int = 0) -> Any:
    """Steps by made-up gradients, each recorded; returns what a checkpoint at ``save_at`` holds."""
    saved = None
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        recorder.record(step, loss=1 / step)
        if step == save_at:
            params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
            saved = json.loads(json.dumps(recorder.state_dict())), copy.deepcopy(optimizer.state_dict()), params
        if step % 4 == 0:
            recorder.record(step, valid=2 / step)
    return saved


def lines(run: Run) -> list[dict[str, Any]]:
    text = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [deterministic(json.loads(line)) for line in text]


def test_what_a_record_holds(tmp_path: Path) -> None:
    optimizer = optimizer_of(0.25, hidden=1 / 8)
    recorder = recorder_of(tmp_path / "one", optimizer, seed=3, model={"name": "toy", "width": 4})
    recorder.record(0, valid=2.5)
    steps(optimizer, recorder, 1, STEPS)
    norms = recorder.norms
    recorder.finish()
    run = read_run(tmp_path / "one")
    assert run.outcome == Outcome.FINISHED
    assert run.parameters == 8 * 4 + 4 * 6 + 6 * 8
    assert run.config["optimizer"] == {
        "name": "scion", "lr": 0.25, "ratios": {"input": 1.0, "hidden": 0.125, "output": 1.0},
        "momentum": 0.5, "nesterov": False, "weight_decay": 0.0, "orthogonalize": "polar_express",
    }  # fmt: skip
    assert run.config["model"] == {"name": "toy", "width": 4}
    assert run.groups == {"input": ("0",), "hidden": ("1",), "output": ("2",)}
    assert run.column("step").tolist() == list(range(STEPS + 1))
    assert run.column("path") == pytest.approx([0.25 * step for step in range(STEPS + 1)])
    assert run.column("lr/hidden").tolist() == [0.25 / 8] * (STEPS + 1)
    assert run.column("loss/train")[1:] == pytest.approx([1 / step for step in range(1, STEPS + 1)])
    valid = run.column("loss/valid")
    assert [step for step in range(STEPS + 1) if math.isfinite(valid[step])] == [0, 4, 8, 12]
    weight = optimizer.param_groups[-1]["params"][0].detach()
    rows = weight.norm(dim=1).max().item() * math.sqrt(weight.shape[1])
    assert run.norm("output", "rms_to_inf")[-1] == pytest.approx(rows, rel=1e-5)
    assert norms["norm/output/rms_to_inf"] == pytest.approx(rows, rel=1e-5)


def test_a_resumed_record_equals_an_undisturbed_one(tmp_path: Path) -> None:
    optimizer = optimizer_of()
    recorder = recorder_of(tmp_path / "whole", optimizer)
    steps(optimizer, recorder, 1, STEPS)
    recorder.finish()
    optimizer = optimizer_of()
    cut = recorder_of(tmp_path / "cut", optimizer)
    state, optimizer_state, params = steps(optimizer, cut, 1, 9, save_at=8)  # saved before the held-out loss of step 8
    del cut  # killed; step 9 was never written, and is made again
    optimizer = optimizer_of(0.5)
    with pytest.raises(UserError, match="holds a run with other settings"):
        recorder_of(tmp_path / "cut", optimizer)
    optimizer = optimizer_of()
    for param, before in zip((p for g in optimizer.param_groups for p in g["params"]), params, strict=True):
        param.data.copy_(before)
    optimizer.load_state_dict(optimizer_state)
    recorder = recorder_of(tmp_path / "cut", optimizer)
    recorder.load_state_dict(state)
    recorder.record(8, valid=2 / 8)
    steps(optimizer, recorder, 9, STEPS)
    recorder.finish()
    whole, cut_run = read_run(tmp_path / "whole"), read_run(tmp_path / "cut")
    assert lines(cut_run) == lines(whole)
    assert len(lines(whole)) == STEPS
    assert cut_run.outcome == Outcome.FINISHED


def test_what_was_recorded_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    optimizer = optimizer_of()
    recorder = recorder_of(tmp_path / "run", optimizer)
    state, *_ = steps(optimizer, recorder, 1, 9, save_at=4)
    recorder.close()
    assert read_run(tmp_path / "run").column("step")[-1] == 9
    again = recorder_of(tmp_path / "run", optimizer_of())
    again.load_state_dict(state)
    again.close()
    assert read_run(tmp_path / "run").column("step").tolist() == [1, 2, 3, 4]
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="lines were lost"):
        recorder_of(tmp_path / "run", optimizer_of()).load_state_dict(state)
    with pytest.raises(UserError, match="the checkpoint knows nothing of the record"):
        recorder_of(tmp_path / "run", optimizer_of()).load_state_dict({})


def test_the_path_follows_a_schedule(tmp_path: Path) -> None:
    optimizer = optimizer_of(0.25, output=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    recorder = recorder_of(tmp_path / "run", optimizer, lr=0.25)
    for step in range(1, 4):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        scheduler.step()
        recorder.record(step)
    recorder.close()
    run = read_run(tmp_path / "run")
    assert run.config["optimizer"]["ratios"] == {"input": 1.0, "hidden": 1.0, "output": 0.5}
    assert run.column("path") == pytest.approx([0.25, 0.25 * 1.75, 0.25 * 2.25])
    assert run.column("lr/output") == pytest.approx([0.125, 0.125 * 0.75, 0.125 * 0.5])


def test_a_loss_that_is_not_finite_ends_as_diverged(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path / "run", optimizer_of())
    recorder.record(1, loss=2.0)
    recorder.record(2, loss=math.nan)
    state = json.loads(json.dumps(recorder.state_dict()))
    recorder.load_state_dict(state)
    recorder.finish()
    run = read_run(tmp_path / "run")
    assert run.outcome == Outcome.DIVERGED
    assert run.summary is not None
    assert run.summary["reason"] == "loss/train nan at step 2"
    assert math.isnan(run.column("loss/train")[-1])


def test_where_a_fit_looks() -> None:
    from disco.integrations.record import _points

    assert _points(128, 32) == {0, 6, 7, 8, 14, 15, 16, 30, 31, 32, 62, 63, 64, 124, 126, 128}
    assert max(_points(100, 32)) == 100


def test_an_optimizer_that_is_loaded_later(tmp_path: Path) -> None:
    """torch makes new groups then."""
    optimizer = optimizer_of(0.25)
    recorder = recorder_of(tmp_path / "run", optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] /= 2
    steps(optimizer, recorder, 1, 2)
    recorder.close()
    assert read_run(tmp_path / "run").column("path").tolist() == [0.125, 0.25]


def test_rules_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    for name, pattern in {"adamw": "*", "scion and adamw": "*bias"}.items():
        groups = param_groups(model, 0.25, overrides={pattern: {"rule": "adamw"}})
        recorder_of(tmp_path / name, Scion(groups)).close()
    adamw, mixed = (read_run(tmp_path / name).config["optimizer"] for name in ("adamw", "scion and adamw"))
    assert (adamw["name"], adamw["betas"]) == ("adamw", [0.9, 0.95])
    assert "momentum" not in adamw
    assert (mixed["name"], mixed["momentum"]) == ("scion and adamw", 0.0)


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    adam = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(UserError, match=r"got AdamW; for AdamW give them groups"):
        recorder_of(tmp_path / "run", adam)
    with pytest.raises(UserError, match='has no "group"'):
        recorder_of(tmp_path / "run", Scion([{"params": [nn.Parameter(torch.ones(2, 2))], "norm": "rms_to_rms"}]))
    with pytest.raises(UserError, match="a batch above 0, got 0"):
        Recorder(tmp_path / "run", optimizer_of(), batch=0, horizon=100)
    recorder = recorder_of(tmp_path / "run", optimizer_of())
    recorder.record(3)
    with pytest.raises(ValueError, match="step 2 is recorded after step 3"):
        recorder.record(2)


def test_the_optimizer_in_a_wrapper() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    optimizer = optimizer_of()
    assert norm_optimizer(Wrapper(Wrapper(optimizer))) is optimizer


def test_names_are_loaded_on_first_use() -> None:
    code = "import sys, disco.integrations; print(*{'torch', 'transformers', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    with pytest.raises(AttributeError, match="has no attribute 'Keras'"):
        _ = disco.integrations.Keras
