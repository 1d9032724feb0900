"""disco.fit.joint and disco.fit.near_optimal."""

import math
import tracemalloc

import numpy as np
import pytest

from disco.errors import UserError
from disco.fit import Joint, NearOptimal, joint, near_optimal

RATES, BATCHES = np.arange(-9.0, 0.1), np.arange(8.0, 15.1)


def bowl(noise: float = 0.0, centre: tuple[float, float] = (-4.3, 11.4), skew: float = 0.0, seed: int = 0) -> tuple:
    """Rates, batches and losses of a grid: 0.05 (u - u0 - 0.4 (v - v0))^2 + 0.02 (v - v0)^2 + 2, cubic by ``skew``."""
    u, v = (grid.ravel() for grid in np.meshgrid(RATES, BATCHES))
    off, away = u - centre[0] - 0.4 * (v - centre[1]), v - centre[1]
    loss = 2 + 0.05 * off**2 * np.exp(skew * off) + 0.02 * away**2 * np.exp(skew * away)
    return 2.0**u, 2.0**v, loss + np.random.default_rng(seed).normal(0, noise, len(u))


def test_an_exact_bowl() -> None:
    found = joint(*bowl())
    assert (found.lr, found.batch, found.loss) == pytest.approx((-4.3, 11.4, 2.0))
    assert found.ridge == pytest.approx(0.4)
    assert found.flags == ()
    assert found.usable
    assert 20 < found.n < len(RATES) * len(BATCHES)  # local
    assert joint(*bowl(), within=0.2).n > found.n


def test_rows_may_be_shuffled_but_not_columns() -> None:
    lr, batch, loss = bowl(0.005)
    order = np.random.default_rng(1).permutation(len(lr))
    assert joint(lr[order], batch[order], loss[order]).lr == pytest.approx(joint(lr, batch, loss).lr)
    mixed = joint(lr, batch, loss[order])
    assert "no-minimum" in mixed.flags or abs(mixed.lr + 4.3) > 0.3 or "flat" in mixed.flags


def test_edges() -> None:
    assert joint(*bowl(centre=(-4.3, 16.5))).flags == ("edge-high-batch",)
    assert joint(*bowl(centre=(1.5, 11.4))).flags == ("edge-high-lr",)
    low = joint(*bowl(centre=(-4.3, 6.5)))
    assert low.flags == ("edge-low-batch",)
    assert math.isnan(low.lr)
    assert low.lr_interval is None
    lr, batch, loss = bowl()
    assert joint(lr, batch, -loss).flags == ("no-minimum",)
    assert joint(lr[:8], batch[:8], loss[:8]).flags == ("few-points",)
    flat = joint(lr, batch, 2 + np.random.default_rng(3).normal(0, 0.01, len(lr)))
    assert not flat.usable


def test_diverged_runs_take_no_part() -> None:
    lr, batch, loss = bowl()
    gone = np.where(np.log2(lr) > -2, math.nan, loss)
    assert joint(lr, batch, gone).lr == pytest.approx(-4.3)


def test_intervals_cover() -> None:
    """90% over the noise, for lopsided bowls too, which a quadratic cannot follow."""
    for skew in (0.0, 0.1, 0.2):
        inside = np.zeros(2)
        for seed in range(100):
            found = joint(*bowl(0.01, skew=skew, seed=seed))
            assert found.lr_interval is not None
            assert found.batch_interval is not None
            inside += (
                found.lr_interval[0] <= -4.3 <= found.lr_interval[1],
                found.batch_interval[0] <= 11.4 <= found.batch_interval[1],
            )
        assert np.all(inside / 100 >= 0.85)
        assert np.all(inside / 100 <= 0.99)


def test_the_place_on_the_grid_does_not_move_a_lopsided_optimum() -> None:
    """Wherever the best batch lies among the batches; a bowl with a cubic was off by up to 0.14 octaves."""
    off = []
    for centre in np.arange(10.0, 12.6, 0.5):
        lr, batch, loss = bowl(0.002, centre=(-4.3 + 0.4 * (centre - 11.4), centre), skew=0.25)
        found = joint(lr, batch, loss)
        assert found.batch_interval is not None
        assert found.batch_interval[0] < centre < found.batch_interval[1]
        off.append(found.batch - centre)
    assert np.max(np.abs(off)) < 0.12
    assert abs(np.polyfit(np.arange(6) * 0.5, off, 1)[0]) < 0.05


def test_rounding_does_not_move_it() -> None:
    lr, batch, loss = bowl(0.01, skew=0.1)
    found, again = joint(lr, batch, loss), joint(lr, batch, loss + 1e-9 * np.sin(np.arange(len(loss))))
    assert (again.lr, again.batch) == pytest.approx((found.lr, found.batch), abs=1e-6)
    assert again.batch_interval == pytest.approx(found.batch_interval, abs=1e-6)


def test_many_runs_take_little_memory() -> None:
    """20,000 runs: nothing of runs x runs is made."""
    rng = np.random.default_rng(0)
    u, v = rng.uniform(-9, 0, 20_000), rng.uniform(8, 15, 20_000)
    loss = 2 + 0.05 * (u + 4.3 - 0.4 * (v - 11.4)) ** 2 + 0.02 * (v - 11.4) ** 2 + rng.normal(0, 0.01, len(u))
    tracemalloc.start()
    found = joint(2**u, 2**v, loss)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.batch == pytest.approx(11.4, abs=0.05)
    assert peak < 100e6


def test_near_optimal_region_of_an_exact_bowl() -> None:
    near = near_optimal(*bowl(), tolerance=0.02)
    assert near.tolerance == 0.02
    # Along the ridge the loss rises by 0.02 (v - 11.4)^2: one octave costs the tolerance.
    assert math.log2(near.largest) == pytest.approx(12.4, abs=0.05)
    assert math.log2(near.smallest) == pytest.approx(10.4, abs=0.05)
    assert near.bounded
    costs = {round(math.log2(item.batch)): item.cost for item in near.batches}
    assert costs[12] == pytest.approx(0.02 * 0.6**2)
    assert costs[13] == pytest.approx(0.02 * 1.6**2)
    twelve = next(item for item in near.batches if item.batch == 4096)
    half = math.sqrt((0.02 - costs[12]) / 0.05)
    assert twelve.lr_range == pytest.approx((-4.06 - half, -4.06 + half))
    assert next(item for item in near.batches if item.batch == 8192).lr_range is None


def test_near_optimal_is_honest_about_noise() -> None:
    near = near_optimal(*bowl(0.01), tolerance=0.02)
    assert near.largest_sure < near.largest
    for item in near.batches:
        assert item.cost_interval[0] <= item.cost <= item.cost_interval[1]
    lr, batch, loss = bowl(0.01)
    assert near_optimal(lr, batch, loss).tolerance == pytest.approx(0.01, rel=0.4)  # default: the noise of one run
    cut = batch <= 2**12
    short = near_optimal(lr[cut], batch[cut], loss[cut], tolerance=0.5)
    assert not short.bounded
    assert short.largest == pytest.approx(2**12)


def test_largest_sure_costs_more_than_the_tolerance_rarely() -> None:
    """It is an upper end of a 90% interval, so one-sided 5%."""
    wrong = 0
    for seed in range(100):
        near = near_optimal(*bowl(0.01, seed=seed), tolerance=0.02)
        if math.isfinite(near.largest_sure):
            wrong += 0.02 * (math.log2(near.largest_sure) - 11.4) ** 2 > 0.02
    assert wrong <= 0.1 * 100


def test_errors_and_dictionaries() -> None:
    lr, batch, loss = bowl()
    with pytest.raises(UserError, match="must be vectors of one length"):
        joint(lr[1:], batch, loss)
    with pytest.raises(UserError, match=r"lr must be positive, got 0.0 at index 0"):
        joint(np.where(np.arange(len(lr)) == 0, 0.0, lr), batch, loss)
    with pytest.raises(UserError, match="tolerance must be a positive number of nats, got 0"):
        near_optimal(lr, batch, loss, tolerance=0)
    found, near = joint(lr, batch, loss + 1e-3 * np.sin(7 * loss)), near_optimal(*bowl(0.01))
    assert Joint.from_dict(found.to_dict()) == found
    assert NearOptimal.from_dict(near.to_dict()) == near
    assert near_optimal(lr, batch, -loss).flags == ("no-minimum",)
