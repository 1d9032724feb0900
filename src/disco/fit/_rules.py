"""Power laws by least squares in logarithms, and predictions from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from disco.errors import UserError
from disco.fit._noise import effective
from disco.fit._regression import tobit
from disco.fit._result import Result


@dataclass(frozen=True)
class Prediction(Result):
    """A predicted log2 value and its prediction interval (parameters and scatter)."""

    log2: float
    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw(Result):
    """log2 y = intercept + sum of exponent log2 x, with one entry "a:b" per product of logarithms, if any."""

    exponents: dict[str, float]
    standard_errors: dict[str, float]
    intercept: float
    """log2 of y where every x is 1."""
    intercept_error: float
    r2: float
    scatter: float
    """Standard deviation of log2 y around the law, in octaves."""
    n: int
    warnings: tuple[str, ...]
    covariance: tuple[tuple[float, ...], ...]
    """Of the intercept and ``terms``, in this order."""
    censored: int = 0
    """Points known only to lie beyond a bound; not counted in ``n``."""
    misfit: float = math.nan
    """Scatter around the law that the noise of the runs does not explain, in octaves; NaN without resamples."""
    bootstraps: int = 0
    """Resamples of whole runs behind the standard errors; 0: they come from the scatter of the points."""
    degrees: float = math.nan
    """Effective degrees of freedom of resampled standard errors, which rest on runs and points both; otherwise NaN."""
    terms: tuple[str, ...] = ()
    """Names of the exponents in the order of ``covariance``; a file may have sorted those of a dictionary."""

    @property
    def freedom(self) -> int:
        """Points minus parameters."""
        return self.n - len(self.covariance)

    def quantile(self, confidence: float) -> float:
        """Standard errors to either side of an estimate (Student's t); infinite with as many parameters as points."""
        return _student(confidence, self.freedom if math.isnan(self.degrees) else self.degrees)

    def interval(self, name: str, confidence: float = 0.9) -> tuple[float, float]:
        """Confidence interval of one exponent (Student's t); NaN with as many parameters as points."""
        half = self.quantile(confidence) * self.standard_errors[name]
        return self.exponents[name] - half, self.exponents[name] + half

    def predict(self, values: Mapping[str, float], confidence: float = 0.9) -> Prediction:
        """Prediction interval of log2 y at ``{name: x}`` (x as given to the fit, not its logarithm)."""
        names = self.terms or tuple(self.exponents)
        row = np.array([1.0, *(_term(name, values) for name in names)])
        log2 = float(row @ np.array([self.intercept, *(self.exponents[name] for name in names)]))
        if self.freedom < 1:
            return Prediction(log2, -math.inf, math.inf)
        # What is predicted is the true optimum: of the scatter only what noise does not explain applies to it.
        around = self.scatter if math.isnan(self.misfit) else self.misfit
        variance = float(row @ np.array(self.covariance) @ row) + around**2
        half = self.quantile(confidence) * math.sqrt(max(variance, 0.0))
        return Prediction(log2, log2 - half, log2 + half)


def _student(confidence: float, freedom: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, freedom)) if freedom > 0 else math.inf


def _term(name: str, values: Mapping[str, float]) -> float:
    return math.prod(math.log2(values[part]) for part in name.split(":"))


def power_law(
    y: ArrayLike,
    x: Mapping[str, ArrayLike],
    weights: ArrayLike | None = None,
    interactions: bool = False,
    censored: ArrayLike | None = None,
) -> PowerLaw:
    """Fits log2 y = intercept + sum_i e_i log2 x_i by (weighted) least squares.

    Args:
        y: Positive values, for instance optimal learning rates.
        x: Positive values by name, for instance ``{"batch": ..., "tokens": ...}``.
        weights: Relative weights, one per point; None means equal ones.
        interactions: Add the product log2 x_i log2 x_j of every pair, named "i:j". The other exponents are then those
            where the partner is 1, far from the data; the product's own does not depend on units.
        censored: Per point 0 (measured), +1 (the truth lies above y, as for an optimum beyond the largest learning
            rate of a grid) or -1 (below). Maximum likelihood for normal scatter (Tobin 1958) then takes the place of
            least squares, which it equals when nothing is censored.

    Returns:
        The law. Standard errors come from the scatter of the points, taken as independent; horizons of one run are
        not quite (arXiv:2510.03871 fits them so), which makes them too small.

    Raises:
        UserError: lengths differ, a value is not positive and finite, fewer points than parameters, or a column that
            does not vary or is a combination of the others.
    """
    target = _log2("y", y)
    columns = {name: _log2(name, values) for name, values in x.items()}
    for name, column in columns.items():
        if len(column) != len(target):
            raise UserError(f"power_law: {name} has {len(column)} values and y has {len(target)}; they must match")
        if ":" in name:
            raise UserError(f"power_law: a name must not contain ':', which marks a product, got {name!r}")
    if interactions:
        pairs = itertools.combinations(tuple(columns), 2)
        columns |= {f"{a}:{b}": columns[a] * columns[b] for a, b in pairs}
    weight = np.ones(len(target)) if weights is None else np.asarray(weights, dtype=float)
    if weight.shape != target.shape or not np.all(np.isfinite(weight) & (weight > 0)):
        raise UserError(f"power_law: weights must be {len(target)} positive numbers, got shape {weight.shape}")
    weight = weight / weight.mean() if len(weight) else weight

    side = _sides(censored, len(target))
    everything, bounds, weights_of_all = np.stack([np.ones_like(target), *columns.values()], axis=1), target, weight
    design, target, weight = everything[side == 0], target[side == 0], weight[side == 0]
    n, parameters = design.shape
    if n < parameters:
        raise UserError(f"power_law: {parameters} parameters need at least as many points, got {n}")
    # Centred columns of unit length: the condition number then speaks of the data, not of units.
    root = np.sqrt(weight)
    scaled = (design - np.where(np.arange(parameters), np.average(design, axis=0, weights=weight), 0)) * root[:, None]
    length = np.linalg.norm(scaled, axis=0)
    for name, size in zip(columns, length[1:], strict=True):
        if size < 1e-9 * np.sqrt(n):
            raise UserError(f"power_law: {name} has one value only, so its exponent cannot be fitted; leave it out")
    condition = float(np.linalg.cond(scaled / length))
    if condition > 1e7:
        raise UserError(f"power_law: {', '.join(columns)} vary together, so their exponents cannot be told apart")

    solution, *_ = np.linalg.lstsq(design * root[:, None], target * root)
    residual = target - design @ solution
    freedom = n - parameters
    square = float(np.sum(weight * residual**2))
    variance = square / freedom if freedom else math.nan
    total = float(np.sum(weight * (target - np.average(target, weights=weight)) ** 2))
    # Of the centred fit first: for log2 tokens far from 0 the plain normal matrix loses digits.
    shift = np.eye(parameters)
    shift[0, 1:] = -np.average(design[:, 1:], axis=0, weights=weight)
    centred = np.linalg.inv((scaled / length).T @ (scaled / length)) / np.outer(length, length)
    covariance = variance * shift @ centred @ shift.T
    scatter = math.sqrt(variance)
    if np.any(side) and freedom:
        found = tobit(everything, bounds[None], side[None], weights_of_all)
        solution, covariance, scatter = found[0][0], found[1][0], float(found[2][0])
        square = float(np.sum(weight * (target - design @ solution) ** 2))
    error = np.sqrt(np.diag(covariance))
    return PowerLaw(
        exponents={name: float(value) for name, value in zip(columns, solution[1:], strict=True)},
        standard_errors={name: float(value) for name, value in zip(columns, error[1:], strict=True)},
        intercept=float(solution[0]),
        intercept_error=float(error[0]),
        r2=1 - square / total if total > 0 else math.nan,
        scatter=scatter,
        n=n,
        warnings=tuple(_warnings(columns, freedom, condition, weight, interactions)),
        covariance=tuple(tuple(float(value) for value in row) for row in covariance),
        terms=tuple(columns),
        censored=int(np.count_nonzero(side)) if freedom else 0,
    )


def _sides(censored: ArrayLike | None, n: int) -> np.ndarray:
    side = np.zeros(n, dtype=int) if censored is None else np.asarray(censored)
    if side.shape != (n,) or not np.isin(side, (-1, 0, 1)).all():
        raise UserError(f"power_law: censored must be {n} values of -1, 0 and +1, got {side.tolist()}")
    return side.astype(int)


def _log2(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise UserError(f"power_law: {name} must be a vector, got shape {array.shape}")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if len(bad):
        raise UserError(f"power_law: {name} must be positive, got {array[bad[0]]} at index {bad[0]}; leave it out")
    return np.asarray(np.log2(array))


def _warnings(
    columns: Mapping[str, np.ndarray], freedom: int, condition: float, weight: np.ndarray, interactions: bool
) -> list[str]:
    warnings = []
    if freedom == 0:
        warnings.append("as many parameters as points: no standard errors")
    elif freedom < 3:
        warnings.append(f"only {freedom} more point{'s' * (freedom > 1)} than parameters: intervals are wide")
    for name, column in columns.items():
        span = float(np.ptp(column))
        if ":" not in name and span < 2:
            warnings.append(f"{name} spans a factor of {2**span:.3g} only")
    if condition > 10 and not interactions:
        warnings.append(f"{', '.join(columns)} vary nearly together (condition number {condition:.0f})")
    if effective(weight) < 0.5 * len(weight):
        warnings.append(f"the weights leave {effective(weight):.1f} effective points of {len(weight)}")
    return warnings
