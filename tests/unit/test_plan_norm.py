"""The norm to expect at the horizon and along the way."""

import math

import numpy as np
import pytest
from synthetic import columns

from disco.fit import NORM, PowerLaw, fit_table, power_law
from disco.guide import plan
from disco.guide._growth import DRIFT, towards_none

RATES = np.arange(-9.0, 2.0)


def grown(noise: float, seed: int = 0) -> dict[str, np.ndarray]:
    """A study whose norms grow with the path length: log2 norm = 1.9 + 0.66 p - 0.012 p^2."""
    rng = np.random.default_rng(seed)
    table = columns(RATES, noise=0.004, rng=rng)
    path = np.log2(table["lr"] * table["tokens"] / table["batch"])
    stray = noise * rng.normal(size=len(path))
    return table | {NORM: 2 ** (_growth(path) + stray)}


def _growth(path: np.ndarray | float) -> np.ndarray | float:
    return 1.9 + 0.66 * path - 0.012 * path**2


def test_the_way_follows_the_growth_of_the_sweep() -> None:
    found = plan(fit_table(grown(0.05)), 2**22)
    assert [mark.tokens for mark in found.norms] == [2**k for k in range(15, 23)]
    for mark in found.norms:
        expected = float(_growth(math.log2(found.lr.value * mark.tokens / found.batch.value)))
        assert math.log2(mark.norm) == pytest.approx(expected, abs=0.06)
        low, high = map(math.log2, mark.interval)
        assert low < expected < high
        if mark.tokens >= 2**18:  # where there were runs
            assert 2 * 1.6 * 0.05 < high - low < 2 * 2.6 * 0.05
        assert not mark.extrapolated


def test_a_way_beyond_all_runs_is_marked() -> None:
    assert plan(fit_table(grown(0.05)), 2**28).norms[-1].extrapolated


def test_no_norms_no_way() -> None:
    table = columns(RATES)
    del table[NORM]
    found = plan(fit_table(table), 2**22)
    assert found.norms == ()
    assert math.isnan(found.norm.value)
    few = columns(RATES, batches=(2048,), horizons=(2**20,))
    one = grown(0.05)
    one = {name: values[one["tokens"] == 2**20] for name, values in one.items()}
    assert plan(fit_table(one), 2**21).norms == ()  # path, rate and batch move together: growth is not told from them
    keep = np.abs(np.log2(few["lr"]) + 4) < 3
    assert plan(fit_table({name: values[keep] for name, values in few.items()}), 2**21).norms == ()


def test_interval_of_the_norm_widens_with_the_reach_and_holds_the_truth() -> None:
    fit = fit_table(columns(RATES, drift=0.1, noise=0.004, rng=np.random.default_rng(1)), bootstraps=200)
    widths = []
    for octaves in (1, 2, 3):
        norm = plan(fit, 2 ** (21 + octaves)).norm
        assert norm.interval is not None
        low, high = map(math.log2, norm.interval)
        assert low < 6 + 0.1 * (1 + octaves) < high
        widths.append(high - low)
    assert widths == sorted(widths)


def test_norm_at_a_batch_that_is_not_the_best() -> None:
    """Optimal norms that fall by 0.3 octaves per doubling of the batch."""
    table = columns(RATES)
    table |= {NORM: table[NORM] * (table["batch"] / 2**11) ** -0.3}
    fit = fit_table(table)
    best, small = plan(fit, 2**22), plan(fit, 2**22, batch=2**10)
    assert math.log2(small.norm.value) == pytest.approx(6 + 0.3, abs=0.1)
    assert math.log2(best.norm.value) == pytest.approx(6 - 0.3, abs=0.1)
    assert "for the batch" in small.norm.why


def test_a_slope_is_drawn_towards_none_by_how_little_is_known_of_it() -> None:
    def law(noise: float) -> PowerLaw:
        x = 2.0 ** np.arange(4)
        return power_law(2 ** (5 + 0.3 * np.arange(4) + noise * np.array([1, -2, 1, 0.5])), {"tokens": x})

    for noise in (0.01, 0.5):
        raw = law(noise)
        drawn = towards_none(raw)
        error = raw.standard_errors["tokens"]
        share = DRIFT**2 / (DRIFT**2 + error**2)
        assert drawn.exponents["tokens"] == pytest.approx(raw.exponents["tokens"] * share)
        assert drawn.standard_errors["tokens"] == pytest.approx(error * math.sqrt(share))
