"""disco.fit.optimum: the minimum of a loss curve, its interval, and its refusals."""

import math

import numpy as np
import pytest

from disco.errors import UserError
from disco.fit import Optimum, optimum
from disco.fit._noise import Noise
from disco.fit._optimum import variants

GRID = np.arange(-8.0, 1.0)


def bowl(x: np.ndarray, centre: float = -3.3, curvature: float = 0.08, low: float = 2.5) -> np.ndarray:
    return low + curvature * (x - centre) ** 2


def test_quadratic_recovers_an_exact_parabola() -> None:
    found = optimum(GRID, bowl(GRID))
    assert (found.x, found.y, found.curvature) == pytest.approx((-3.3, 2.5, 0.08), abs=1e-9)
    assert found.nearest == 5  # GRID[5] is -3
    assert found.flags == ()
    assert found.usable
    assert found.model == "quadratic"
    assert found.interval is not None  # exact losses on whole octaves still leave open how lopsided the curve is
    assert found.interval[0] < -3.3 < found.interval[1]
    assert 0.1 < found.interval[1] - found.interval[0] < 0.3
    assert found.n == found.effective == 5  # the five nearest of a grid of whole octaves


def test_paper_is_the_parabola_through_the_anchor() -> None:
    a, b, anchor = 0.13, -2.0, 11.0
    x = np.linspace(5, 11, 13)
    found = optimum(x, a * x**2 + b * x + anchor, recipe="paper", anchor=anchor)
    assert found.x == pytest.approx(-b / (2 * a))
    assert found.y == pytest.approx(anchor - b**2 / (4 * a))
    assert found.n == 7
    assert x[found.nearest or 0] == pytest.approx(7.5)


def test_paper_takes_the_seven_nearest_to_the_lowest_and_weights_them() -> None:
    rng = np.random.default_rng(3)
    x = np.linspace(4, 10, 15)
    y = 4 + 0.1 * (x - 7.2) ** 2 + rng.normal(0, 0.02, 15)
    sigma = rng.uniform(0.01, 0.1, 15)
    near = np.argsort(np.abs(x - x[np.argmin(y)]))[:7]
    rows = np.stack([x[near] ** 2, x[near]], axis=1) / sigma[near, None]
    a, b = np.linalg.lstsq(rows, (y[near] - 11) / sigma[near])[0]
    found = optimum(x, y, sigma, "paper", 11.0)
    assert found.x == pytest.approx(-b / (2 * a))
    assert found.effective == pytest.approx(np.sum(sigma[near] ** -2.0) ** 2 / np.sum(sigma[near] ** -4.0))
    assert found.x != pytest.approx(optimum(x, y, None, "paper", 11.0).x, abs=1e-3)


def test_all_zero_sigma_means_equal_weights_and_one_zero_no_infinite_one() -> None:
    y = bowl(GRID) + 0.01 * np.cos(5 * GRID)
    assert optimum(GRID, y, np.zeros(9)) == optimum(GRID, y)
    one = optimum(GRID, y, np.where(np.arange(9) == 4, 0.0, 0.01))
    assert one.x == pytest.approx(optimum(GRID, y).x)
    assert one.effective == pytest.approx(5, abs=0.1)


def test_one_lucky_small_sigma_does_not_collapse_the_sample() -> None:
    sigma = np.where(np.arange(9) == 5, 1e-5, 0.01)
    assert optimum(GRID, bowl(GRID), sigma).effective == pytest.approx(5)
    assert optimum(GRID + 9, bowl(GRID), sigma, "paper", 11.0).effective < 1.01  # as the recipe says, and shown


def test_order_does_not_matter_but_pairing_does() -> None:
    rng = np.random.default_rng(0)
    y = bowl(GRID) + rng.normal(0, 0.005, 9)
    order = rng.permutation(9)
    straight, shuffled = optimum(GRID, y), optimum(GRID[order], y[order])
    assert shuffled.x == pytest.approx(straight.x)
    assert order[shuffled.nearest or 0] == straight.nearest
    assert optimum(GRID, y[order]).x != pytest.approx(straight.x)


def test_seeds_are_repeats_of_x() -> None:
    x = np.repeat(GRID, 3)
    y = bowl(x) + np.random.default_rng(1).normal(0, 0.01, len(x))
    found = optimum(x, y)
    assert found.n == 15
    assert found.sigma == pytest.approx(0.01, rel=0.5)
    assert found.interval is not None
    single = optimum(GRID, y[::3]).interval
    assert single is not None
    assert np.diff(found.interval)[0] < np.diff(single)[0]


@pytest.mark.parametrize(("centre", "flag"), [(-9.0, "edge-low"), (2.0, "edge-high")])
@pytest.mark.parametrize("recipe", ["quadratic", "paper"])
def test_minimum_outside_the_grid(centre: float, flag: str, recipe: str) -> None:
    shift = 0 if recipe == "quadratic" else 14
    found = optimum(GRID + shift, bowl(GRID, centre), recipe=recipe, anchor=11.765)  # type: ignore[arg-type]
    assert flag in found.flags
    assert not found.usable
    if recipe == "quadratic":
        assert math.isnan(found.x)
        assert found.interval is None
        assert found.nearest == (0 if flag == "edge-low" else 8)


def test_edges_are_of_distinct_x() -> None:
    x = np.array([-3.0, -2, -1, 0, 0, 0])
    found = optimum(x, np.array([4, 3, 2, 1.2, 1.1, 1.0]))
    assert "edge-high" in found.flags


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_diverged_runs_bound_the_grid(value: float) -> None:
    y = bowl(GRID, -1.2)
    y[8] = value  # 2^0 diverged; the minimum is next to it
    found = optimum(GRID, y)
    assert found.flags == ()
    assert found.x == pytest.approx(-1.2)
    y[7] = value  # now -2 is the lowest that lived: bracketed by -1, which diverged, but not measured
    found = optimum(GRID, y)
    assert "edge-high" not in found.flags
    assert found.flags == ("no-minimum",)
    assert math.isnan(found.x)
    assert found.nearest == 6
    # The same runs left out of the table would be an edge.
    assert "edge-high" in optimum(GRID[:7], y[:7]).flags


@pytest.mark.parametrize(("diverged", "flag"), [(12.0, "no-minimum"), (10.5, "edge-high"), (math.inf, "no-minimum")])
def test_recipes_agree_on_a_minimum_beyond_the_last_run(diverged: float, flag: str) -> None:
    a, centre = 0.08, 10.8
    x = np.append(np.arange(4.0, 11.0), diverged)
    y = np.append(2.5 + a * (x[:-1] - centre) ** 2, math.inf)
    anchor = 2.5 + a * centre**2
    for recipe in ("quadratic", "paper"):
        found = optimum(x, y, recipe=recipe, anchor=anchor)  # type: ignore[arg-type]
        assert found.flags == (flag,), recipe
        assert not found.usable


def test_a_diverged_run_without_a_norm_is_at_infinity() -> None:
    x = np.append(GRID, math.inf)
    falling = np.append(bowl(GRID, 0.0), math.inf)
    assert "edge-high" not in optimum(x, falling).flags
    assert "edge-high" in optimum(GRID, falling[:-1]).flags


def test_missing_x_is_left_out() -> None:
    x, y = np.append(GRID, math.nan), np.append(bowl(GRID), 0.0)
    assert optimum(x, y) == optimum(GRID, bowl(GRID))


def test_a_curve_that_is_level_or_turns_down_has_no_minimum() -> None:
    assert optimum(GRID, np.full(9, 2.5)).flags == ("edge-low", "flat", "no-minimum")
    down = optimum(GRID, 3 - 0.01 * (GRID + 4) ** 2)
    assert "no-minimum" in down.flags
    assert math.isnan(down.x)


def test_noise_larger_than_the_bowl_is_flat() -> None:
    y = bowl(GRID, -4, curvature=0.002) + np.array([0.3, -0.2, 0.1, 0.2, -0.25, 0.2, -0.1, 0.25, -0.05])
    found = optimum(GRID, y)
    assert "flat" in found.flags
    assert found.interval is None


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_points(count: int) -> None:
    x = GRID[3 : 3 + count]
    found = optimum(x, bowl(x))
    assert "few-points" in found.flags
    assert found.interval is None
    assert found.nearest == (None if count == 0 else min(count - 1, 2))


def test_a_grid_of_diverged_runs() -> None:
    found = optimum(GRID, np.full(9, math.inf))
    assert found.nearest is None
    assert found.flags == ("few-points", "no-minimum")


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"one length, got shapes \(9,\), \(3,\)"):
        optimum(GRID, [1, 2, 3])
    with pytest.raises(UserError, match="'paper' needs anchor"):
        optimum(GRID, bowl(GRID), recipe="paper")
    with pytest.raises(UserError, match="got 'cubic'"):
        optimum(GRID, bowl(GRID), recipe="cubic")  # type: ignore[arg-type]


def test_dictionary_and_back() -> None:
    for found in (optimum(GRID, bowl(GRID)), optimum(GRID, bowl(GRID, 3))):
        values = found.to_dict()
        assert Optimum.from_dict(values).to_dict() == values
    assert values["x"] is None
    assert isinstance(values["flags"], list)


def test_a_cubic_where_the_points_ask_for_it() -> None:
    """With noise of a known size by AIC, else by AICc, which is slow to ask with few points."""
    x = np.arange(-7.0, -1.5, 0.5)
    u = x + 4.2
    lopsided = 2.5 + 0.1 * (u**2 + 0.3 * u**3)
    noise = np.random.default_rng(2).normal(0, 0.003, len(x))
    found = optimum(x, lopsided + noise, noise=0.003)
    assert found.model == "cubic"
    assert found.x == pytest.approx(-4.2, abs=0.05)
    parabola = np.polyfit(x, lopsided, 2)
    assert abs(-parabola[1] / (2 * parabola[0]) + 4.2) > 0.15  # what a plain parabola makes of it
    assert optimum(x, bowl(x, -4.2) + noise, noise=0.003).model == "quadratic"
    assert optimum(x, lopsided + noise).model == "cubic"
    assert optimum(x[2:9], bowl(x, -4.2)[2:9] + noise[2:9]).model == "quadratic"


def test_known_noise_narrows_or_widens_the_interval() -> None:
    y = bowl(GRID) + np.random.default_rng(4).normal(0, 0.01, 9)
    widths = [np.diff(f.interval)[0] for f in (optimum(GRID, y, noise=s) for s in (0.002, 0.01, 0.03)) if f.interval]
    assert len(widths) == 3
    assert widths[0] < widths[1] < widths[2]
    exact, vague = optimum(GRID, y, noise=0.01), optimum(GRID, y, noise=Noise(0.01, 2))
    assert exact.interval is not None
    assert vague.interval is not None
    assert np.diff(exact.interval)[0] < np.diff(vague.interval)[0]
    with pytest.raises(UserError, match="noise must be a positive standard deviation, got 0"):
        optimum(GRID, y, noise=0.0)


def test_two_valleys_are_told_from_noise() -> None:
    x = np.arange(-8.0, 1.0)
    double = 2.5 + 0.02 * ((x + 4) ** 2 - 5) ** 2 / 5
    assert "multi-modal" in optimum(x, double).flags
    assert "multi-modal" in optimum(x, double, noise=0.02).flags
    assert "multi-modal" not in optimum(x, double, noise=0.2).flags
    rng = np.random.default_rng(11)
    for noise in (0.02, None):
        found = [optimum(x, bowl(x) + rng.normal(0, 0.02, 9), noise=noise).flags for _ in range(200)]
        assert sum("multi-modal" in flags for flags in found) <= 4


def test_a_dip_before_a_jump_is_no_minimum() -> None:
    """A scan of Step Law (arXiv:2503.04715; 215M parameters, 4e9 tokens, batch 393,216): a cubic around the jump."""
    x = np.arange(-11, -5.4, 0.5)
    y = np.array([2.682, 2.671, 2.655, 2.646, 2.635, 2.633, 2.636, 2.696, 2.711, 6.829, 6.512, 6.399])
    noise = Noise(0.0074, 96)
    found = optimum(x, y, noise=noise)
    assert found.flags == ("no-minimum",)
    assert math.isnan(found.x)
    assert found.nearest == 5
    smooth = optimum(x[:9], y[:9], noise=noise)
    assert smooth.usable
    assert smooth.x == pytest.approx(-8.8, abs=0.3)
    assert smooth.y == pytest.approx(2.632, abs=0.005)


def test_ordinary_scans_have_a_minimum() -> None:
    rng = np.random.default_rng(3)
    x = np.arange(-7.0, 0.0)
    for ratio in (-0.35, 0.0, 0.35):  # cubic coefficient relative to the quadratic one, per octave
        for noise in (0.01, 0.05, 0.2):
            for centre in rng.uniform(-4.5, -2.5, 20):
                y = (x - centre) ** 2 + ratio * (x - centre) ** 3 + 0.06 * (x - centre) ** 4 + rng.normal(0, noise, 7)
                assert "no-minimum" not in optimum(x, y, noise=Noise(noise, 20)).flags


def test_one_bad_run_loses_weight() -> None:
    x = np.arange(-6.0, -0.4, 0.5)
    y = bowl(x) + np.random.default_rng(5).normal(0, 0.004, len(x))
    spoilt = y.copy()
    spoilt[4] += 0.15  # at -4, within an octave of the minimum
    found = optimum(x, spoilt, noise=Noise(0.004, 20))
    assert found.effective < found.n - 0.5
    assert found.x == pytest.approx(-3.3, abs=0.12)
    plain = np.polyfit(x[2:9], spoilt[2:9], 2)
    assert abs(-plain[1] / (2 * plain[0]) + 3.3) > 0.15
    assert optimum(x, y, noise=Noise(0.004, 20)).effective == pytest.approx(found.n)


def test_variants_side_by_side() -> None:
    x = np.linspace(4, 10, 13)
    y = 2.5 + 0.1 * (x - 7.1) ** 2 + np.random.default_rng(8).normal(0, 0.01, 13)
    sigma, anchor = np.linspace(0.01, 0.03, 13), 2.5 + 0.1 * 7.1**2
    table = variants(x, y, sigma, anchor, lr=x - 11)
    assert len(table) == 12 + 1 + 6 + 1
    assert table["anchor, 1/sigma^2, 7 points"].x == pytest.approx(optimum(x, y, sigma, "paper", anchor).x)
    free = np.polyfit(x, y, 2)
    assert table["free, equal, all points"].x == pytest.approx(-free[1] / (2 * free[0]))
    assert table["lr: free, equal, all points"].x == pytest.approx(table["free, equal, all points"].x - 11)
    assert table["local"] == optimum(x, y, sigma)
    assert [table[f"free, equal, {k} points"].n for k in (5, 7, "all")] == [5, 7, 13]
    bare = variants(x, y, np.zeros(13))
    assert list(bare) == [*(f"free, equal, {k} points" for k in (5, 7, "all")), "local"]


def test_variants_of_an_edge_are_flagged() -> None:
    table = variants(GRID, bowl(GRID, 2.0))
    assert all("edge-high" in found.flags for found in table.values())
    assert not any(found.usable for found in table.values())
