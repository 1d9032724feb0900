"""What the demo does around its sweep: what is left to do, which records it fits, how it ends."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import config, write

from disco import demo
from disco.cli import main
from disco.runs.schema import METRICS
from disco.sweep.engines.local import Result
from disco.sweep.forecast import OVERHEAD, START_SECONDS, forecast_study
from disco.sweep.record import write_plan
from disco.sweep.study import Study
from disco.train.config import TrainConfig


def grid(seed: int) -> list[TrainConfig]:
    return [config(seed=seed, optimizer={"lr": float(lr)}) for lr in 2.0 ** np.arange(-6, 1)]


def record(out: Path, run: TrainConfig) -> None:
    """A finished run; with seed s the loss has its minimum at a learning rate of 2^(s - 3)."""
    loss = 4 + 0.05 * (np.log2(run.optimizer.lr) + 3 - run.seed) ** 2
    write(out, run, [{"step": 0, "loss/valid": 5.5}, {"step": 64, "loss/valid": loss}], tokens=run.horizon)


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of runs whose cohorts' speed was asked for, in a demo of seven runs whose sweep finishes what is left."""
    asked: list[str] = []

    def speeds(cohorts: Sequence[Sequence[TrainConfig]], *_: Any) -> list[float]:
        asked.extend(cohort[0].id for cohort in cohorts)
        return [2.0**14] * len(cohorts)

    def sweep(study: Study, out: Path, **_: Any) -> Result:
        write_plan(study, out)
        for run in study.runs:
            if not (out / run.id).exists():
                record(out, run)
        return Result(finished=len(study.runs), diverged=0)

    monkeypatch.setattr(demo, "load", lambda quick, seed, data, out: Study("demo", tuple(grid(seed))))
    monkeypatch.setattr(demo, "check_data", lambda study, cache: None)
    monkeypatch.setattr(demo, "forecast_study", partial(forecast_study, speeds=speeds))
    monkeypatch.setattr(demo, "run_study", sweep)
    return asked


def test_only_what_is_left_is_expected(
    tmp_path: Path, calibrated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for run in grid(0)[:4]:
        record(tmp_path, run)
    assert demo.run(out=tmp_path, workers=1, as_json=True) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (plan["runs"], plan["left"], len(calibrated)) == (7, 3, 1)  # runs of one kind are asked for once
    assert plan["seconds"] == pytest.approx(START_SECONDS + OVERHEAD * 3)  # a second of steps each
    calibrated.clear()
    assert demo.run(out=tmp_path, workers=1) == 0
    assert calibrated == []
    assert "7 runs (7 already done) in 0 cohorts, 115k tokens, 1 processes; expected: 4s" in capsys.readouterr().out


def test_other_studies_in_the_folder_are_not_fitted(
    tmp_path: Path, calibrated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        assert demo.run(out=tmp_path, seed=seed, workers=1) == 0
        (horizon,) = json.loads((tmp_path / "fit.json").read_text())["horizons"]
        assert horizon["lr"] == pytest.approx(seed - 3, abs=0.01)
        assert "7 runs (7 finished)" in (tmp_path / "report.html").read_text()


def test_the_demo_says_what_fit_and_plan_say(
    tmp_path: Path, calibrated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run(out=tmp_path, workers=1) == 0
    told = capsys.readouterr()
    runs = [str(tmp_path / each.id) for each in grid(0)]
    assert main(["fit", *runs, "-o", str(tmp_path / "again.json")]) == 0
    fit = capsys.readouterr()
    assert main(["plan", str(tmp_path / "again.json"), "--tokens", str(2 * grid(0)[0].horizon)]) == 0
    plan = capsys.readouterr()
    assert fit.out.rpartition("\nfit: ")[0] in told.out
    assert plan.out.rstrip() in told.out
    assert all(line in told.err for line in (fit.err + plan.err).splitlines())


def test_damage_is_told_at_the_end(tmp_path: Path, calibrated: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for run in grid(0):
        record(tmp_path, run)
    metrics = tmp_path / grid(0)[0].id / METRICS
    metrics.write_text(metrics.read_text() + "{\n")
    assert demo.run(out=tmp_path, workers=1) == 2
    assert f"{metrics}:3: not JSON" in capsys.readouterr().err


def test_an_interrupted_demo_answers_in_json(
    tmp_path: Path, calibrated: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Result(finished=3, diverged=0, waiting=4, signal=2)
    monkeypatch.setattr(demo, "run_study", lambda *_, **__: stopped)
    assert demo.run(out=tmp_path, workers=1, as_json=True) == 130
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (last["event"], last["waiting"], last["signal"]) == ("result", 4, 2)
