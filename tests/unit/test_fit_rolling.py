"""Regret on a grid, and the rolling origin."""

import math

import numpy as np
import pytest
from synthetic import columns

from disco.errors import UserError
from disco.fit import Rolling, fit_table, published, regret, rolling_origin

RATES = np.arange(-8.0, 0.0)


def test_regret_of_a_grid() -> None:
    lr, batch = (grid.ravel() for grid in np.meshgrid(2.0 ** np.arange(-4, 0), 2.0 ** np.arange(3, 6)))
    loss = 1 + (np.log2(lr) + 2) ** 2 + 0.1 * (np.log2(batch) - 4)
    at_best = regret(lr, batch, loss, (-2.0, 3.0))
    assert (at_best.interpolated, at_best.nearest, at_best.outside) == (pytest.approx(0, abs=1e-9), 0, 0)
    between = regret(lr, batch, loss, (-2.5, 4.0))
    assert between.interpolated == pytest.approx(0.35, abs=0.15)  # a straight line: 0.6
    outside = regret(lr, batch, loss, (-6.0, 3.0))
    assert math.isnan(outside.interpolated)
    assert outside.nats == outside.nearest == pytest.approx(4)
    assert outside.outside == 2
    gone = regret(lr, batch, np.where(lr == 0.5, math.nan, loss), (-1.0, 3.0))
    assert gone.nearest == math.inf
    with pytest.raises(UserError, match="one that is finite"):
        regret(lr, batch, np.full(12, math.nan), (-2.0, 3.0))


@pytest.fixture(scope="module")
def rolling() -> Rolling:
    return rolling_origin(columns(RATES, horizons=(2**17, 2**18, 2**19, 2**20, 2**21)), dataset="step-law")


def test_ours_beat_carrying_over_and_published_rules(rolling: Rolling) -> None:
    assert rolling.best in ("two-stage", "joint", "one-stage")
    assert rolling.methods[0] in ("two-stage", "joint", "one-stage")
    ours = rolling.mean(rolling.best)
    assert ours < 0  # between the runs of a grid of octaves lies a better choice than any run
    assert rolling.mean("carried over") > ours
    for name in ("step-law", "deepseek", "porian", "optimal-norm", "power-lines", "bjorck"):
        assert rolling.mean(name) > ours
    (forecast,) = (f for f in rolling.forecasts if f.method == "two-stage")
    assert forecast.tokens == 2**21
    assert forecast.batch == pytest.approx(11.5, abs=0.3)
    assert forecast.lr == pytest.approx(-4 + 0.6 * 0.5 - 0.5, abs=0.3)
    notes = {f.method: f.note for f in rolling.forecasts}
    assert notes["step-law"] == "in-sample"
    assert notes["optimal-norm"] == "calibrated"
    assert notes["bjorck"] == "calibrated, batch carried over"


def test_what_was_left_out_does_not_leak(rolling: Rolling) -> None:
    table = columns(RATES, horizons=(2**17, 2**18, 2**19, 2**20, 2**21))
    last = table["tokens"] == 2**21
    mixed = np.where(last, np.random.default_rng(0).permutation(table["loss"]), table["loss"])
    again = rolling_origin(table | {"loss": mixed}, published=(published("step-law"),))
    before = {f.method: (f.lr, f.batch) for f in rolling.forecasts}
    for forecast in again.forecasts:
        assert (forecast.lr, forecast.batch) == before[forecast.method]


def test_the_default_stage_is_the_one_of_least_regret() -> None:
    table = columns(RATES, batches=(512, 1024, 2048, 4096))
    fit = fit_table(table, bootstraps=100)
    assert fit.rolling is not None
    assert fit.default_stage == fit.rolling.best
    assert fit_table(table).default_stage == "two-stage"
    assert type(fit.rolling).from_dict(fit.rolling.to_dict()).methods == fit.rolling.methods


def test_one_horizon_cannot_be_left_out() -> None:
    with pytest.raises(UserError, match="no model has two horizons"):
        rolling_origin(columns(RATES, horizons=(2**20,)))
