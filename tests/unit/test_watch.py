"""Checks of runs against a plan, where the law of growth is known."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import planned
import pytest

from disco.guide import Check, Course, Curvatures, Estimate, Plan, check, growth
from disco.guide._bands import LOSS, MOMENTUM, bands
from disco.guide._course import as_it_goes
from disco.guide._faults import looks_like, seen
from disco.guide._forecast import slope_of
from disco.guide._growth_model import Growth
from disco.guide._own_course import BEND
from disco.guide._shown_rate import WIDER, rescaled, shown_rate
from disco.report import render_check
from disco.runs.units import two_to
from disco.train import schedule


def test_bands_are_what_runs_at_the_planned_settings_show() -> None:
    for band in planned.plan(planned.study()).bands:
        at = np.array(band.at)
        if band.quantity == MOMENTUM:
            off = np.array(band.value) - planned.momentum(2**at, planned.BATCH)
            assert np.abs(off[at <= 8]).max() < 0.1
            assert band.of_batch[-1] == pytest.approx(-0.5, abs=0.1)
            continue
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
def fitted_with_chance() -> Growth:
    """Of runs that differ by chance as real ones do."""
    return growth(
        [
            replace(run, norm=planned.run(run.rate, int(run.batch), seed=run.seed + i, noise=0.05).norm)
            for i, run in enumerate(planned.study())
        ]
    )


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


@pytest.mark.parametrize("really", [1 / 16, 1 / 4, 16])
def test_a_batch_that_is_not_the_declared_one_is_seen_in_the_momentum(really: float) -> None:
    plan = planned.plan(planned.study())
    found = check(planned.run(share=0.2, really=really), plan)
    assert found.verdict == "off course"
    assert {each.quantity for each in found.seen if each.outside} == {MOMENTUM}
    said = re.search(
        r"a batch of about 2\^(\d+) tokens: is the declared one in tokens, and of all devices", found.fault
    )
    assert said is not None
    assert int(said[1]) == pytest.approx(math.log2(really * planned.BATCH), abs=1)
    assert not check(planned.run(share=0.2), plan).fault


@pytest.mark.parametrize("octaves", [-2.0, -1.0, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_rate_that_is_not_the_recorded_one_is_seen_in_the_norms(grown: Plan, octaves: float, share: float) -> None:
    """The record says the planned rate; there are no bands, as for a run that is wider than the study's."""
    run = rescaled(planned.run(planned.RATE * 2**octaves, share=share), -octaves)
    assert run.rate == planned.RATE
    found = check(run, grown)
    assert found.shown is not None
    assert found.shown.octaves == pytest.approx(octaves, abs=0.2)
    assert found.shown.other
    assert found.verdict == "off course"
    assert "is the recorded rate that of the updates?" in found.reasons[1]
    assert found.octaves is not None
    assert found.octaves.octaves == pytest.approx(octaves, abs=0.3)
    assert found.correction is not None
    if found.correction.lr is not None:  # as the record counts rates
        past, ahead = share * planned.TOKENS / planned.BATCH, (1 - share) * planned.TOKENS / planned.BATCH
        path = 2**octaves * (planned.RATE * past + found.correction.lr * ahead)
        assert planned.law(path) == pytest.approx(planned.law(planned.RATE * planned.TOKENS / planned.BATCH), abs=0.15)


def test_healthy_runs_show_the_rate_that_is_recorded(grown: Plan) -> None:
    shown = [
        shown_rate(planned.run(seed=seed, share=share), grown.growth) for seed in range(10) for share in (0.05, 0.5)
    ]
    assert all(each is not None and not each.other and abs(each.octaves) < 0.25 for each in shown)


def test_a_width_that_the_study_does_not_have_makes_the_shown_rate_uncertain(grown: Plan) -> None:
    run = planned.run(share=0.2)
    shown = [shown_rate(replace(run, width=width), grown.growth) for width in (16.0, 32.0, 64.0)]
    half = [(each.high - each.low) / 2 for each in shown if each is not None]
    assert half[0] < 0.1
    assert all(
        1.645 * WIDER * octaves < wide < 1.5 * 1.645 * WIDER * octaves
        for octaves, wide in zip((1, 2), half[1:], strict=True)
    )


def test_no_rate_is_shown_without_norms_or_growth(grown: Plan) -> None:
    run = planned.run(share=0.1)
    assert shown_rate(run, None) is None
    assert shown_rate(run.until(0), grown.growth) is None
    assert shown_rate(replace(run, optimizer="adam"), grown.growth) is None


def test_coarse_points_show_no_other_rate(fitted_with_chance: Growth) -> None:
    """Norms at small paths, which the law does not tell apart, do not count for one rate and not for another."""
    shown = [
        shown_rate(planned.run(2.0**-8, share=share, seed=seed, noise=0.05), fitted_with_chance)
        for seed in range(12)
        for share in (0.5, 0.75, 1.0)
    ]
    told = [each for each in shown if each is not None]
    assert len(told) >= 24
    assert not any(each.other for each in told)
    assert abs(np.median([each.octaves for each in told])) < 0.15


def test_norms_by_another_law_show_no_rate(grown: Plan) -> None:
    run = planned.run(share=0.2)
    assert shown_rate(replace(run, norm=run.norm**0.5), grown.growth) is None


def test_a_declared_momentum_that_is_not_the_studys_is_no_wrong_batch() -> None:
    plan = planned.plan(planned.study())
    run = planned.run(share=0.2, momentum=0.95)
    found = check(replace(run, momenta={group: size / 6 for group, size in run.momenta.items()}), plan)
    assert MOMENTUM not in {each.quantity for each in found.seen}
    assert not found.fault


def test_the_momentum_is_looked_at_where_all_groups_have_one() -> None:
    plan, run = planned.plan(planned.study()), planned.run(share=0.2)
    alone = replace(run, momenta={"input": 16 * run.momenta["input"]})
    assert MOMENTUM in {each.quantity for each in check(run, plan).seen}
    assert MOMENTUM not in {each.quantity for each in check(alone, plan).seen}


def test_a_measured_norm_has_no_interval_though_the_rate_is_another(grown: Plan) -> None:
    run = rescaled(planned.run(planned.RATE / 4), 2.0)
    found = check(run, grown)
    assert found.shown is not None
    assert found.shown.other
    assert found.forecast is not None
    assert found.forecast.low == found.forecast.log2 == found.forecast.high
