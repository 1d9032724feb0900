"""The loss around its minimum over learning rate and batch: a bowl whose flanks differ, and how sure it is."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from disco.fit._bowl import TERMS, Bowl
from disco.fit._smooth import BEND, BEYOND, CORRELATED

Array = NDArray[np.float64]
Interval = tuple[float, float]

STEP, SPAN = 0.25, 6.0
"""Octaves between the nodes of a bend, and how far they reach on either side of the minimum."""
NODES = 2 * round(SPAN / STEP) + 1
SIZE = 0.5
"""Standard deviation of the logarithm of the size of the bends over that of ``BEND``; the runs tell it."""
DRAWS = 1000
FAR = 3.0
"""Octaves from the bowl's vertex beyond which a minimum is not believed."""
TURNS = 4
"""Times that the basin is set up about its own minimum and valley."""


@dataclass(frozen=True)
class Minimum:
    """u: log2 rate, v: log2 batch."""

    u: float
    v: float
    value: float
    ridge: float
    """du/dv along the valley."""
    across: float
    """Second derivative over u at fixed v."""
    along: float
    """Second derivative along the valley, per octave of batch."""


class Basin:
    """A quadratic in p, across the valley, and q, along it, plus a bend of either: octaves from the minimum.

    As for one scan of learning rates (``_smooth``) the curvature along an axis varies by ``BEND`` of itself with a
    correlation length of ``CORRELATED`` octaves, so that flanks may be steep or level off; how much, the runs tell
    (``SIZE``). The estimate is the best linear unbiased prediction under that, and its error counts what the bends do
    to it. A quadratic's vertex, and a cubic's, moves with the place of the minimum on the grid, which would give laws
    over the optima of horizons a wrong exponent. ``minimum`` is None where there is none within reach. ``plain`` leaves
    the bends out.
    """

    def __init__(self, u: Array, v: Array, y: Array, fit: Bowl, plain: bool) -> None:
        (uu, uv), (_, vv) = fit.hessian
        self._range = ((float(u.min()), float(u.max())), (float(v.min()), float(v.max())))
        at, ridge = fit.vertex, -uv / uu
        least = sizes = np.array([uu / 2, (vv - uv**2 / uu) / 2])
        self.minimum: Minimum | None = None
        for _ in range(1 if plain else TURNS):  # no test of convergence: rounding shall not decide
            self._at, self._ridge = at, ridge
            self._solve_about(u, v, y, sizes * (not plain))
            self.minimum = found = self._minimum(fit.vertex)
            if found is None:
                break
            at, ridge = (found.u, found.v), found.ridge
            sizes = np.maximum(least, np.array([found.across, found.along]) / 2)

    def _solve_about(self, u: Array, v: Array, y: Array, sizes: Array) -> None:
        q = v - self._at[1]
        p = u - self._at[0] - self._ridge * q
        self._sizes = sizes
        whole = self._rows(p, q)[0]
        design, bends = whole[:, :TERMS], whole[:, TERMS:]
        base, upper = np.linalg.qr(design)
        inverse = np.linalg.inv(upper)
        # The bends apart from the quadratic, as independent contrasts; what is left of the losses is noise alone.
        contrast, singular, turn = np.linalg.svd(bends - base @ (base.T @ bends), full_matrices=False)
        told = singular > 1e-9 * max(float(singular[0]), 1e-300)
        contrast, singular, turn = contrast[:, told], singular[told], turn[told]
        left = y - base @ (base.T @ y)
        z = contrast.T @ left
        left = left - contrast @ z
        least = 1e-6 * max(float(np.ptp(y)), 1e-9)
        rest = float(left @ left), max(len(y) - TERMS - len(z), 0)
        self.variance, self.freedom, size = _noise(z, singular**2, rest, least)
        self._sizes, bends, singular = size * sizes, size * bends, size * singular
        self.bends = bends.T
        """2 NODES x n: what a unit of each node of the bends does to the losses."""
        share = self.variance / (self.variance + singular**2)  # of noise in a contrast
        of_bends = turn.T * ((1 - share) / singular) @ contrast.T
        least_squares = inverse @ base.T
        self._solve = np.concatenate([least_squares - least_squares @ bends @ of_bends, of_bends])
        self.coefficients = self._solve @ y
        unknown = np.eye(2 * NODES) - turn.T * (1 - np.sqrt(share)) @ turn
        of_terms = np.concatenate([math.sqrt(self.variance) * inverse, -least_squares @ bends @ unknown], axis=1)
        self._root = np.concatenate([of_terms, np.pad(unknown, ((0, 0), (TERMS, 0)))])
        """Square root of the covariance of the coefficients."""
        norm = 1 - np.sum(base**2, axis=1) - np.sum(contrast**2 * (1 - share**2), axis=1)
        norm = np.sqrt(np.clip(norm, 0.0, None))
        self.residual = np.where(norm > 1e-6, (left + contrast @ (share * z)) / np.maximum(norm, 1e-6), 0.0)
        """Residuals, scaled so that independent noise keeps its variance."""

    def _rows(self, p: Array, q: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Of the loss, its slopes over p and q and its second derivatives at points: each m x coefficients."""
        one, zero, none = np.ones_like(p), np.zeros_like(p), np.zeros((len(p), NODES))
        (y1, s1, k1), (y2, s2, k2) = (
            [size * part for part in _bends(x)] for size, x in zip(self._sizes, (p, q), strict=True)
        )
        return (
            np.column_stack([one, p, q, p * p, p * q, q * q, y1, y2]),
            np.column_stack([zero, one, zero, 2 * p, q, zero, s1, none]),
            np.column_stack([zero, zero, one, zero, p, 2 * q, none, s2]),
            np.column_stack([zero, zero, zero, 2 * one, zero, zero, k1, none]),
            np.column_stack([zero, zero, zero, zero, zero, 2 * one, none, k2]),
        )

    def _minimum(self, start: tuple[float, float]) -> Minimum | None:
        p = q = 0.0
        pq = float(self.coefficients[4])
        for _ in range(30):  # Newton's method
            c, gp, gq, pp, qq = (float((rows @ self.coefficients)[0]) for rows in self._rows(*np.array([[p], [q]])))
            determinant = pp * qq - pq**2
            if not (pp > 0 and determinant > 0):
                return None
            dp, dq = np.clip([(qq * gp - pq * gq) / determinant, (pp * gq - pq * gp) / determinant], -1, 1)
            if max(abs(dp), abs(dq)) < 1e-9:
                break
            p, q = p - float(dp), q - float(dq)
        u, v = self._at[0] + p + self._ridge * q, self._at[1] + q
        if max(abs(dp), abs(dq)) > 1e-6 or np.hypot(*np.subtract((u, v), start)) > FAR:
            return None
        self._hessian = np.array([[pp, pq], [pq, qq]])
        self._centre = p, q
        return Minimum(u, v, c, self._ridge - pq / pp, pp, qq - pq**2 / pp)

    def _line(self, towards: tuple[float, float], steps: Array) -> tuple[Array, Array, Array]:
        """Points of the least loss where towards . (p, q) has moved on by ``steps``, and the direction there."""
        direction = np.linalg.solve(self._hessian, towards)
        direction = direction / (direction @ np.array(towards))
        p, q = np.array(self._centre)[:, None] + direction[:, None] * steps
        return p, q, direction

    def interval(self, axis: int, confidence: float) -> Interval | None:
        """Of the minimum's u (axis 0) or v (axis 1): where the loss, minimal over the other one, falls or rises with
        that confidence (Student's t). None where it does not within an octave of the runs."""
        assert self.minimum is not None
        at = (self.minimum.u, self.minimum.v)[axis]
        first, last = self._range[axis]
        steps = np.linspace(min(first - at, 0.0) - BEYOND, max(last - at, 0.0) + BEYOND, 301)
        p, q, direction = self._line(((1.0, self._ridge), (0.0, 1.0))[axis], steps)
        _, over_p, over_q, *_ = self._rows(p, q)
        slope = direction[0] * over_p + direction[1] * over_q
        error = np.linalg.norm(slope @ self._root, axis=1)
        sure = slope @ self.coefficients / error / stats.t.ppf((1 + confidence) / 2, self.freedom)
        falls, rises = np.flatnonzero((sure < -1) & (steps < 0)), np.flatnonzero((sure > 1) & (steps > 0))
        if not len(falls) or not len(rises):
            return None
        i, j = int(falls[-1]), int(rises[0])
        low = at + float(np.interp(-1, sure[i : i + 2], steps[i : i + 2]))
        return low, at + float(np.interp(1, sure[j - 1 : j + 1], steps[j - 1 : j + 1]))

    @property
    def ridge_error(self) -> float:
        """Standard error of ``Minimum.ridge``."""
        return float(np.linalg.norm(self._root[4])) / float(self._hessian[0, 0])

    def costs(self, v: Array) -> tuple[Array, Array]:
        """Nats that the best rate at batches v, ascending, loses against the best of all: of the estimate, and of draws
        of the bowl (DRAWS x len(v))."""
        assert self.minimum is not None
        reach = np.linspace(min(v[0], self.minimum.v) - BEYOND, max(v[-1], self.minimum.v) + BEYOND, 101)
        grid = np.unique(np.r_[v, self.minimum.v, reach])
        p, q, _ = self._line((0.0, 1.0), grid - self.minimum.v)
        value, over_p, *_ = self._rows(p, q)
        rng = np.random.default_rng(0)
        stretch = np.sqrt(self.freedom / rng.chisquare(self.freedom, (DRAWS, 1)))
        errors = stretch * (rng.standard_normal((DRAWS, self._root.shape[1])) @ self._root.T)
        every = self.coefficients + np.concatenate([np.zeros_like(errors[:1]), errors])
        loss = every @ value.T - (every @ over_p.T) ** 2 / (2 * self._hessian[0, 0])
        least = np.argmin(loss, axis=1)[:, None]
        cost = loss - np.take_along_axis(loss, least, axis=1)
        index = np.arange(len(grid))
        # Farther out it does not fall again.
        right = np.maximum.accumulate(np.where(index >= least, cost, 0.0), axis=1)
        left = np.maximum.accumulate(np.where(index <= least, cost, 0.0)[:, ::-1], axis=1)[:, ::-1]
        found = np.maximum(left, right)[:, np.searchsorted(grid, v)]
        return found[0], found[1:]

    def moves(self, changes: Array) -> tuple[Array, Array]:
        """Change of the minimum in (u, v), to first order, when the losses change (R x n)."""
        _, over_p, over_q, *_ = self._rows(*np.array(self._centre)[:, None])
        slope = np.concatenate([over_p, over_q]) @ self._solve @ changes.T
        dp, dq = -np.linalg.solve(self._hessian, slope)
        return dp + self._ridge * dq, dq


def _noise(z: Array, own: Array, rest: tuple[float, int], least: float) -> tuple[float, float, float]:
    """By restricted likelihood: the variance of the noise, its degrees of freedom, and the size of the bends, 1 being
    that of ``BEND``.

    Args:
        z, own: Contrasts z_i ~ N(0, variance + size^2 own_i).
        rest: Sum of squares of what is noise alone, and its degrees of freedom.
        least: Standard deviation below which no noise is believed, in nats.
    """
    squares, freedom = float(z @ z) + rest[0], len(z) + rest[1]
    if not freedom:
        return math.nan, 1.0, 1.0
    scale = max(math.sqrt(squares / freedom), least * math.exp(5))
    logs, sizes = np.linspace(math.log(scale) - 5, math.log(scale) + 1, 61)[:, None], np.linspace(-2.0, 1.0, 13)
    total = np.exp(2 * logs)[..., None] + np.exp(2 * sizes)[:, None] * own
    likelihood = -0.5 * np.sum(np.log(total) + z**2 / total, axis=-1) + 0.5 * logs - 0.5 * (sizes / SIZE) ** 2
    likelihood = likelihood - rest[1] * logs - 0.5 * rest[0] * np.exp(-2 * logs)
    chance = np.exp(likelihood - likelihood.max())
    chance /= chance.sum()
    variance, size = math.exp(2 * float(np.sum(chance * logs))), math.exp(float(np.sum(chance * sizes)))
    return variance, max(float(np.sum((variance / (variance + size**2 * own)) ** 2)) + rest[1], 1.0), size


@functools.cache
def _nodes() -> tuple[Array, Array, Array]:
    """Value, slope and curvature at the nodes of the bends that independent unit variables give (each NODES x NODES):
    curvatures as in ``_smooth``, per unit of the quadratic's coefficient; value and slope are 0 in the middle."""
    at = STEP * np.arange(NODES)
    covariance = BEND**2 * np.exp(-np.abs(np.subtract.outer(at, at)) / CORRELATED)
    curvature = 2 * np.linalg.cholesky(covariance + 1e-12 * np.eye(NODES))
    slope, value = np.zeros_like(curvature), np.zeros_like(curvature)
    for side in (1, -1):
        step = side * STEP
        for k in range(NODES // 2, NODES // 2 * (1 + side), side):
            slope[k + side] = slope[k] + step * (curvature[k] + curvature[k + side]) / 2
            value[k + side] = value[k] + step * slope[k] + step**2 * (curvature[k] / 3 + curvature[k + side] / 6)
    return value, slope, curvature


def _bends(x: Array) -> tuple[Array, Array, Array]:
    """Value, slope and curvature of the bends at x, each len(x) x NODES; straight beyond the nodes."""
    inside = np.clip(x, -SPAN, SPAN)
    k = np.clip(np.floor((inside + SPAN) / STEP).astype(int), 0, NODES - 2)
    t, away = (inside + SPAN - k * STEP)[:, None], (x - inside)[:, None]
    values, slopes, curvatures = _nodes()
    rise = (curvatures[k + 1] - curvatures[k]) / STEP
    slope = slopes[k] + t * curvatures[k] + t**2 / 2 * rise
    value = values[k] + t * slopes[k] + t**2 / 2 * curvatures[k] + t**3 / 6 * rise
    return value + away * slope, slope, np.where(away == 0, curvatures[k] + t * rise, 0.0)
