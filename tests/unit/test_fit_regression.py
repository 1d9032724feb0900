"""Censored regression in batches, and censored power laws."""

import numpy as np
import pytest
from scipy import optimize, stats

from disco.errors import UserError
from disco.fit import power_law
from disco.fit._regression import least_squares, tobit

TRUTH = np.array([9.75, 0.62, -0.56])


def optima(rng: np.random.Generator, n: int = 60, scatter: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    design = np.stack([np.ones(n), rng.integers(3, 12, n), rng.integers(29, 37, n)], axis=1).astype(float)
    return design, design @ TRUTH + rng.normal(0, scatter, n)


def test_batched_least_squares_is_lstsq_with_missing_points() -> None:
    rng = np.random.default_rng(0)
    design, y = optima(rng)
    ys = np.stack([y, y + 1, rng.permutation(y)])
    ys[1, :10] = np.nan
    found, variance = least_squares(design, ys)
    for row, there in enumerate(np.isfinite(ys)):
        solution, square, *_ = np.linalg.lstsq(design[there], ys[row, there])
        assert found[row] == pytest.approx(solution)
        assert variance[row] == pytest.approx(square[0] / (there.sum() - 3))
    assert np.isnan(least_squares(design, np.full((1, 60), np.nan))[0]).all()


def test_without_censoring_it_is_least_squares() -> None:
    design, y = optima(np.random.default_rng(1))
    beta, covariance, sigma = tobit(design, y[None], np.zeros((1, 60), dtype=int))
    law = power_law(2**y, {"batch": 2 ** design[:, 1], "tokens": 2 ** design[:, 2]})
    assert beta[0] == pytest.approx([law.intercept, *law.exponents.values()])
    assert sigma[0] == pytest.approx(law.scatter)
    assert np.sqrt(np.diag(covariance[0])) == pytest.approx([law.intercept_error, *law.standard_errors.values()])


def test_it_maximises_the_likelihood() -> None:
    design, y = optima(np.random.default_rng(2))
    side = np.where(y > -3, 1, np.where(y < -8, -1, 0))
    bounded = np.clip(y, -8, -3)

    def minus(parameters: np.ndarray) -> float:
        mean, sigma = design @ parameters[:3], np.exp(parameters[3])
        seen = stats.norm.logpdf(bounded, mean, sigma)
        beyond = stats.norm.logcdf(side * (mean - bounded) / sigma)
        return -float(np.where(side == 0, seen, beyond).sum())

    start = [*np.linalg.lstsq(design, bounded)[0], 0.0]
    best = optimize.minimize(
        minus, start, method="Nelder-Mead", options={"maxiter": 9999, "fatol": 1e-10, "xatol": 1e-8}
    )
    beta, _, sigma = tobit(design, bounded[None], side[None])
    count = int((side == 0).sum())
    assert 3 < 60 - count < 40
    found = [*beta[0], np.log(sigma[0] * np.sqrt((count - 3) / count))]
    assert minus(np.array(found)) == pytest.approx(best.fun, abs=1e-5)
    assert beta[0, 1:] == pytest.approx(best.x[1:3], abs=1e-3)


def test_bounds_remove_the_bias_of_dropping() -> None:
    rng = np.random.default_rng(3)
    design, _ = optima(rng)
    y = design @ TRUTH + rng.normal(0, 0.8, (200, 60))
    side = (y > -5).astype(int)
    bounded = np.minimum(y, -5)
    beta, _, _ = tobit(design, bounded, side)
    dropped, _ = least_squares(design, np.where(side == 0, bounded, np.nan))
    assert abs(dropped[:, 1].mean() - 0.62) > 0.08
    assert beta[:, 1].mean() == pytest.approx(0.62, abs=0.02)
    assert beta[:, 2].mean() == pytest.approx(-0.56, abs=0.02)


def test_censored_law() -> None:
    rng = np.random.default_rng(4)
    design, y = optima(rng)
    x = {"batch": 2 ** design[:, 1], "tokens": 2 ** design[:, 2]}
    side = (y > -4).astype(int)
    law = power_law(2 ** np.minimum(y, -4), x, censored=side)
    assert (law.n, law.censored) == (60 - side.sum(), side.sum())
    low, high = law.interval("batch")
    assert low < 0.62 < high
    assert power_law(2**y, x, censored=0 * side).to_dict() == power_law(2**y, x).to_dict()
    mirrored = power_law(2 ** -np.minimum(y, -4), x, censored=-side)
    assert mirrored.exponents["batch"] == pytest.approx(-law.exponents["batch"])
    with pytest.raises(UserError, match="censored must be 60 values of -1, 0 and"):
        power_law(2**y, x, censored=2 * np.ones(60))
