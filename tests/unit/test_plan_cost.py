"""What a plan says being wrong costs, how far the batch can be raised, and which runs would help."""

import math

import numpy as np
import pytest
from synthetic import columns

from disco.fit import StudyFit, fit_table
from disco.guide import Plan, plan

RATES = np.arange(-9.0, 2.0)
LR, BATCH = 0.06, 0.02
"""Nats per octave squared in ``synthetic.columns``."""


@pytest.fixture(scope="module")
def fit() -> StudyFit:
    return fit_table(columns(RATES, noise=0.004, rng=np.random.default_rng(5)), bootstraps=200)


@pytest.fixture(scope="module")
def free(fit: StudyFit) -> Plan:
    return plan(fit, 2**22)


def test_curvatures_are_those_of_the_study(free: Plan) -> None:
    assert free.curvature.lr == pytest.approx(LR, rel=0.1)
    assert free.curvature.batch == pytest.approx(BATCH, rel=0.2)


def test_ends_of_the_intervals_cost_what_the_curvature_says(free: Plan) -> None:
    assert free.lr.interval is not None
    assert free.cost.lr_ends is not None
    assert free.curvature.lr is not None
    for end, price in zip(free.lr.interval, free.cost.lr_ends, strict=True):
        assert price == pytest.approx(free.curvature.lr * math.log2(end / free.lr.value) ** 2)
    assert free.cost.batch_ends is not None
    assert free.cost.expected is not None
    assert 0 < free.cost.expected < max(free.cost.lr_ends) + max(free.cost.batch_ends)


def test_a_given_batch_costs_its_distance_from_the_best(fit: StudyFit, free: Plan) -> None:
    far = plan(fit, 2**22, batch=2**15)
    assert far.cost.of_batch == pytest.approx(BATCH * 3**2, rel=0.25)  # the best batch is 2^12
    assert far.cost.of_batch_interval is not None
    assert far.cost.of_batch_interval[0] < BATCH * 9 < far.cost.of_batch_interval[1]
    assert far.trust == "do not trust"  # two octaves outside the grid
    assert free.cost.of_batch_interval is not None
    assert free.cost.of_batch_interval[0] == 0


def test_a_cap_is_kept_and_priced(fit: StudyFit, free: Plan) -> None:
    capped = plan(fit, 2**22, max_batch=1500)
    assert (capped.batch.value, capped.batch.source) == (1500, "capped")
    assert free.batch.interval is not None
    assert free.batch.interval[0] > 1500
    assert capped.batch.interval == (1500, 1500)  # of the batches that are allowed it is the best for sure
    loose = plan(fit, 2**22, max_batch=2**12 - 1)
    assert loose.batch.interval == (free.batch.interval[0], 2**12 - 1)
    assert loose.batch_half == free.batch_half  # of the best batch without the cap
    away = 12 - math.log2(1500)
    assert capped.cost.of_batch == pytest.approx(BATCH * away**2, rel=0.4)
    assert math.log2(capped.lr.value) == pytest.approx(-4 + 0.6 * (math.log2(1500) - 11) - 1, abs=0.1)
    assert plan(fit, 2**22, max_batch=2**13).batch == free.batch


def test_largest_batch_grows_with_the_tolerance_and_the_tokens(fit: StudyFit, free: Plan) -> None:
    for tolerance in (0.005, 0.02):
        largest = plan(fit, 2**22, tolerance=tolerance).largest
        assert largest is not None
        assert math.log2(largest.batch) == pytest.approx(12 + math.sqrt(tolerance / BATCH), abs=0.3)
        assert largest.sure is not None
        assert largest.sure < largest.batch
        assert largest.lr is not None
        best = -4 + 0.6 * (math.log2(largest.batch) - 11) - 1
        assert math.log2(largest.lr) == pytest.approx(best, abs=0.15)
    assert free.largest is not None
    assert free.largest.tolerance == pytest.approx(0.004, rel=0.6)  # the noise of a run
    longer = plan(fit, 2**24).largest
    assert longer is not None
    assert math.log2(longer.batch / free.largest.batch) == pytest.approx(1.0, abs=0.3)  # batch* ~ tokens^0.5


def test_advice_is_ranked_by_what_a_token_buys(free: Plan) -> None:
    assert len(free.advice) == 3
    rates = [item.saved / item.tokens for item in free.advice]
    assert rates == sorted(rates, reverse=True)
    assert free.lr.interval is not None
    assert free.lr_half == pytest.approx(math.log2(free.lr.interval[1] / free.lr.interval[0]) / 2)
    assert free.batch_half is not None
    for item in free.advice:
        assert 0 < item.saved < (free.cost.expected or 0)
        assert item.lr_half < free.lr_half
        assert item.batch_half <= free.batch_half


def test_a_longer_horizon_narrows_the_interval_about_as_foretold(fit: StudyFit, free: Plan) -> None:
    """Runs to 2^22 in place of 2^21, planned for 2^24, with the noise of every run drawn anew."""
    before = plan(fit, 2**24)
    table = columns(RATES, horizons=tuple(2**k for k in range(18, 23)), noise=0.004, rng=np.random.default_rng(6))
    after = plan(fit_table(table, bootstraps=200), 2**24)
    assert before.lr.interval is not None
    assert after.lr.interval is not None
    was, now = (math.log2(high / low) / 2 for low, high in (before.lr.interval, after.lr.interval))
    foretold = [item.lr_half for item in before.advice]
    assert now < was
    assert min(foretold) < was


def test_advice_for_one_batch_is_to_try_another() -> None:
    fit = fit_table(columns(RATES, batches=(2048,), noise=0.004, rng=np.random.default_rng(5)))
    found = plan(fit, 2**22)
    assert any("batch 2^12" in item.what or "batch 2^10" in item.what for item in found.advice)
    assert found.batch_half is None
    for item in found.advice:  # nothing that rests on the prior of the best batch alone
        assert math.isnan(item.batch_half)
        assert math.isnan(item.saved)
        assert item.lr_half <= (found.lr_half or 0)


def test_no_optimum_no_price() -> None:
    found = plan(fit_table(columns(np.arange(-12.0, -8.0))), 2**22)
    assert (found.curvature.lr, found.cost.expected, found.largest, found.advice) == (None, None, None, ())
    assert found.trust == "do not trust"
