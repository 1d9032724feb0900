"""Growth of norms: the law is recovered from runs made by a known one, and forecasts runs that are not in the study."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from courses import made, speed, study

from disco.errors import UserError
from disco.guide._course import Course
from disco.guide._forecast import Forecast, distance, forecast, outside, planned, slope_of
from disco.guide._growth_fit import growth, growths
from disco.guide._growth_model import Growth

END = 2.0**20


@pytest.fixture(scope="module")
def fitted() -> Growth:
    return growth(study())


def error(course: Course, fitted: Growth | None, share: float = 0.05) -> float:
    """Octaves of the forecast of the final norm from a share of the tokens."""
    found = forecast(course.until(share * course.last), course.last, fitted)
    return found.log2 - math.log2(course.norm[-1])


def test_the_law_is_recovered(fitted: Growth) -> None:
    knots, table = np.array(fitted.knots), np.array(fitted.coefficients)
    batch = math.sqrt(fitted.centre["batch"] / 1024) - 1
    for log2 in (2.0, 3.0, 4.0, 5.0, 6.0):
        row = table[0] + batch * table[fitted.terms.index("batch")]
        assert np.interp(log2, knots, row) == pytest.approx(math.log2(speed(2**log2)), abs=0.12)
    assert fitted.usable
    assert fitted.terms == ("norm", "rate", "batch")
    assert fitted.scatter < 0.05 < fitted.own_scatter


@pytest.mark.parametrize(("batch", "rate"), [(2048.0, 0.35), (8192.0, 0.7), (512.0, 0.1), (1024.0, 2.0)])
def test_it_forecasts_other_batches_and_rates(fitted: Growth, batch: float, rate: float) -> None:
    run = made(batch, rate, seed=77, own=0.05)
    found = forecast(run.until(END / 20), END, fitted)
    assert found.source == "growth"
    assert abs(found.log2 - math.log2(run.norm[-1])) < 0.08
    assert found.low < math.log2(run.norm[-1]) < found.high
    assert found.high - found.low < 0.4
    assert abs(error(run, fitted)) < abs(error(run, None)) + 0.01


def test_a_run_that_grows_faster_is_believed_the_more_the_longer_it_did(fitted: Growth) -> None:
    run = made(own=0.4, seed=5)
    errors = [abs(error(run, fitted, share)) for share in (0.0, 0.05, 0.3)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.6 * errors[0]


def test_weight_decay_saturates_though_the_study_had_none(fitted: Growth) -> None:
    run = made(rate=1.0, weight_decay=2.0**-5, seed=3)
    assert run.norm[-1] < 2**5
    assert abs(error(run, fitted)) < 0.05
    far = planned(made(weight_decay=2.0**-3, horizon=2.0**12), 2.0**26, fitted, 1.0)
    steady = math.log2(max(n for n in np.linspace(1, 8, 4000) if speed(n) >= n / 8))  # where growth and decay agree
    assert far.log2 == pytest.approx(steady, abs=0.05)
    assert far.log2 < 3.0


@pytest.mark.parametrize(("warmup", "decay"), [(2.0**17, 0.0), (0.0, 0.5), (2.0**16, 1.0)])
def test_schedules_act_through_the_path(fitted: Growth, warmup: float, decay: float) -> None:
    run = made(rate=0.5, warmup=warmup, decay=decay, seed=8)
    assert abs(error(run, fitted)) < 0.1
    constant = planned(run, END, fitted, 0.5).log2 - planned(replace(run, warmup=0.0, decay=0.0), END, fitted, 0.5).log2
    assert constant < -0.04  # a shorter path ends lower


def test_ratios_scale_the_path_of_the_layer(fitted: Growth) -> None:
    run = made(rate=0.5, ratios={"output": 0.25}, seed=4)
    assert abs(error(run, fitted)) < 0.06
    assert planned(run, END, fitted, 0.5).log2 == pytest.approx(
        planned(replace(run, ratios={}), END, fitted, 0.125).log2, abs=1e-6
    )


def test_another_rate_from_here_on(fitted: Growth) -> None:
    now = made(rate=0.25, seed=6).until(END / 4)
    low, same, high = (forecast(now.at_rate(rate), END, fitted).log2 for rate in (0.125, 0.25, 0.5))
    assert low < same < high
    assert high - low < 2 * slope_of(now, END, fitted)  # a quarter of the path is walked


def test_slope_is_that_of_the_law(fitted: Growth) -> None:
    ends = [math.log2(made(rate=0.25 * 2**x).norm[-1]) for x in (-0.5, 0.5)]
    assert slope_of(made(rate=0.25), END, fitted) == pytest.approx(ends[1] - ends[0], abs=0.03)


def test_adam_falls_back_and_says_why(fitted: Growth) -> None:
    run = made(optimizer="adam")
    found = forecast(run.until(END / 4), END, fitted)
    assert found.source == "own course"
    assert "adam" in found.reason
    assert found.high > found.log2 > found.low


def test_runs_that_are_no_function_of_the_path_are_not_used() -> None:
    """As Adam's: at the same path, twice the rate goes with half the speed."""
    strange = [made(c.batch, c.rate, own=-1.0 * math.log2(c.rate / 0.25), seed=i + 1) for i, c in enumerate(study())]
    found = growth([replace(c, batch=1024.0 * 2 ** (i % 4), momentum=0.0) for i, c in enumerate(strange)])
    assert not found.usable
    assert "not one function of the path" in found.reason
    ahead = forecast(made().until(END / 4), END, found)
    assert (ahead.source, ahead.reason) == ("own course", found.reason)


def test_a_run_that_does_not_follow_is_carried_on_alone(fitted: Growth) -> None:
    run = made(rate=0.5, own=-2.5, seed=2)
    found = forecast(run.until(END / 4), END, fitted)
    assert found.source == "own course"
    assert "study's growth" in found.reason


def test_momentum_unknown_to_the_study_widens_the_interval(fitted: Growth) -> None:
    now = made(rate=0.5).until(END / 50)
    plain, other = (forecast(replace(now, momentum=m), END, fitted) for m in (0.0, 0.9))
    assert other.high - other.low > 1.3 * (plain.high - plain.low)
    assert "momentum 0.9" in other.reason
    assert outside(replace(now, batch=2.0**20, width=64.0), fitted) == ("batch 2^20",)


def test_nothing_is_forecast_from_nothing(fitted: Growth) -> None:
    run = made()
    blank = replace(run, norm=np.full(len(run.tokens), math.nan))
    assert forecast(blank, END, fitted).source == "none"
    assert math.isnan(forecast(blank, END, fitted).log2)
    assert forecast(run.until(0.0), END).source == "none"  # one point has no slope
    assert forecast(run.until(-1.0), END, fitted).source == "none"
    assert forecast(run, END / 2, fitted).log2 == pytest.approx(math.log2(run.norm[-3]), abs=1e-9)  # measured


def test_few_runs_are_no_study() -> None:
    with pytest.raises(UserError, match="5 runs with a known momentum and weight decay, fewer than 6"):
        growth([*study()[:5], replace(made(), momentum=math.nan)])
    blank = [replace(run, norm=np.full(len(run.tokens), math.nan)) for run in study()]
    with pytest.raises(UserError, match="0 runs with norms of the output layer and a path, fewer than 6"):
        growth(blank)
    assert growths(study()[:5]) == ()


def test_it_is_kept_in_json(fitted: Growth) -> None:
    again = Growth.from_dict(json.loads(json.dumps(fitted.to_dict())))
    now = made(seed=9).until(END / 10)
    assert forecast(now, END, again) == forecast(now, END, fitted)


def test_every_layer_group_has_its_own(fitted: Growth) -> None:
    both = [replace(run, norms={"hidden": 2 * run.norm}) for run in study()]
    found = growths(both)
    assert [each.layer for each in found] == ["output", "hidden"]
    run = replace(made(seed=3), norms={"hidden": 2 * made(seed=3).norm})
    ahead = forecast(run.until(END / 20), END, found[1], "hidden")
    assert ahead.source == "growth"
    assert ahead.log2 == pytest.approx(1 + math.log2(run.norm[-1]), abs=0.08)


def test_distance_is_in_octaves_of_rate() -> None:
    found = Forecast(END, 6.0, 6.0 - 0.16449, 6.0 + 0.16449, "growth", "")
    off = distance(found, 5.5, 0.0, 0.5)
    assert (off.octaves, off.low, off.high) == pytest.approx((1.0, 1.0 - 0.32898, 1.0 + 0.32898))
    assert distance(found, 5.5, 0.1, 0.5).high == pytest.approx(1.0 + 0.32898 * math.sqrt(2), rel=1e-4)
    assert math.isnan(distance(found, math.nan, 0.1, 0.5).octaves)


def test_a_wrong_rate_is_seen_from_5_percent(fitted: Growth) -> None:
    aim = planned(made(), END, fitted, 0.25).log2
    for octaves in (-1.0, -0.5, 0.0, 0.5, 1.0):
        now = made(rate=0.25 * 2**octaves, seed=21).until(END / 20)
        off = distance(forecast(now, END, fitted), aim, 0.0, slope_of(now, END, fitted))
        assert off.octaves == pytest.approx(octaves, abs=0.2)


@pytest.mark.full
def test_intervals_cover(fitted: Growth) -> None:
    """Of runs whose own speeds differ as those of the study do."""
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(120):
        batch, rate = 2.0 ** rng.integers(9, 13), 2.0 ** rng.uniform(-4, 0)
        run = made(batch, rate, 2.0**19, seed=seed + 100, own=0.02 * rng.normal())
        for share in (0.02, 0.05, 0.2):
            found = forecast(run.until(share * run.last), run.last, fitted)
            inside.append(found.low <= math.log2(run.norm[-1]) <= found.high)
    assert 0.8 <= np.mean(inside) <= 0.99


def test_until_path_and_schedule() -> None:
    run = made(rate=0.5, warmup=2.0**16, decay=0.25)
    early = run.until(END / 8)
    assert early.last == END / 8
    assert early.path_at(END) == pytest.approx(run.path[-1], rel=2e-3)
    assert early.path_at(END / 16) == pytest.approx(float(np.interp(END / 16, run.tokens, run.path)))
    assert early.at_rate(1.0).path_at(END) - early.path[-1] == pytest.approx(
        2 * (run.path[-1] - early.path[-1]), rel=2e-3
    )
    assert run.factor(np.array([2.0**15, END / 2, END * 7 / 8])) == pytest.approx([0.5, 1.0, 0.5])
