"""A learning rate from one run: the truth of made-up studies and runs is recovered, what cannot be used is refused."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from courses import made, study
from records import config, write
from synthetic import columns

from disco.cli import main
from disco.errors import UserError
from disco.fit import StudyFit, fit_table
from disco.guide import OneRun, one_run
from disco.guide._course import Course
from disco.guide._growth_fit import growth
from disco.guide._growth_model import Growth
from disco.guide._one_run import PER_SIZE, optimal_norm
from disco.guide._settings import differences
from disco.guide._target import Size, Target, choose
from disco.report import render_one_run
from disco.runs.schema import norm_key

RATES = np.arange(-9.0, 2.0)
SLOPE, START = 0.6, 1.0
"""log2 norm = START + SLOPE log2 path."""


@cache
def fitted(norm: float = 6.0, drift: float = 0.0, **settings: Any) -> StudyFit:
    return fit_table(columns(RATES, noise=0.004, norm=norm, drift=drift, rng=np.random.default_rng(3), **settings))


def target(tokens: int, fit: StudyFit | None = None, width: float = 32.0, depth: float = 2.0) -> Target:
    return choose(fit or fitted(), tokens, None, None, Size(width, depth), lambda _: 0)


def probe(batch: float = 2048.0, rate: float = 2.0**-4, tokens: float = 2.0**18, **settings: Any) -> Course:
    steps = 2.0 ** np.arange(0.0, math.log2(tokens / batch) + 0.1, 0.5)
    path = rate * steps
    nothing = np.full(len(path), math.nan)
    values: dict[str, Any] = {
        "tokens": steps * batch, "path": path, "lr": np.full(len(path), rate), "loss": nothing,
        "norm": 2 ** (START + SLOPE * np.log2(path)), "batch": batch, "rate": rate, "horizon": tokens, "width": 32.0,
        "depth": 2.0,
    }  # fmt: skip
    return Course(**values | settings)


def best_rate(tokens: float, batch: float, norm: float) -> float:
    """log2."""
    return (norm - START) / SLOPE - math.log2(tokens / batch)


def inside(found: OneRun, truth: float) -> bool:
    assert found.lr.interval is not None
    return math.log2(found.lr.interval[0]) < truth < math.log2(found.lr.interval[1])


@pytest.fixture(scope="module")
def grown() -> Growth:
    return growth(study())


@pytest.mark.parametrize("batch", [512.0, 4096.0])
@pytest.mark.parametrize(("tokens", "drift"), [(2**20, 0.0), (2**23, 0.0), (2**21, 0.15), (2**23, 0.15)])
def test_the_rate_of_a_known_truth_is_recovered_within_its_interval(
    tokens: int, drift: float, batch: float, grown: Growth
) -> None:
    run = made(batch, 0.25, 2048 * batch, own=0.1, seed=5)
    found = one_run(target(tokens, fitted(drift=drift)), [run.until(64 * batch)], grown)
    norm = 6.0 + drift * (math.log2(tokens) - 20)
    truth = math.log2(np.interp(2.0**norm, run.norm, run.path)) - math.log2(tokens / batch)
    assert found.probes[0].source == "growth"
    assert found.probes[0].ahead > 3
    assert math.log2(found.lr.value) == pytest.approx(truth, abs=0.25)
    assert inside(found, truth)
    assert math.hypot(found.from_norm, found.from_growth) < 1.0
    assert found.share == pytest.approx(64 * batch / tokens)


def test_without_a_study_of_growth_the_probes_own_slope_is_used_and_said_to_be(grown: Growth) -> None:
    run = made(1024.0, 0.25, 2.0**21, own=0.1)
    truth = math.log2(np.interp(2.0**6, run.norm, run.path)) - math.log2(2**21 / 1024)
    by_growth = one_run(target(2**21), [run.until(2.0**16)], grown)
    by_itself = one_run(target(2**21), [run.until(2.0**16)])
    assert by_itself.probes[0].source == "own course"
    assert inside(by_itself, truth)
    assert by_itself.from_growth > 2 * by_growth.from_growth
    assert "extrapolated by its own slope" in "; ".join(by_itself.warnings)


def test_a_probe_that_has_been_at_the_best_norm_is_read_off() -> None:
    long = probe(rate=2.0**-1, tokens=2.0**21)
    found = one_run(target(2**21), [long])
    assert found.probes[0].ahead < 0
    assert found.from_growth == pytest.approx(1.6449 * 0.03 / SLOPE, rel=0.02)  # another seed's norm would differ
    assert math.log2(found.lr.value) == pytest.approx(best_rate(2**21, 2048, found.norm.log2), abs=0.05)


def test_lines_without_norms_after_the_last_norm_change_nothing() -> None:
    run = probe()
    later = replace(run, norm=np.where(run.tokens > run.last / 3, math.nan, run.norm))
    one, two = (one_run(target(2**21), [each]) for each in (run.until(run.last / 3), later))
    assert two.lr.value == pytest.approx(one.lr.value, rel=1e-6)


def test_probes_that_disagree_widen_the_interval() -> None:
    long = probe(rate=2.0**-1, tokens=2.0**21)
    one, two = one_run(target(2**21), [long]), one_run(target(2**21), [long, replace(long, norm=long.norm * 2**0.5)])
    apart = 0.5 / SLOPE
    assert math.log2(one.lr.value / two.lr.value) == pytest.approx(apart / 2, abs=0.02)
    assert two.from_growth == pytest.approx(1.6449 * apart / 2, rel=0.05)
    assert two.from_norm == pytest.approx(one.from_norm, rel=0.05)
    assert "differ by 0.8 octaves" in "; ".join(two.warnings)


def test_the_best_norm_follows_tokens_and_batch() -> None:
    table = columns(RATES, noise=0.001, norm=5.0, drift=0.1)
    table["norm/output/rms_to_inf"] *= (table["batch"] / 2048.0) ** -0.4
    fit = fit_table(table)
    for tokens, batch in ((2**19, 2**10), (2**21, 2**12), (2**22, 2**11)):
        truth = 5.0 + 0.1 * (math.log2(tokens) - 20) - 0.4 * (math.log2(batch) - 11)
        found = optimal_norm(target(tokens, fit), float(batch))
        assert found.log2 == pytest.approx(truth, abs=0.1)
        assert found.low < truth < found.high


def test_what_the_study_does_not_vary_is_uncertain() -> None:
    one_batch, one_horizon = fitted(batches=(2048,)), fitted(horizons=(2**20,))
    for fit, tokens, batch in ((one_batch, 2**20, 2**13), (one_horizon, 2**23, 2**11)):
        near, far = optimal_norm(target(2**20, fit), 2048.0), optimal_norm(target(tokens, fit), float(batch))
        assert far.log2 == pytest.approx(near.log2, abs=0.1)
        assert far.high - far.low > near.high - near.low + 0.8


def test_another_size_is_an_assumption_and_widens_the_interval() -> None:
    same, wider = optimal_norm(target(2**20), 2048.0), optimal_norm(target(2**20, width=128.0), 2048.0)
    assert wider.log2 == same.log2
    square = ((wider.high - wider.low) / 2) ** 2 - ((same.high - same.low) / 2) ** 2
    assert square == pytest.approx((1.6449 * PER_SIZE * 2) ** 2)
    assert "from width 32 to 128" in one_run(target(2**20, width=128.0), [probe(width=128.0)]).assumes[0]


def test_it_says_how_far_it_reaches() -> None:
    found = one_run(target(2**24), [probe(2.0**14, tokens=2.0**19)])
    text = "; ".join(found.warnings)
    assert "3.0 doublings of tokens beyond the study" in text
    assert "the batch of 2^14 is outside the study's, 2^9 to 2^13" in text
    shown = render_one_run(found)
    assert "2^24 tokens at a batch of 2^14, from one run" in shown
    assert "Assumed, not tested: the best output norm" in shown
    assert OneRun.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([], "no run was given"),
        ([probe(optimizer="adam")], "was trained with adam"),
        ([probe(decay=0.25)], "has a decay over 0.25 of its tokens"),
        ([probe(tokens=2.0**12)], "has 3 logged output norms, and 4 are needed"),
        ([replace(probe(), norm=np.full(15, math.nan))], "has 0 logged output norms"),
        ([probe().until(2.0**13), probe(4096.0)], "batches of 2048 and 4096 tokens"),
        ([replace(probe(), norm=probe().norm * 2.0**8)], "is above the best one, 2^6"),
        ([replace(probe(), norm=np.minimum(probe().norm, 3.0))], "is forecast to stay at 2^1.58, below the best one"),
    ],
)  # fmt: skip
def test_runs_that_are_no_probes_are_refused(runs: list[Course], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("^", r"\^").replace(".", r"\.")):
        one_run(target(2**21), runs)


def test_another_kind_of_run_is_refused_and_another_context_is_told() -> None:
    sweep = {"optimizer.momentum": 0.0, "model.context": 128}
    with pytest.raises(UserError, match=r"another kind of run than the study's: momentum is 0\.9, in the sweep 0"):
        one_run(target(2**21), [probe()], None, differences(sweep, {"optimizer.momentum": 0.9}))
    found = one_run(target(2**21), [probe()], None, differences(sweep, {"model.context": 256}))
    assert "context (tokens) is 256" in found.warnings[0]


def test_a_study_without_optimal_norms_is_refused() -> None:
    table = columns(RATES)
    del table["norm/output/rms_to_inf"]
    with pytest.raises(UserError, match="has an optimal norm in 0 cells"):
        one_run(target(2**21, fit_table(table)), [probe()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fit, and the record of a probe."""
    (tmp_path / "fit.json").write_text(
        json.dumps(fitted().to_dict() | {"settings": {"scion": {"optimizer.momentum": 0.0}}})
    )
    course = probe(512.0, 2.0, 2.0**17)
    like = config(batch=512, horizon=2**17, optimizer={"lr": course.rate}, model={
        "width": 32, "depth": 2, "head_size": 8, "context": 64})  # fmt: skip
    lines = [
        {"step": round(t / 512), "tokens": round(t), "path": p, norm_key("rms_to_inf", "output"): n}
        for t, p, n in zip(course.tokens, course.path, course.norm, strict=True)
        if t == 512 * round(t / 512)
    ]
    write(tmp_path / "runs", like, lines)
    return tmp_path


def test_at_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(folder / "fit.json"), "--tokens", "2^20", "--probe", str(folder / "runs")]
    assert main([*arguments, "--json"]) == 0
    found = OneRun.from_dict(json.loads(capsys.readouterr().out))
    assert math.log2(found.lr.value) == pytest.approx(best_rate(2**20, 512, 6.0), abs=0.2)
    assert main(arguments) == 0
    assert "learning rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch", "1024"], "the batch is 1024 and that of the probe 512"),
        (["--max-batch", "1024"], "--max-batch does not go with --probe"),
        (["--momentum", "0.9"], "optimizer.momentum does not go with --probe"),
        (["-o", "plan.json"], "--output does not go with --probe"),
        (["--probe", "nowhere"], "nowhere is not a folder of runs"),
    ],
)
def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    arguments = ["plan", str(folder / "fit.json"), "--tokens", "2^20", "--probe", str(folder / "runs"), *options]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1
