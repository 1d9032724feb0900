"""``Watch``: the same checks from inside a training loop."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import planned
import pytest

from disco.errors import UserError
from disco.guide import Check, Plan, Watch, check, growth, read_plan
from disco.runs.writer import write_json


@pytest.fixture(scope="module")
def grown() -> Plan:
    """A plan that knows how norms grow."""
    return planned.plan(growth=growth(planned.study()))


def test_watch_in_a_training_loop_says_what_a_check_of_the_record_says() -> None:
    plan, run = planned.plan(planned.study()), planned.run(4 * planned.RATE, share=0.5)
    watch = Watch(plan, lr=4 * planned.RATE, every=0.0, width=16.0, depth=1.0)
    found = []
    for i, tokens in enumerate(run.tokens):
        if i == 10:  # the loop is stopped and resumed
            state = json.loads(json.dumps(watch.state_dict()))
            watch = Watch(plan, lr=4 * planned.RATE, every=0.0, width=16.0, depth=1.0)
            watch.load_state_dict(state)
        layers = {group: {"layer": float(values[i]), "other": 0.1} for group, values in run.norms.items()}
        found.append(watch(int(tokens / planned.BATCH), float(tokens), float(run.loss[i]), layers))
    assert found[-1] is not None
    expected = check(replace(run, rate=4 * planned.RATE), plan)
    assert found[-1].to_dict() == expected.to_dict() | {"reasons": list(found[-1].reasons)}


def test_watch_goes_back_with_the_loop_and_tells_divergence() -> None:
    watch = Watch(planned.plan())
    for step in (1, 2, 4, 8, 16, 3):
        watch(step, step * 256, 5.0, {"output": 1.0 + step})
    assert watch.course.tokens.tolist() == [256, 512, 768]
    assert watch.course.path.tolist() == pytest.approx([planned.RATE * step for step in (1, 2, 3)])
    found = watch(4, 1024, math.nan)
    assert found is not None
    assert found.verdict == "off course"


def test_watch_keeps_few_points_of_a_long_run() -> None:
    watch = Watch(planned.plan(), every=1.0)
    checks = [watch(step, step * 256, 5.0, {"output": 2.0}) for step in range(1, 4096)]
    assert len(watch.course.tokens) < 200
    assert sum(found is not None for found in checks) == 12


def _watched(watch: Watch, rates: list[float]) -> Check:
    """The last check of a loop that gives its rate at each step, and norms of the law."""
    path, last = 0.0, None
    for step, rate in enumerate(rates, 1):
        path += rate
        last = watch(step, step * planned.BATCH, 5.0, {"output": 2 ** float(planned.law(path))}, lr=rate) or last
    assert last is not None
    return last


def test_watch_looks_ahead_at_the_rate_that_the_loop_reports(grown: Plan) -> None:
    found = _watched(Watch(grown), [4 * planned.RATE] * 100)
    assert found.verdict == "off course"
    assert found.lr == pytest.approx(4 * planned.RATE)
    assert found.octaves is not None
    assert found.octaves.octaves == pytest.approx(2.0, abs=0.2)
    assert found.correction is not None
    assert found.correction.lr is not None
    corrected = _watched(Watch(grown, lr=4 * planned.RATE), [4 * planned.RATE] * 100 + [found.correction.lr] * 500)
    assert corrected.lr == pytest.approx(found.correction.lr)
    assert corrected.verdict == "on course"


def test_watch_without_reported_rates_walks_the_schedule() -> None:
    watch = Watch(planned.plan(), warmup=100.0 * planned.BATCH)
    for step in (10, 20, 50, 200):
        watch(step, step * planned.BATCH, 5.0, {"output": float(step)})
    walked = [planned.RATE * sum(min(1, (i + 0.5) / 100) for i in range(step)) for step in (10, 20, 50, 200)]
    assert watch.course.path == pytest.approx(walked)
    assert watch.course.rate == planned.RATE


@pytest.mark.parametrize("every", [10, 100])
def test_watch_keeps_norms_that_are_reported_now_and_then(every: int) -> None:
    watch = Watch(planned.plan())
    checked = []
    for step in range(1, 2001):
        norms = {"output": step**0.5} if step % every == 0 else None
        if watch(step, step * planned.BATCH, 5.0, norms) is not None:
            checked.append(step)
    kept = [int(at / planned.BATCH) for at in watch.course.tokens[np.isfinite(watch.course.norm)]]
    assert kept[0] == every
    assert all(after <= before * 2 ** (1 / 16) + every for before, after in itertools.pairwise([*kept, 2000]))
    assert len(watch.course.tokens) < 300
    assert all(step % every == 0 for step in checked if step > 2 * every)
    assert len(checked) > 5


def test_a_plan_that_is_none_is_an_error_in_one_line(tmp_path) -> None:
    write_json(tmp_path / "fit.json", {"cells": []})
    with pytest.raises(UserError, match="not what disco plan -o writes"):
        Watch(tmp_path / "fit.json")
    with pytest.raises(UserError, match="make it with: disco plan"):
        read_plan(tmp_path / "none.json")


def test_watch_takes_the_momentum_too() -> None:
    plan, run = planned.plan(planned.study()), planned.run(share=0.1, really=1 / 16)
    watch = Watch(plan, every=0.0)
    found = None
    for i, tokens in enumerate(run.tokens):
        norms, momenta = ({group: float(y[i]) for group, y in each.items()} for each in (run.norms, run.momenta))
        found = watch(int(tokens / planned.BATCH), float(tokens), float(run.loss[i]), norms, momenta=momenta)
    again = Watch(plan)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for each in (watch, again):
        assert each.course.momenta["hidden"].tolist() == run.momenta["hidden"].tolist()
    assert found is not None
    assert "as with a batch of about" in found.fault
