"""A loss curve around its minimum: a polynomial, and how far a real curve may be from it.

The model is y = polynomial + g(x) + noise with g a Gaussian process: the curvature of the curve, 2 a near the minimum,
varies along x by ``BEND`` of itself with a correlation length of ``CORRELATED`` octaves. So a flank may be steeper than
the other, or level off, and the interval of the minimum covers the bias that a parabola has on such a curve as well as
the noise; none that is shorter on symmetric curves can do so on lopsided ones (Armstrong & Kolesar 2020, Quant. Econ.
11:1). A handful of points cannot tell how lopsided curves get, so the two constants are not fitted to them. They were
chosen by the coverage of the intervals on nine shapes (benchmarks/coverage, which also holds shapes out), whose cubic
coefficients are up to 0.35 of the quadratic one, in octaves; Step Law's 144 learning-rate scans (arXiv:2503.04715) have
0.22 (root mean square). The estimate is a best linear unbiased prediction ("universal kriging") of the slope, see
Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, 2.7 and 9.4.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from disco.fit._noise import Array, Contrasts

BEND = 0.65
"""Standard deviation of the curvature along x, relative to its mean. See ``CORRELATED``."""
CORRELATED = 0.75
"""Octaves over which the curvature's correlation falls to 1/e."""
BEYOND = 1.0
"""Octaves beyond the points, or one spacing if that is more, within which an interval must end to count as bounded."""
AROUND = 0.25
"""Octaves to either side of the minimum over which its curvature is taken: that of the process is a step function."""
ROBUST = 3.0
"""Residuals beyond so many standard deviations are made to count as so many: 0.3% of the points if Gaussian."""

_KNOTS, _POINTS, _SIGMAS = 48, 241, 41


@dataclass(frozen=True)
class Curve:
    """What is known of a curve near its minimum. Without a minimum ``x`` is NaN and ``slope`` says where it falls."""

    x: float
    """Where the expected slope is 0."""
    y: float
    curvature: float
    """Half the second derivative there; not positive: no minimum."""
    interval: tuple[float, float] | None
    """None where it is not bounded, see ``BEYOND``."""
    y_interval: tuple[float, float] | None
    slope: int
    """-1, 0, 1: the curve falls, turns or rises over all points."""
    sigma: float
    """Standard deviation of the noise of one run."""
    weight: Array
    """Of each distinct x: runs, downweighted where they are outliers."""
    contrasts: Contrasts
    """What the points say about the noise."""


def curve(
    x: Array, y: Array, weight: Array, within: tuple[float, float], noise: tuple[float, float] | None,
    cubic: bool, confidence: float,
) -> Curve:  # fmt: skip
    """The minimum of the curve through ``y`` at the sorted distinct ``x``.

    Args:
        weight: Number of runs behind each mean, or relative precision: the variance of y is sigma^2 / weight.
        within: Squared deviations of runs from the means at their x, and their degrees of freedom.
        noise: Standard deviation of one run and its degrees of freedom from other data; None: from these runs only.
        cubic: Whether the polynomial is a cubic, so that lopsidedness is fitted, not only allowed for.
        confidence: Level of the intervals.
    """
    found = _Posterior(x, y, weight, within, noise, cubic).minimum(confidence)
    for _ in range(max(1, len(x) // 4)):  # the worst first: it makes its neighbours look bad
        outlier = found.outliers()
        worst = int(np.argmax(outlier))
        if outlier[worst] <= ROBUST:
            break
        weight = weight.copy()
        weight[worst] *= (ROBUST / outlier[worst]) ** 2
        found = _Posterior(x, y, weight, within, noise, cubic).minimum(confidence)
    return found.result


class _Posterior:
    """Posterior of value, slope and curvature on a fine grid, mixed over the unknown sigma of the noise."""

    def __init__(
        self, x: Array, y: Array, weight: Array, within: tuple[float, float], noise: tuple[float, float] | None,
        cubic: bool,
    ) -> None:  # fmt: skip
        self.x, self.weight, self.within, self.noise = x, weight, within, noise
        low, high = x[0] - max(x[1] - x[0], BEYOND), x[-1] + max(x[-1] - x[-2], BEYOND)
        self.at = np.linspace(low, high, _POINTS)
        knots = np.linspace(low, high, _KNOTS, endpoint=False)
        centre = float(x[np.argmin(y)])
        null, walk = bases(x, knots, (high - low) / _KNOTS, centre, cubic)
        null_at, walk_at = bases(self.at, knots, (high - low) / _KNOTS, centre, cubic)
        root = np.sqrt(weight)
        self.y = y * root
        design, random = null[0] * root[:, None], walk[0] * root[:, None]
        # Contrasts of the points that the polynomial does not reach, in the basis where they are independent.
        full, _ = np.linalg.qr(design, mode="complete")
        contrast = full[:, design.shape[1] :]
        spread = contrast.T @ random
        self.lam, turn = np.linalg.eigh(spread @ spread.T)
        self.lam = np.clip(self.lam, 0.0, None)
        self.contrast = contrast @ turn
        self.z = self.contrast.T @ self.y
        inverse = np.linalg.pinv(design)
        self.curvature = float((inverse @ self.y)[2])
        # Least squares at the fine grid, its error's share of noise and walk, and its covariance with the contrasts.
        share = [rows @ inverse for rows in null_at]
        error = [rows @ random - other for rows, other in zip(share, walk_at, strict=True)]
        self.plain = [rows @ self.y for rows in share]
        self.of_noise = [np.sum(rows**2, axis=1) for rows in share]
        self.of_walk = [np.sum(rows**2, axis=1) for rows in error]
        self.shared = [rows @ spread.T @ turn for rows in error]

    def _mix(self, a: float) -> None:
        """Grid of sigma and its posterior weights (restricted likelihood), for a curve of curvature 2 a."""
        scale = float(np.sqrt(np.mean(self.z**2))) if len(self.z) else 0.0
        scale = max(
            scale, 1e-9 * float(np.ptp(self.y)), math.sqrt(self.within[0] / self.within[1]) if self.within[1] else 0
        )
        if self.noise is not None and not math.isfinite(self.noise[1]):
            logs = np.log([self.noise[0]])
        else:
            known = self.noise[0] if self.noise is not None else scale
            logs = np.linspace(math.log(min(known / 5, scale * math.exp(-5))), math.log(3 * max(known, scale)), _SIGMAS)
        square = np.exp(2 * logs)
        self.total = square[:, None] + a * a * self.lam
        likelihood = -0.5 * np.sum(np.log(self.total) + self.z**2 / self.total, axis=1)
        likelihood -= 0.5 * (self.within[1] * np.log(square) + self.within[0] / square)
        if self.noise is not None:
            s, freedom = self.noise
            if math.isfinite(freedom):
                likelihood -= 0.5 * freedom * (np.log(square) + s * s / square)
        else:
            likelihood += 0.5 * logs  # between 1/sigma and flat: with few points 1/sigma believes in no noise at all
        chance = np.exp(likelihood - likelihood.max())
        self.chance = chance / chance.sum()
        self.square, self.a = square, a
        self.sigma = float(math.exp(self.chance @ logs))

    def _at(self, order: int, where: slice | int = slice(None)) -> tuple[Array, Array]:
        """Mean and standard deviation of a derivative on the fine grid, one column per sigma."""
        shared, a2 = np.atleast_2d(self.shared[order][where]), self.a**2
        plain, noise, walk = (
            np.atleast_1d(v[order][where])[:, None] for v in (self.plain, self.of_noise, self.of_walk)
        )
        mean = plain - a2 * shared @ (self.z / self.total).T
        variance = self.square * noise + a2 * walk - a2 * a2 * shared**2 @ (1 / self.total).T
        return mean, np.sqrt(np.maximum(variance, 1e-30))

    def minimum(self, confidence: float) -> _Posterior:
        """Fills ``result``; the walk is in units of the curvature, so both are found in turns."""
        least, nothing = self.curvature, (math.nan, math.nan)
        none = Contrasts(np.zeros(0), np.zeros(0), *self.within)
        self.result = Curve(*nothing, least, None, None, 0, math.nan, self.weight, none)
        if least <= 0:
            return self
        a = least
        for _ in range(40):
            self._mix(a)
            mean, error = self._at(1)
            slope = mean @ self.chance
            turns = np.flatnonzero((slope[:-1] < 0) & (slope[1:] >= 0))
            if not len(turns):
                side = 1 if slope[len(slope) // 2] > 0 else -1
                self.result = Curve(*nothing, a, None, None, side, self.sigma, self.weight, none)
                return self
            value = self._at(0)[0] @ self.chance
            index = int(turns[np.argmin(value[turns])])
            part = float(slope[index] / (slope[index] - slope[index + 1]))
            x = float(self.at[index] + part * (self.at[1] - self.at[0]))
            falls, rises = np.interp((x - AROUND, x + AROUND), self.at, slope)
            here = float(rises - falls) / (4 * AROUND)
            if here <= 0:
                self.result = Curve(*nothing, here, None, None, 0, self.sigma, self.weight, none)
                return self
            # A flat side that the points say little about must not shrink the allowance for the steep one.
            following = max(here, least)
            if abs(following - a) < 1e-6 * a:
                break
            a = following
        y = float(value[index] + part * (value[index + 1] - value[index]))
        rising = ndtr(mean / error) @ self.chance
        tail = (1 - confidence) / 2
        known = len(self.z) + self.within[1] > 0 or self.noise is not None
        interval = _crossings(self.at, rising, index, tail) if known else None
        y_interval = self._value_interval(index, y, tail) if known else None
        contrasts = Contrasts(self.z, self.a**2 * self.lam, *self.within, self.x, self.contrast)
        self.result = Curve(x, y, here, interval, y_interval, 0, self.sigma, self.weight, contrasts)
        return self

    def _value_interval(self, index: int, y: float, tail: float) -> tuple[float, float]:
        mean, error = (row[0] for row in self._at(0, index))
        mean = mean - mean @ self.chance + y
        levels = np.linspace(float(np.min(mean - 6 * error)), float(np.max(mean + 6 * error)), 2001)
        below = ndtr((levels[:, None] - mean) / error) @ self.chance
        low, high = np.interp((tail, 1 - tail), below, levels)
        return float(low), float(high)

    def outliers(self) -> Array:
        """Residual of each mean from the curve through the others, in standard deviations (Dubrule 1983, Math. Geol.
        15:687); 0 where the points are too few to tell."""
        if not math.isfinite(self.result.sigma) or len(self.z) < (4 if self.noise is None else 2):
            return np.zeros(len(self.x))
        # An outlier raises the posterior of sigma, and would hide behind it.
        sigma = self.sigma if self.noise is None else min(self.sigma, self.noise[0])
        precision = self.contrast / (sigma**2 + self.a**2 * self.lam) @ self.contrast.T
        diagonal = np.maximum(np.diag(precision), 1e-300)
        return np.asarray(np.abs(precision @ self.y) / np.sqrt(diagonal))


def bases(x: Array, knots: Array, step: float, centre: float, cubic: bool) -> tuple[list[Array], list[Array]]:
    """Columns of the polynomial and of the process: values, first and second derivatives, per unit of a."""
    u, one = x - centre, np.ones_like(x)
    powers = [(one, u, u**2, u**3), (0 * one, one, 2 * u, 3 * u**2), (0 * one, 0 * one, 2 * one, 6 * u)]
    polynomial = [np.stack(rows[: 4 if cubic else 3], axis=1) for rows in powers]
    first, last = np.maximum(x[:, None] - knots, 0.0), np.maximum(x[:, None] - knots - step, 0.0)
    process = [first**2 - last**2, 2 * (first - last), 2.0 * ((first > 0) & (last <= 0))]
    return polynomial, [rows @ _process(step, len(knots)) for rows in process]


@functools.lru_cache(maxsize=64)
def _process(step: float, knots: int) -> Array:
    """Square root of the covariance of the curvature, relative to a, over intervals of this length."""
    distance = step * np.abs(np.subtract.outer(np.arange(knots), np.arange(knots)))
    return np.asarray(np.linalg.cholesky(BEND**2 * np.exp(-distance / CORRELATED) + 1e-12 * np.eye(knots)))


def _crossings(at: Array, rising: Array, index: int, tail: float) -> tuple[float, float] | None:
    """Where the probability that the curve rises leaves [tail, 1 - tail] around the minimum."""
    below = np.flatnonzero(rising[: index + 1] <= tail)
    above = np.flatnonzero(rising[index + 1 :] >= 1 - tail)
    if not len(below) or not len(above):
        return None
    i, j = int(below[-1]), index + 1 + int(above[0])
    low = np.interp(tail, rising[i : i + 2], at[i : i + 2])
    high = np.interp(1 - tail, rising[j - 1 : j + 1], at[j - 1 : j + 1])
    return float(low), float(high)
