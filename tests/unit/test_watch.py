"""Checks of runs against a plan, where the law of growth is known."""

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import planned
import pytest

from disco.errors import UserError
from disco.guide import Check, Course, Curvatures, Estimate, Plan, Watch, check, growth, read_plan
from disco.guide._bands import LOSS, bands
from disco.guide._course import as_it_goes
from disco.guide._faults import looks_like, seen
from disco.guide._forecast import slope_of
from disco.guide._own_course import BEND
from disco.report import render_check
from disco.runs.units import two_to
from disco.runs.writer import write_json
from disco.train import schedule


def test_bands_are_what_runs_at_the_planned_settings_show() -> None:
    for band in planned.plan(planned.study()).bands:
        at = np.array(band.at)
        truth = 5.5 - 0.2 * (at - 8) if band.quantity == LOSS else planned.law(2**at)
        assert np.abs(np.array(band.value) - truth).max() < (0.05 if band.quantity == LOSS else 0.03)
        assert 0.005 < np.median(band.sd) < (0.4 if band.quantity == "input" else 0.1)
        assert np.nanmax(np.abs(band.of_batch)) < 0.05  # the law knows no batch


def test_bands_need_runs_near_the_plan() -> None:
    assert not bands(planned.study(), planned.BATCH * 64, planned.RATE)
    assert not bands(planned.study()[:3], planned.BATCH, planned.RATE)


@pytest.mark.parametrize(
    ("octaves", "verdict"), [(0.0, "on course"), (0.3, "on course"), (1.5, "off course"), (-1.5, "off course")]
)
def test_the_rate_is_judged_by_the_norm_that_the_run_will_end_with(octaves: float, verdict: str) -> None:
    found = check(planned.run(planned.RATE * 2**octaves, share=0.5), planned.plan())
    assert found.verdict == verdict
    assert found.octaves is not None
    assert found.octaves.octaves == pytest.approx(octaves, abs=0.2)
    assert found.octaves.low < octaves < found.octaves.high


def test_the_cost_is_the_curvature_times_the_mean_square_of_the_distance() -> None:
    found = check(planned.run(2 * planned.RATE, share=0.5), planned.plan())
    assert found.octaves is not None
    sd = (found.octaves.high - found.octaves.low) / 2 / 1.6449
    assert found.cost == pytest.approx(0.02 * (found.octaves.octaves**2 + sd**2))
    assert found.cost_interval == pytest.approx((0.02 * found.octaves.low**2, 0.02 * found.octaves.high**2))
    unknown = check(planned.run(share=0.5), planned.plan(curvature=Curvatures()))
    assert unknown.cost is None
    assert "no curvature" in unknown.rests_on


@pytest.fixture(scope="module")
def grown() -> Plan:
    """A plan that knows how norms grow."""
    return planned.plan(growth=growth(planned.study()))


def test_the_target_is_the_norm_of_the_planned_rate_where_growth_tells_it(grown: Plan) -> None:
    wide = replace(grown, lr=replace(grown.lr, interval=(planned.RATE / 2, planned.RATE * 2)))
    astray = replace(
        wide.norm, value=wide.norm.value * 2**0.4, interval=None
    )  # the fit's optimal norm is 0.7 octaves of rate off
    found, by_norm = (check(planned.run(share=0.25), replace(plan, norm=astray)) for plan in (wide, planned.plan()))
    assert (found.target_by, by_norm.target_by) == ("planned rate", "optimal norm")
    assert found.target is not None
    end = planned.law(planned.RATE * planned.TOKENS / planned.BATCH)
    assert found.target.log2 == pytest.approx(end, abs=0.05)
    assert (found.target.high - found.target.low) / 2 == pytest.approx(planned.SLOPE, abs=0.05)  # an octave of rate
    assert found.verdict == "on course"
    assert by_norm.octaves is not None
    assert by_norm.octaves.octaves < -0.5


@pytest.mark.parametrize("octaves", [-1.5, 1.5])
def test_the_corrected_rate_ends_at_the_best_norm(grown: Plan, octaves: float) -> None:
    wrong, share = planned.RATE * 2**octaves, 0.25
    found = check(planned.run(wrong, share=share, noise=0), grown)
    assert found.verdict == "off course"
    assert found.correction is not None
    for rate, batch in ((found.correction.lr, planned.BATCH), (wrong, found.correction.batch)):
        assert rate is not None
        assert batch is not None
        path = wrong * share * planned.TOKENS / planned.BATCH + rate * (1 - share) * planned.TOKENS / batch
        assert planned.law(path) == pytest.approx(planned.law(planned.RATE * planned.TOKENS / planned.BATCH), abs=0.1)


def test_a_norm_that_is_past_the_best_one_is_not_brought_back() -> None:
    found = check(planned.run(8 * planned.RATE, share=0.5), planned.plan())
    assert found.correction is not None
    assert found.correction.lr is None
    assert "start again from before" in found.correction.why


@pytest.mark.parametrize("changes", [{"norm": np.full(37, math.nan)}, {"path": np.full(37, math.nan)}])
def test_there_is_no_forecast_without_norms_and_paths(changes: dict[str, np.ndarray]) -> None:
    run = planned.run(share=0.5)
    changes = {name: values[: len(run.tokens)] for name, values in changes.items()}
    found = check(replace(run, norms={}, **changes), planned.plan())
    assert (found.verdict, found.forecast, found.octaves) == ("cannot tell", None, None)


def test_nothing_can_be_told_of_a_run_that_has_logged_nothing() -> None:
    assert check(planned.run().until(0), planned.plan()).reasons == ("nothing has been logged yet",)


def test_a_run_that_diverged_is_off_course() -> None:
    assert check(planned.run(share=0.1), planned.plan(), "diverged").verdict == "off course"


def test_healthy_runs_stay_inside_the_bands() -> None:
    plan = planned.plan(planned.study())
    for seed in range(20):
        course = planned.run(seed=seed)
        assert not any(each.outside for at in course.tokens for each in seen(course.until(at), plan.bands))


def _shifted(group: str, octaves: float) -> Check:
    """A run one of whose groups has walked another path."""
    run = planned.run(share=0.2, ratios={"hidden": 0.125})
    norms = {**run.norms, group: 2 ** planned.law(run.path * 2**octaves)}
    return check(replace(run, norms=norms, norm=norms["output"]), planned.plan(planned.study()))


@pytest.mark.parametrize(
    ("group", "octaves", "words"),
    [
        ("hidden", 3.0, "its ratio 2^-3 were forgotten"),
        ("hidden", 0.5, "normalised per shard"),
        ("input", 2.0, "only the input group"),
    ],
)
def test_the_group_that_is_off_is_named(group: str, octaves: float, words: str) -> None:
    found = _shifted(group, octaves)
    assert found.verdict == "off course"
    assert words in found.fault
    assert [each.quantity for each in found.seen if each.outside] == [group]


def test_weight_decay_is_told_from_a_lower_rate() -> None:
    plan, run = planned.plan(planned.study()), planned.run(share=1.0)
    slower = replace(run, norms={group: 2 ** planned.law(run.path / 2) for group in run.norms})
    assert "all groups step 2^-1 times" in looks_like(replace(slower, norm=slower.norms["output"]), plan.bands)
    steps = np.arange(1, run.tokens[-1] / planned.BATCH + 1)
    grown = np.diff(2 ** planned.law(planned.RATE * steps), prepend=1.0)
    norm, norms = 1.0, []
    for each in grown:
        norm = norm * (1 - 0.05 * planned.RATE) + each
        norms.append(norm)
    decayed = np.interp(run.tokens / planned.BATCH, steps, norms)
    worn = replace(run, norm=decayed, norms=dict.fromkeys(run.norms, decayed))
    said = re.search(r"weight decay of ([\d.]+)", looks_like(worn, plan.bands))
    assert said is not None
    assert float(said[1]) == pytest.approx(0.05, rel=0.1)


def test_settings_that_are_not_the_plans_are_mentioned() -> None:
    found = check(planned.run(share=0.5, momentum=0.9), planned.plan())
    assert "momentum is 0.9, in the study 0" in found.reasons


def test_a_check_and_a_plan_survive_json() -> None:
    plan = planned.plan(planned.study())
    found = check(planned.run(3 * planned.RATE, share=0.3), plan)
    assert Check.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    again = type(plan).from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert check(planned.run(share=0.3), again).to_dict() == check(planned.run(share=0.3), plan).to_dict()


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


def test_another_optimizer_is_not_judged(grown: Plan) -> None:
    found = check(planned.run(4 * planned.RATE, share=0.5, optimizer="adam"), grown)
    assert (found.verdict, found.forecast, found.correction) == ("cannot tell", None, None)
    assert "the optimizer is adam, in the study scion" in found.reasons[0]


def test_changed_settings_are_held_against_the_optimal_norm(grown: Plan) -> None:
    changed = planned.run(share=0.5, momentum=0.9)
    found = check(changed, grown)
    assert found.target_by == "optimal norm"
    assert found.target is not None
    assert found.target.log2 == pytest.approx(math.log2(grown.norm.value))
    unknown = check(changed, replace(grown, norm=replace(grown.norm, value=math.nan)))
    assert (unknown.verdict, unknown.target) == ("cannot tell", None)


def test_a_planned_norm_that_is_not_the_fits_is_said_to_be(grown: Plan) -> None:
    end = math.log2(grown.norm.value)
    astray = replace(grown.norm, value=2 ** (end + 1), interval=(2 ** (end + 0.9), 2 ** (end + 1.1)))
    said = check(planned.run(share=0.5), replace(grown, norm=astray))
    assert f"the fit's optimal norm is another than the planned one, {two_to(end + 1)}" in "; ".join(said.reasons)
    assert "optimal norm" not in "; ".join(check(planned.run(share=0.5), grown).reasons)
    assert "planned norm" in render_check(said)
    assert "planned is 2^" in said.reasons[0]
    assert "best norm" in render_check(check(planned.run(share=0.5), planned.plan()))


@pytest.mark.parametrize(
    ("factor", "declared", "says"),
    [
        (lambda at: min(1.0, at / 0.5), {}, "the logged rate rises, and no warmup is declared"),
        (lambda at: min(1.0, at / 0.5), {"warmup": 2.0**13}, "the logged rate rises, and no such warmup is declared"),
        (lambda at: min(1.0, at / 0.5), {"warmup": 0.5 * planned.TOKENS}, ""),
        (lambda at: (1 + math.cos(math.pi * at)) / 2, {}, "the logged rate falls, and no decay is declared"),
        (lambda at: 1.0 if at < 0.1 else 0.25, {}, ""),
    ],
)
def test_logged_rates_that_contradict_the_schedule_leave_nothing_to_tell(
    grown: Plan, factor: Callable[[float], float], declared: dict[str, float], says: str
) -> None:
    share = 0.15
    run = planned.run(share=share, **declared)
    lr = planned.RATE * np.array([factor(at / planned.TOKENS) for at in run.tokens])
    path = np.cumsum(lr * np.diff(run.tokens, prepend=0.0) / planned.BATCH)
    norm = 2 ** planned.law(path)
    now = as_it_goes(replace(run, lr=lr, path=path, norm=norm, norms={"output": norm}))
    found = check(now, grown)
    if says:
        assert (found.verdict, found.correction) == ("cannot tell", None)
        assert says in found.reasons[0]
    else:
        assert found.forecast is not None


@pytest.mark.parametrize("warmup", [4, 10, 64])
def test_the_peak_is_read_off_the_rates_of_the_trainers_own_schedule(warmup: int) -> None:
    steps, decay = 1024, 256
    for step in (1, 2, 4, 8, 16, 32, 800, 900, 1000):
        lr = 0.3 * schedule.factor(step - 1, steps=steps, warmup=warmup, decay=decay)
        nothing = np.full(1, math.nan)
        seen_so_far = Course(
            tokens=np.array([256.0 * step]), path=nothing, lr=np.array([lr]), norm=nothing, loss=nothing, batch=256.0,
            rate=0.1, horizon=256.0 * steps, warmup=256.0 * warmup, decay=decay / steps,
        )  # fmt: skip
        assert as_it_goes(seen_so_far).rate == pytest.approx(0.3)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.7])
def test_without_growth_the_distance_is_by_the_whole_path(share: float) -> None:
    def gained(path: float | np.ndarray) -> np.ndarray:
        """In proportion to the path at first, ever more slowly later, as measured runs do."""
        octaves = np.log2(np.maximum(path, 1.0))
        return np.asarray(2 ** (0.9 * (1 - np.exp(-BEND * octaves)) / BEND) * np.minimum(path, 1.0))

    run = planned.run(planned.RATE * 2**1.5, share=share, noise=0.0)
    tokens, path = (np.insert(values, 0, 0.0) for values in (run.tokens, run.path))
    norm, lr = 2 + gained(path), np.full(len(path), run.rate)  # early on most of the norm is that of the start
    run = replace(run, tokens=tokens, path=path, norm=norm, norms={}, lr=lr, loss=lr)
    end, low, high = (
        math.log2(2 + float(gained(rate * planned.TOKENS / planned.BATCH)))
        for rate in (planned.RATE, run.rate / 2**0.5, run.rate * 2**0.5)
    )
    assert slope_of(run, planned.TOKENS) == pytest.approx(high - low, abs=0.05)
    plan = planned.plan(norm=Estimate(2**end, None, "rule", "made up"))
    found = check(run, plan)
    assert found.octaves is not None
    assert found.octaves.octaves == pytest.approx(1.5, abs=0.3)


def test_a_plan_that_is_none_is_an_error_in_one_line(tmp_path) -> None:
    write_json(tmp_path / "fit.json", {"cells": []})
    with pytest.raises(UserError, match="not what disco plan -o writes"):
        Watch(tmp_path / "fit.json")
    with pytest.raises(UserError, match="make it with: disco plan"):
        read_plan(tmp_path / "none.json")
