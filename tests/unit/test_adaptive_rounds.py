"""The rounds of an adaptive study on made-up records: journal, resumption, budget, several scans, trouble."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import write
from test_study import prepare

from disco.errors import UserError
from disco.runs.schema import Outcome
from disco.sweep.adaptive.rounds import ROUNDS, Entry, read_rounds, run_rounds, scans
from disco.sweep.engines.local import Result
from disco.sweep.study import Study, build_study
from disco.train.config import TrainConfig
from disco.train.schedule import evaluation_points

MODEL = {"width": 16, "depth": 1, "head_size": 8, "context": 64}
BASE = {"horizon": 2**15, "model": MODEL, "data": {"valid_tokens": 1024}}
AXES = {"batch": [64, 128, 256], "lr": {"from": "2^-6", "to": "2^-2", "step": 2}}


def study(adaptive: Any = True, axes: dict[str, Any] = AXES, **base: Any) -> Study:
    return build_study({"name": "s", "base": BASE | base, "axes": axes, "adaptive": adaptive}, prepare)


class Trainer:
    """Trains by formula; ``fails_after`` runs it is killed, once."""

    def __init__(self, out: Path, fails_after: int | None = None, longest: int = 0) -> None:
        self.out, self.left, self.longest = out, fails_after, longest
        self.trained: list[tuple[str, int]] = []

    def __call__(self, plan: Study) -> Result:
        for config in plan.configs:
            summary = self.out / config.id / "summary.json"
            done = json.loads(summary.read_text())["tokens"] if summary.exists() else 0
            if done < config.horizon:
                if self.left == 0:
                    self.left = None
                    raise KeyboardInterrupt
                self.left = None if self.left is None else self.left - 1
                self._train(config)
        return Result(finished=len(plan.configs), diverged=0)

    def _train(self, config: TrainConfig) -> None:
        config = dataclasses.replace(config, horizon=max(config.horizon, self.longest))
        self.trained.append((config.id, config.horizon))
        lines = [{"step": p.step, "path": 0.0} | self._loss(config, p.step) for p in evaluation_points(config)]
        write(self.out, config, lines, Outcome.FINISHED, tokens=config.horizon)

    @staticmethod
    def _loss(config: TrainConfig, step: int) -> dict[str, float]:
        rate, batch = math.log2(config.optimizer.lr), math.log2(config.batch)
        tokens = math.log2(max(step, 1) * config.batch)
        off = rate - (-4 + 0.5 * (batch - 7) - 0.4 * (tokens - 12)) - (1.0 if config.model.width > 16 else 0.0)
        wiggle = 0.002 * math.sin(37 * rate + 11 * batch + 0.3 * tokens)
        return {"loss/valid": 2 + 0.5 * 2 ** (-0.4 * (tokens - 12)) + 0.02 * (batch - 7) ** 2 + 0.03 * off**2 + wiggle}


def run(plan: Study, out: Path, trainer: Callable[[Study], Result]) -> tuple[Result, list[Entry]]:
    said: list[Entry] = []
    return run_rounds(plan, out, trainer, said.append), said


def test_the_files_axes_say_what_may_be_run() -> None:
    (scan,) = scans(study())
    assert (scan.name, scan.space.batches) == ("", (64, 128, 256))
    assert scan.space.horizons == (2**12, 2**13, 2**14, 2**15)
    assert scan.space.rates == (-6, -5, -4, -3, -2)
    assert scan.space.budget == 8 * 2**15
    (half,) = scans(study(axes={"batch": [64], "lr": {"from": "2^-4.5", "to": "2^-2.5", "step": "sqrt2"}}))
    assert half.space.rates == (-4.5, -3.5, -2.5)
    (long,) = scans(study(horizon=3 * 2**13))
    assert long.space.horizons == (2**12, 2**13, 2**14, 3 * 2**13)
    (wide,) = scans(study(axes=AXES | {"batch": [2**k for k in range(6, 12)]}, horizon=2**16))
    assert wide.space.budget == 66 // 5 * 2**16


def test_an_adaptive_study_finds_the_optimum_and_keeps_a_journal(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    result, said = run(study(), tmp_path, trainer)
    assert tuple(said) == read_rounds(tmp_path)
    assert [entry.round for entry in said] == list(range(1, len(said) + 1))
    assert result.finished == len({order["run"] for entry in said for order in entry.orders})
    assert said[-1].orders == ()
    (answer,) = said[-1].answers.values()
    assert answer["rate"] == pytest.approx(-4 + 0.5 * (math.log2(answer["batch"]) - 7) - 1.2, abs=0.2)
    spent: dict[str, int] = {}
    for identity, horizon in trainer.trained:
        spent[identity] = max(horizon, spent.get(identity, 0))
    assert said[-1].spent == sum(spent.values()) <= 8 * 2**15
    again, nothing = run(study(), tmp_path, Trainer(tmp_path, fails_after=0))
    assert (again.finished, nothing) == (result.finished, [])
    assert tuple(said) == read_rounds(tmp_path)


def test_killed_anywhere_it_makes_the_same_decisions(tmp_path: Path) -> None:
    run(study(), tmp_path / "whole", whole := Trainer(tmp_path / "whole"))
    journal = (tmp_path / "whole" / ROUNDS).read_bytes()
    for fails_after in (0, 12, len(whole.trained) - 1):
        out = tmp_path / str(fails_after)
        with pytest.raises(KeyboardInterrupt):
            run(study(), out, Trainer(out, fails_after))
        assert journal.startswith((out / ROUNDS).read_bytes())
        run(study(), out, Trainer(out))
        assert (out / ROUNDS).read_bytes() == journal


def test_runs_that_went_further_than_asked_change_nothing(tmp_path: Path) -> None:
    """As after a full grid in the same folder: what a round was not told cannot decide it."""
    run(study(), tmp_path / "plain", Trainer(tmp_path / "plain"))
    run(study(), tmp_path / "long", Trainer(tmp_path / "long", longest=2**15))
    assert (tmp_path / "long" / ROUNDS).read_bytes() == (tmp_path / "plain" / ROUNDS).read_bytes()


def test_a_larger_budget_or_a_narrower_interval_continues(tmp_path: Path) -> None:
    run(study({"budget": 2**17}), tmp_path, Trainer(tmp_path))
    before = read_rounds(tmp_path)
    assert "stop: budget of 2^17 tokens spent" in " ".join(before[-1].lines)
    _, said = run(study({"budget": "2^19", "width": 0.2}), tmp_path, Trainer(tmp_path))
    assert read_rounds(tmp_path) == (*before, *said)
    assert said[0].orders
    assert 2**17 < said[-1].spent <= 2**19


def test_no_round_follows_a_failed_run(tmp_path: Path) -> None:
    def fails(plan: Study) -> Result:
        return Result(finished=0, diverged=0, failed={plan.configs[0].id: "no memory"})

    result, said = run(study(), tmp_path, fails)
    assert (len(result.failed), len(said)) == (1, 1)
    _, after = run(study(), tmp_path, Trainer(tmp_path))
    assert after[0].round == 2


def test_scans_that_differ_in_more_are_decided_apart_and_share_the_budget(tmp_path: Path) -> None:
    both = study({"budget": 2**20}, AXES | {"width": [16, 32]})
    assert [(scan.name, scan.space.budget) for scan in scans(both)] == [("d16-L1", 2**19), ("d32-L1", 2**19)]
    _, said = run(both, tmp_path / "both", Trainer(tmp_path / "both"))
    assert said[0].lines == tuple(f"d{w}-L1: started B=2^7: 2^-6 .. 2^-2 to D=2^12" for w in (16, 32))
    ends = [line for entry in said[:-1] for line in entry.lines if ": stop: " in line]
    assert len(ends) == len(set(ends)), "a scan that has ended says so once"
    narrow, wide = said[-1].answers.values()
    assert wide["rate"] - narrow["rate"] == pytest.approx(1.0, abs=0.2)
    _, alone = run(study({"budget": 2**19}), tmp_path / "one", Trainer(tmp_path / "one"))
    assert list(alone[-1].answers.values()) == [narrow]


def test_a_damaged_journal_and_that_of_another_study_are_one_line(tmp_path: Path) -> None:
    run(study(), tmp_path, Trainer(tmp_path))
    with pytest.raises(
        UserError, match=r"round 1 of the journal is of runs that are not in the study; use another --out"
    ):
        run(study(seed=1), tmp_path, Trainer(tmp_path))
    with (tmp_path / ROUNDS).open("ab") as file:
        file.write(b'{"round": 9\n')
    with pytest.raises(UserError, match=rf"{ROUNDS}:\d+: damaged .*; delete the file to decide the rounds again"):
        read_rounds(tmp_path)
