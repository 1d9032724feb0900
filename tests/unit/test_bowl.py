"""The six-term quadratic and the rows near a minimum."""

import json
import math

import numpy as np
import pytest

from disco.errors import UserError
from disco.fit._bowl import Bowl, bowl
from disco.fit._selection import near_minimum

U, V = (grid.ravel() for grid in np.meshgrid(np.arange(-8.0, -2.0), np.arange(8.0, 13.0), indexing="ij"))


def loss(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Minimum 2.5 at (-5.2, 10.3), a ridge between."""
    s, t = u + 5.2, v - 10.3
    return 2.5 + 0.05 * s**2 - 0.06 * s * t + 0.03 * t**2


def test_an_exact_bowl_is_found() -> None:
    found = bowl(U, V, loss(U, V))
    assert found.vertex == pytest.approx((-5.2, 10.3))
    assert found.value == pytest.approx(2.5)
    assert found.coefficients[3:] == pytest.approx((0.05, -0.06, 0.03))
    assert found.centre == pytest.approx((U.mean(), V.mean()))
    assert (found.n, found.freedom, found.is_minimum, found.interior) == (30, 24, True, True)
    assert found.variance == pytest.approx(0, abs=1e-25)
    np.testing.assert_allclose(found.at(U, V), loss(U, V))
    np.testing.assert_allclose(found.hessian, [[0.1, -0.06], [-0.06, 0.06]])
    assert Bowl.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_errors_are_those_of_ordinary_least_squares() -> None:
    rng = np.random.default_rng(0)
    y = loss(U, V) + rng.normal(0, 0.01, U.size)
    found = bowl(U, V, y)
    s, t = U - U.mean(), V - V.mean()
    X = np.stack([np.ones_like(s), s, t, s * s, s * t, t * t], axis=1)
    beta = np.linalg.solve(X.T @ X, X.T @ y)
    variance = ((y - X @ beta) ** 2).sum() / (30 - 6)
    np.testing.assert_allclose(found.coefficients, beta, rtol=1e-9)
    assert found.variance == pytest.approx(variance)
    np.testing.assert_allclose(found.covariance, variance * np.linalg.inv(X.T @ X), rtol=1e-8, atol=1e-15)


def test_weights_count_as_repeats() -> None:
    rng = np.random.default_rng(1)
    y = loss(U, V) + rng.normal(0, 0.01, U.size)
    twice = np.arange(U.size) % 3 == 0
    weighted = bowl(U, V, y, np.where(twice, 2.0, 1.0))
    repeated = bowl(*(np.concatenate([values, values[twice]]) for values in (U, V, y)))
    assert weighted.vertex == pytest.approx(repeated.vertex)
    assert weighted.value == pytest.approx(repeated.value)


def test_a_scale_of_nature_does_not_matter() -> None:
    """log2 of tokens lies far from 0 and in a narrow range; the fit is about the mean point."""
    far = bowl(U / 8 - 1000, V / 8 + 1000, loss(U, V))
    assert far.vertex == pytest.approx((-5.2 / 8 - 1000, 10.3 / 8 + 1000), abs=1e-9)


def test_hull_and_saddle() -> None:
    found = bowl(U, V, loss(U, V))
    assert found.contains(-8, 8)
    assert found.contains(-3, 12)
    assert not found.contains(-8.001, 8)
    assert not found.contains(-3, 12.001)
    assert not found.contains(math.nan, 10)
    corner = U + V < 4.5  # a triangle: what is inside its bounding box need not be among the points
    triangle = bowl(U[corner], V[corner], loss(U, V)[corner])
    assert not triangle.contains(-3, 11)
    assert triangle.contains(-6, 9)
    saddle = bowl(U, V, (U + 5) ** 2 - (V - 10) ** 2)
    assert (saddle.is_minimum, saddle.vertex) == (False, pytest.approx((-5, 10)))
    assert not bowl(U, V, -loss(U, V)).is_minimum
    beyond = bowl(U, V, loss(U + 4, V + 4))
    assert (beyond.is_minimum, beyond.interior) == (True, False)
    valley = bowl(U, V, (U - V) ** 2)
    assert not valley.interior


@pytest.mark.parametrize(
    ("u", "v", "y", "weights", "why"),
    [
        (U[:5], V[:5], U[:5], None, "6 terms need at least as many points, got 5"),
        (U, V[:-1], U, None, "vectors of one length"),
        (U, V, U, np.ones(3), "vectors of one length"),
        (U, V, np.full_like(U, np.nan), None, "must be finite"),
        (U, V, U, -np.ones_like(U), "weights positive"),
        (U, np.full_like(U, 8.0), U, None, "6 distinct u and 1 distinct v do not determine a bowl"),
        (U, np.where(V > 10, 11.0, 9.0), U, None, "6 distinct u and 2 distinct v do not determine a bowl"),
        (U, U + 1, U, None, "do not determine a bowl"),
        (np.cos(U), np.sin(U), U, None, "do not determine a bowl"),
    ],
)
def test_what_is_no_bowl(u: np.ndarray, v: np.ndarray, y: np.ndarray, weights: np.ndarray | None, why: str) -> None:
    with pytest.raises(UserError, match=why):
        bowl(u, v, y, weights)


def test_six_points_fit_without_an_error() -> None:
    six = [0, 2, 4, 11, 13, 29]
    found = bowl(U[six], V[six], loss(U, V)[six])
    assert found.vertex == pytest.approx((-5.2, 10.3))
    assert math.isnan(found.variance)
    assert found.to_dict()["covariance"][0][0] is None


def test_rows_near_the_minimum_of_their_cell() -> None:
    y = [2.0, 2.004, 2.006, 3.0, 3.007, 3.008, math.nan, math.inf]
    cell = ["a", "a", "a", "b", "b", "b", "a", "c"]
    assert near_minimum(y, 0.0025, [cell]).tolist() == [True, True, False, True, True, False, False, False]
    assert near_minimum(y, 0.0025).tolist() == [True, True] + [False] * 6
    split = [1, 1, 2, 1, 1, 1, 1, 1]
    assert near_minimum(y, 0.0025, [cell, split]).tolist() == [True, True, True, True, True, False, False, False]
    assert near_minimum([], 0.1).tolist() == []


@pytest.mark.parametrize("within", [0, -0.1, math.nan, math.inf])
def test_a_fraction_is_positive(within: float) -> None:
    with pytest.raises(UserError, match="within must be a positive fraction"):
        near_minimum([1.0], within)
    with pytest.raises(UserError, match="one length"):
        near_minimum([1.0, 2.0], 0.1, [[1]])
    with pytest.raises(UserError, match="needs positive losses, got -1"):
        near_minimum([1.0, -1.0], 0.1)
