"""The parabola of arXiv:2510.03871 and Fieller's interval of its vertex."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from disco.fit._noise import Array, effective, weights


class Parabola:
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
