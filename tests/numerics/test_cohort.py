"""Runs trained together leave the records that they leave alone: numbers, fates, checkpoints, amount of work."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from disco.errors import UserError
from disco.runs.reader import Run, read_run
from disco.runs.schema import Outcome, deterministic
from disco.train import checkpoint
from disco.train.cohort import Program
from disco.train.config import DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig, cohort_key
from disco.train.data import prepare
from disco.train.loop import train, train_cohort

BATCH = 128
NAMES = ("scion", "adamw", "muon")


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "sums.txt"
    path.write_text(
        "\n".join(f"{7919 * i * i % 997} and {i % 89} make {7919 * i * i % 997 + i % 89}." for i in range(9000))
    )
    return str(path)


def base(text: str, folder: Path, steps: int, **changes: Any) -> TrainConfig:
    settings = {
        "model": ModelConfig(width=16, depth=2, head_size=8, context=32),
        "data": DataConfig(source=(text,), valid_tokens=512),
        "batch": BATCH,
        "horizon": steps * BATCH,
    }
    config = TrainConfig(**(settings | changes))
    return replace(config, data=prepare(config.data, folder / "data"))


def optimizer(name: str, member: int) -> OptimizerConfig:
    """Settings that no two members share; every third has no momentum, every second decays its weights."""
    changes: dict[str, Any] = {"lr": 2.0 ** (-6 - member / 4), "ratios": {"hidden": 2.0 ** -(member % 3), "input": 1.5}}
    changes["weight_decay"] = 0.1 * (member % 2)
    if name != "adamw":
        changes["momentum"] = 0.45 * (member % 3)
    if name != "scion":
        changes["betas"] = (0.8 + 0.01 * member / 4, 0.95 + 0.001 * member)
    return OptimizerConfig(name=name, **changes)  # type: ignore[arg-type]


def members(start: TrainConfig, name: str, count: int) -> list[TrainConfig]:
    """Runs of a cohort; every fourth has another seed."""
    return [replace(start, optimizer=optimizer(name, i), seed=int(i % 4 == 3)) for i in range(count)]


def lines(folder: Path, config: TrainConfig) -> list[dict[str, Any]]:
    text = (folder / config.id / "metrics.jsonl").read_text()
    return [deterministic(json.loads(line)) for line in text.splitlines()]


def assert_alike(mine: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    assert [line.keys() for line in mine] == [line.keys() for line in other]
    for a, b in zip(mine, other, strict=True):
        for key in a.keys() - {"loss/train_std"}:  # a difference of losses that are alike
            assert a[key] == pytest.approx(b[key], rel=tolerance), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, 8, pytest.param(32, marks=pytest.mark.full)])
def test_five_steps_together_are_five_steps_alone(text: str, tmp_path: Path, name: str, count: int) -> None:
    configs = members(base(text, tmp_path, 5), name, count)
    ended = train_cohort(configs, tmp_path / "together")
    assert ended == dict.fromkeys((config.id for config in configs), Outcome.FINISHED)
    for config in configs:
        train(config, tmp_path / "alone")
        assert_alike(lines(tmp_path / "together", config), lines(tmp_path / "alone", config), 1e-5)
        written, alone = (
            json.loads((tmp_path / where / config.id / "config.json").read_text()) for where in ("together", "alone")
        )
        assert written == alone


@pytest.mark.full  # compiles for several shapes
def test_a_compiled_cohort_leaves_the_records_of_runs_alone(text: str, tmp_path: Path) -> None:
    configs = members(base(text, tmp_path, 40), "muon", 4)
    configs[2] = replace(configs[2], optimizer=replace(configs[2].optimizer, lr=1.9e38))
    train_cohort(configs, tmp_path / "together", compiled=True)
    for config in configs:
        train(config, tmp_path / "alone")
        mine, alone = (read_run(tmp_path / where / config.id) for where in ("together", "alone"))
        assert mine.outcome == alone.outcome
        np.testing.assert_allclose(mine.column("loss/train"), alone.column("loss/train"), rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_member_that_diverges_leaves_and_the_others_go_on(text: str, tmp_path: Path, name: str) -> None:
    configs = members(base(text, tmp_path, 40), name, 4)
    doomed = replace(configs[1], optimizer=replace(configs[1].optimizer, lr=1.9e38))
    configs[1] = doomed
    order: list[str] = []
    ended = train_cohort(configs, tmp_path / "together", ended=lambda run, _: order.append(run))
    assert order[0] == doomed.id
    assert [ended[config.id] for config in configs] == [Outcome.FINISHED, Outcome.DIVERGED, *[Outcome.FINISHED] * 2]
    for config in configs:
        train(config, tmp_path / "alone")
        mine, alone = (read_run(tmp_path / where / config.id) for where in ("together", "alone"))
        assert mine.summary is not None
        assert alone.summary is not None
        assert mine.summary["step"] == alone.summary["step"]
        assert mine.summary["reason"] == alone.summary["reason"]
        np.testing.assert_allclose(mine.column("loss/train"), alone.column("loss/train"), rtol=2e-4)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, 8, 32])
def test_two_hundred_steps_stay_within_the_spread_of_rounding(text: str, tmp_path: Path, name: str, count: int) -> None:
    configs = members(base(text, tmp_path, 200), name, count)
    leaver = replace(configs[-1], optimizer=replace(configs[-1].optimizer, lr=1.9e38))
    train_cohort([*configs[:-1], leaver], tmp_path / "together")
    config = configs[0]
    solo = [read(tmp_path / f"alone{i}", config, disturb=i) for i in range(10)]
    together = read_run(tmp_path / "together" / config.id)
    for key in ("loss/train", "loss/valid", "norm/weights/rms_to_inf/output"):
        runs = np.array([run.column(key)[-3:].mean() for run in solo])
        far = np.abs(runs[:, None] - runs).max()
        assert abs(together.column(key)[-3:].mean() - runs.mean()) <= far + 1e-6 * abs(runs.mean()), key


def read(folder: Path, config: TrainConfig, disturb: int) -> Run:
    """A run alone whose initial weights differ by 1e-7, relatively; made through its first checkpoint."""

    def stop(step: int, tokens: int) -> None:
        raise StoppedError

    program = Program([config])
    program.initialise(0)
    generator = torch.Generator().manual_seed(disturb)
    with torch.no_grad():
        for parameter in program.model.parameters():
            parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(StoppedError):
        train(config, folder, stop)
    latest = folder / config.id / "checkpoints" / checkpoint.LATEST
    first = json.loads((folder / config.id / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    offset = len((folder / config.id / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    saved = checkpoint.load(latest)
    assert saved is not None
    state = {"step": 0, "path": 0.0, "losses": torch.zeros(0, dtype=torch.float64), "alarm": 0, "wall": 0.0}
    checkpoint.save(latest, {"schema": saved["schema"], "offset": offset, "state": state, **program.state(0)})
    train(config, folder)
    return read_run(folder / config.id)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_products_does_not_grow_with_the_members(text: str, tmp_path: Path, name: str) -> None:
    def products(count: int) -> int:
        configs = members(base(text, tmp_path, 4), name, count)
        program = Program(configs)
        for index in range(count):
            program.initialise(index)
        tokens = torch.randint(256, (count, 4, 32), generator=torch.Generator().manual_seed(0))
        with profile(activities=[ProfilerActivity.CPU]) as found:
            program.set_rates(1.0)
            program.model.loss(tokens, tokens).sum().backward()
            program.optimizer.step()
        gemms = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
        return sum(event.count for event in found.key_averages() if event.key in gemms)

    assert products(2) == products(8) == products(32) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [3, 25, 39])
def test_a_cohort_interrupted_anywhere_resumes_bit_for_bit(text: str, tmp_path: Path, name: str, stop: int) -> None:
    configs = members(base(text, tmp_path, 40), name, 5)
    configs[2] = replace(configs[2], optimizer=replace(configs[2].optimizer, lr=1.9e38))  # leaves at the first steps
    train_cohort(configs, tmp_path / "whole")

    def progress(step: int, tokens: int) -> None:
        if step == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_cohort(configs, tmp_path / "cut", progress)
    train_cohort(configs, tmp_path / "cut")
    for config in configs:
        assert lines(tmp_path / "cut", config) == lines(tmp_path / "whole", config)


def test_killed_between_the_checkpoints_of_two_members(text: str, tmp_path: Path) -> None:
    """Some members have saved the new step, others the one before: all go on from the last that they share."""
    configs = members(base(text, tmp_path, 40, checkpoint_seconds=1e-9), "scion", 4)
    train_cohort(configs, tmp_path / "whole")
    rotate, stops = checkpoint.rotate, []
    for saved in range(5):
        folder = tmp_path / f"cut{saved}"
        rotated: list[Path] = []

        def failing(where: Path, content: dict[str, Any], count: int = saved, seen: list[Path] = rotated) -> None:
            if int(content["state"]["step"]) == 20 and len(seen) >= count:
                raise StoppedError
            seen += [where] * (int(content["state"]["step"]) == 20)
            rotate(where, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "rotate", failing)
            if saved < 4:
                with pytest.raises(StoppedError):
                    train_cohort(configs, folder)
            else:
                train_cohort(configs, folder)
        steps: list[int] = []
        train_cohort(configs, folder, lambda step, tokens, steps=steps: steps.append(step))  # type: ignore[misc]
        stops.append(steps[0] if steps else None)
        for config in configs:
            assert lines(folder, config) == lines(tmp_path / "whole", config)
    assert stops == [20, 20, 20, 20, None]


def test_members_at_different_steps_train_apart(text: str, tmp_path: Path) -> None:
    start = base(text, tmp_path, 16)
    configs = members(start, "scion", 3)
    for _ in range(2):  # twice, so that there are two checkpoints
        train_cohort([replace(config, horizon=8 * BATCH) for config in configs[:2]], tmp_path)
        start = replace(start, horizon=16 * BATCH)
    steps: list[int] = []
    train_cohort(configs, tmp_path, lambda step, tokens: steps.append(step))
    assert steps == [*range(1, 17), *range(9, 17)]
    assert all(read_run(tmp_path / config.id).tokens == 16 * BATCH for config in configs)


def test_decay_branches_leave_their_parents_together(text: str, tmp_path: Path) -> None:
    parents = [replace(config, keep=(16 * BATCH,)) for config in members(base(text, tmp_path, 16), "muon", 3)]
    train_cohort(parents, tmp_path / "together")
    schedule = ScheduleConfig(decay=0.5)
    branches = [replace(parent, parent=parent.id, schedule=schedule, horizon=32 * BATCH, keep=()) for parent in parents]
    assert len({cohort_key(branch) for branch in branches}) == 1
    steps: list[int] = []
    train_cohort(branches, tmp_path / "together", lambda step, tokens: steps.append(step))
    assert steps == list(range(17, 33))
    for parent, branch in zip(parents, branches, strict=True):
        train(parent, tmp_path / "alone")
        train(branch, tmp_path / "alone")
        assert_alike(lines(tmp_path / "together", branch), lines(tmp_path / "alone", branch), 1e-4)


def test_a_damaged_checkpoint_stops_its_own_run_only(text: str, tmp_path: Path) -> None:
    configs = members(base(text, tmp_path, 12), "scion", 3)
    whole = tmp_path / "whole"
    train_cohort(configs, whole)
    shutil.copytree(whole, tmp_path / "damaged")
    (tmp_path / "damaged" / configs[1].id / "checkpoints" / checkpoint.LATEST).write_bytes(b"?")
    longer = [replace(config, horizon=24 * BATCH) for config in configs]
    ended = train_cohort(longer, tmp_path / "damaged")
    assert isinstance(ended[configs[1].id], UserError)
    assert "damaged" in str(ended[configs[1].id])
    assert ended[configs[0].id] == ended[configs[2].id] == Outcome.FINISHED


def test_runs_that_differ_in_more_are_refused(text: str, tmp_path: Path) -> None:
    start = base(text, tmp_path, 4)
    with pytest.raises(ValueError, match="2 runs that differ"):
        train_cohort([start, replace(start, horizon=8 * BATCH)], tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        train_cohort([], tmp_path)
    alike = replace(start, seed=5, keep=(BATCH,), optimizer=replace(start.optimizer, lr=0.5, momentum=0.5))
    assert cohort_key(alike) == cohort_key(start)
    assert cohort_key(replace(start, batch=64)) != cohort_key(start)


def test_one_seed_reads_its_blocks_once(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from disco.train.data import TokenStream

    asked: list[int] = []
    batch = TokenStream.batch

    def counted(self: TokenStream, step: int, tokens: int, **part: int) -> Any:
        asked.append(step)
        return batch(self, step, tokens, **part)

    monkeypatch.setattr(TokenStream, "batch", counted)
    train_cohort(members(base(text, tmp_path, 6), "scion", 3), tmp_path / "one")
    assert asked == list(range(6))
    train_cohort(members(base(text, tmp_path, 6), "scion", 4), tmp_path / "two")  # the fourth has another seed
    assert asked[6:] == [step for step in range(6) for _ in range(2)]
    assert math.isfinite(read_run(tmp_path / "two" / members(base(text, tmp_path, 6), "scion", 4)[3].id).tokens)
