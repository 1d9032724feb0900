"""Where a loss curve has its minimum, how sure that is, and when there is none to report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from disco.errors import UserError
from disco.fit._noise import Array, effective, weights
from disco.fit._result import Result

Recipe = Literal["paper", "quadratic"]

PAPER_POINTS = 7
"""Runs in the paper's fit: those nearest in log2 norm to the lowest loss (arXiv:2510.03871)."""
LOCAL_POINTS = 5
"""Fewest distinct abscissae of the local quadratic, where the grid has so many."""
LOCAL_REACH = 1.5
"""Octaves on either side of the minimum within which all points join the local quadratic."""
FEW = 4
"""Fewest distinct abscissae with a finite loss; with less the curve cannot contradict the parabola."""


@dataclass(frozen=True)
class Optimum(Result):
    """Minimum of a loss over log2 learning rate or log2 norm."""

    x: float
    """Abscissa of the minimum (log2), NaN where there is none to report."""
    y: float
    """Loss at the minimum in nats, NaN likewise."""
    nearest: int | None
    """Index of the data point nearest to the minimum; without a minimum, of the lowest point."""
    interval: tuple[float, float] | None
    """Confidence interval of ``x``; None where the data do not bound it."""
    y_interval: tuple[float, float] | None
    """Confidence interval of ``y``."""
    curvature: float
    """Coefficient of x^2: being d octaves off the minimum costs curvature d^2 nats."""
    flags: tuple[str, ...]
    """Reasons not to take ``x`` for an optimum; empty when there are none. See ``optimum``."""
    n: int
    """Points in the fit."""
    effective: float
    """Their effective number after weighting (Kish)."""
    recipe: str

    @property
    def usable(self) -> bool:
        """Whether this is an optimum at all: a number without a flag."""
        return not self.flags and math.isfinite(self.x)


def optimum(
    x: ArrayLike,
    y: ArrayLike,
    sigma: ArrayLike | None = None,
    recipe: Recipe = "quadratic",
    anchor: float | None = None,
    *,
    confidence: float = 0.9,
) -> Optimum:
    """Finds the minimum of a loss curve from a few noisy runs.

    Args:
        x: log2 of learning rate or of a norm, in any order, repeats allowed (seeds). A point without x is left out.
        y: Loss in nats. Not finite means that the run diverged: it takes no part in the fit but bounds the grid on
            its side, so the lowest loss next to it is not at an edge. Where such a run has no norm, x = inf or -inf
            says on which side it is.
        sigma: Standard deviation of each loss; None or all 0: equal weights.
        recipe: "paper" is that of arXiv:2510.03871: least squares y = a x^2 + b x + anchor, weights 1/sigma^2, over
            the seven runs nearest to the lowest. It is a recipe, not an estimator: the fixed constant pulls the
            vertex, so its interval does not promise to cover the true minimum. "quadratic" has a free constant and
            is local: the five distinct x nearest to the minimum and all others within 1.5 octaves of it; it has no x
            when its vertex lies outside the grid. On a lopsided curve the vertex leans to the flat side (0.1 octave
            on a grid of octaves where one flank is half again as steep), which the interval does not know of.
        anchor: Loss at x = 0, measured at step 0, where all norms are 1. Needed by "paper" and used by it only.
        confidence: Level of the intervals: Fieller's for x (a ratio of two estimates; Fieller 1954, J. R. Stat. Soc. B
            16:175), Student's t by the residuals for y.

    Returns:
        The minimum. Its flags: "edge-low", "edge-high": the lowest distinct x is the first or last, or the vertex lies
        outside; "flat": the curvature is not told from 0 at this confidence; "few-points": fewer than four distinct x;
        "no-minimum": the parabola opens downward (or has too few points), or its vertex lies between the last run and
        one that diverged.

    Raises:
        UserError: arrays of different length, an unknown recipe, or the paper's without its anchor.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    spread = None if sigma is None else np.asarray(sigma, dtype=float)
    if xs.ndim != 1 or ys.shape != xs.shape or (spread is not None and spread.shape != xs.shape):
        shapes = ", ".join(str(a.shape) for a in (xs, ys, spread) if a is not None)
        raise UserError(f"optimum: x, y and sigma must be vectors of one length, got shapes {shapes}")
    if recipe not in ("paper", "quadratic"):
        raise UserError(f"optimum: recipe must be 'paper' or 'quadratic', got {recipe!r}")
    if recipe == "paper" and (anchor is None or not math.isfinite(anchor)):
        raise UserError(f"optimum: recipe 'paper' needs anchor, the loss at step 0, got {anchor!r}")

    finite = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    if not len(finite):
        return _nothing(recipe, None, ("few-points", "no-minimum"))
    grid, mean = _distinct(xs[finite], ys[finite])
    lowest = int(np.argmin(mean))
    low, high = _bounds(grid, xs[~np.isnan(xs) & ~np.isfinite(ys)])
    flags = _edges(lowest, grid, low, high)
    best = int(finite[np.argmin(ys[finite])])
    columns = 2 if recipe == "paper" else 3
    if len(grid) < FEW:
        flags.append("few-points")
    if len(grid) < columns:
        return _nothing(recipe, best, (*flags, "no-minimum"))

    if recipe == "paper":
        near = finite[np.argsort(np.abs(xs[finite] - xs[best]), kind="stable")[:PAPER_POINTS]]
        fit = _Parabola(xs[near], ys[near], spread if spread is None else spread[near], anchor)
    else:
        fit = _local(xs[finite], ys[finite], spread if spread is None else spread[finite], grid, lowest)

    interval, flat = fit.interval(confidence)
    if flat:
        flags.append("flat")
    vertex = fit.vertex
    side = "edge-low" if vertex < grid[0] else "edge-high"
    if fit.a <= 0:
        flags.append("no-minimum")
    elif not low <= vertex <= high and side not in flags:
        flags.append(side)
    elif not grid[0] <= vertex <= grid[-1] and side not in flags:
        flags.append("no-minimum")  # it lies between the last run and a diverged one: bracketed, but not measured
    if fit.a <= 0 or (recipe == "quadratic" and not grid[0] <= vertex <= grid[-1]):
        return _nothing(recipe, best, tuple(flags), fit)
    distance = np.abs(xs[finite] - vertex)
    nearest = finite[np.lexsort((ys[finite], distance))[0]]
    return Optimum(
        x=vertex,
        y=fit.value,
        nearest=int(nearest),
        interval=interval,
        y_interval=fit.value_interval(confidence),
        curvature=fit.a,
        flags=tuple(flags),
        n=fit.n,
        effective=fit.effective,
        recipe=recipe,
    )


def _nothing(recipe: str, nearest: int | None, flags: tuple[str, ...], fit: _Parabola | None = None) -> Optimum:
    curvature, n, effective_n = (fit.a, fit.n, fit.effective) if fit else (math.nan, 0, 0.0)
    return Optimum(math.nan, math.nan, nearest, None, None, curvature, flags, n, effective_n, recipe)


def _distinct(x: Array, y: Array) -> tuple[Array, Array]:
    """Sorted distinct x and the mean of y at each."""
    grid, index = np.unique(x, return_inverse=True)
    return grid, np.bincount(index, y) / np.bincount(index)


def _bounds(grid: Array, diverged: Array) -> tuple[float, float]:
    """Range in which a minimum can lie: the grid, extended to the nearest diverged run on either side."""
    low, high = grid[0], grid[-1]
    below, above = diverged[diverged < low], diverged[diverged > high]
    steps = np.diff(grid) if len(grid) > 1 else np.zeros(1)
    if len(below):
        low = below.max() if np.isfinite(below.max()) else low - steps[0]
    if len(above):
        high = above.min() if np.isfinite(above.min()) else high + steps[-1]
    return float(low), float(high)


def _edges(lowest: int, grid: Array, low: float, high: float) -> list[str]:
    flags = []
    if lowest == 0 and low == grid[0]:
        flags.append("edge-low")
    if lowest == len(grid) - 1 and high == grid[-1]:
        flags.append("edge-high")
    return flags


def _local(x: Array, y: Array, sigma: Array | None, grid: Array, lowest: int) -> _Parabola:
    """The quadratic around its own vertex: it starts at the lowest point and moves until its points do not change."""
    centre, seen = grid[lowest], []
    while True:
        distance = np.sort(np.abs(grid - centre))
        reach = max(distance[min(LOCAL_POINTS, len(grid)) - 1], LOCAL_REACH)
        use = np.abs(x - centre) <= reach
        fit = _Parabola(x[use], y[use], None if sigma is None else sigma[use])
        points = tuple(np.flatnonzero(use))
        if points in seen or fit.a <= 0 or not grid[0] <= fit.vertex <= grid[-1]:
            return fit
        seen.append(points)
        centre = fit.vertex


class _Parabola:
    """Least squares y = a u^2 + b u + c with u = x - shift; with ``anchor`` the constant is fixed and shift is 0."""

    def __init__(self, x: Array, y: Array, sigma: Array | None, anchor: float | None = None) -> None:
        free = anchor is None
        self._shift = float(np.mean(x)) if free else 0.0
        u = x - self._shift
        design = np.stack([u**2, u, np.ones_like(u)][: 3 if free else 2], axis=1)
        target = y - (anchor or 0.0)
        weight = weights(sigma, len(x), floor=free)
        root = np.sqrt(weight)
        solution, *_ = np.linalg.lstsq(design * root[:, None], target * root)
        self.a, self._b = float(solution[0]), float(solution[1])
        self._c = float(solution[2]) if free else float(anchor or 0.0)
        self.n, self.effective = len(x), effective(weight)
        self._freedom = len(x) - design.shape[1]
        self._constant = bool(np.ptp(y) <= 1e-12 * np.max(np.abs(y)))  # no curve at all, only rounding
        residual = target - design @ solution
        variance = float(np.sum(weight * residual**2)) / self._freedom if self._freedom > 0 else math.nan
        self._covariance = variance * np.linalg.pinv((design * weight[:, None]).T @ design, hermitian=True)

    @property
    def _turn(self) -> float:
        return -self._b / (2 * self.a) if self.a else math.nan

    @property
    def vertex(self) -> float:
        return self._turn + self._shift

    @property
    def value(self) -> float:
        return self._c - self._b**2 / (4 * self.a)

    def interval(self, confidence: float) -> tuple[tuple[float, float] | None, bool]:
        """Fieller's interval of the vertex, and whether the curvature is not told from 0 (then it has none)."""
        if self._freedom < 1 or self._constant:
            return None, self._constant
        t2 = stats.t.ppf((1 + confidence) / 2, self._freedom) ** 2
        (v_aa, v_ab), (_, v_bb) = self._covariance[:2, :2]
        # All u with (b + 2 a u)^2 <= t^2 Var(b + 2 a u): a quadratic p u^2 + 2 q u + r <= 0.
        p = 4 * (self.a**2 - t2 * v_aa)
        q = 2 * (self.a * self._b - t2 * v_ab)
        r = self._b**2 - t2 * v_bb
        if p <= 0:
            return None, True
        half = math.sqrt(max(q * q - p * r, 0.0)) / float(p)
        centre = float(self._shift - q / p)
        return (centre - half, centre + half), False

    def value_interval(self, confidence: float) -> tuple[float, float] | None:
        """Interval of the loss at the vertex, to first order in the errors."""
        if self._freedom < 1:
            return None
        gradient = np.array([self._turn**2, self._turn, 1.0])[: len(self._covariance)]
        error = math.sqrt(max(float(gradient @ self._covariance @ gradient), 0.0))
        half = float(stats.t.ppf((1 + confidence) / 2, self._freedom)) * error
        return self.value - half, self.value + half
