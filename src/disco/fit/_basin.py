"""The loss around its minimum over learning rate and batch: a bowl that may be lopsided, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disco.fit._bowl import TERMS, Bowl

Array = NDArray[np.float64]

LOPSIDED = 0.25
"""Standard deviation of d in a (p^2 + d p^3), p in octaves: as for one learning-rate scan (``_smooth``)."""
DRAWS = 1000
FAR = 3.0
"""Octaves from the bowl's vertex beyond which a minimum of a lopsided bowl is not believed."""


@dataclass(frozen=True)
class Minimum:
    """Minima of R bowls; NaN where there is none. u: log2 rate, v: log2 batch."""

    u: Array
    v: Array
    value: Array
    ridge: Array
    """du/dv along the valley."""
    across: Array
    """Second derivative over u at fixed v."""
    along: Array
    """Second derivative along the valley, per octave of batch."""
    third: Array
    """Coefficient of the cubic term along the valley."""

    def costs(self, v: Array) -> Array:
        """Nats that the best rate at batches v loses against the minimum, R x len(v); infinite where there is none."""
        step = v - self.v[:, None]
        along, third = self.along[:, None], self.third[:, None]
        with np.errstate(all="ignore"):
            turn = -along / (3 * third)  # beyond its turning point a cubic falls again; the cost does not
            step = np.where(step / turn > 1, turn, step)
        return np.where(np.isfinite(along), 0.5 * along * step**2 + third * step**3, math.inf)


class Basin:
    """Eight terms around the vertex of a bowl: its six, and a cubic across the valley and along it.

    The cubic terms are held by a prior (``LOPSIDED``), so that few runs give a bowl with an interval that allows for
    its being lopsided, and many runs give its shape. ``plain`` leaves them out.
    """

    def __init__(self, u: Array, v: Array, y: Array, fit: Bowl, plain: bool) -> None:
        (uu, uv), (_, vv) = fit.hessian
        self._at, self._ridge = fit.vertex, -uv / uu
        q = v - self._at[1]
        p = u - self._at[0] - self._ridge * q
        design = np.stack([np.ones_like(p), p, q, p * p, p * q, q * q, p**3, q**3], axis=1)
        sizes = LOPSIDED * np.array([uu / 2, (vv - uv**2 / uu) / 2])
        self.lopsided = design[:, 6:] * sizes
        """n x 2: what a lopsidedness of one standard deviation across the valley, or along it, does to the losses."""
        variance = max(fit.variance, (1e-9 * max(float(np.ptp(y)), 1e-9)) ** 2) if fit.freedom else math.nan
        for _ in range(3):
            prior = np.zeros((8, 8))
            prior[6:, 6:] = np.diag(variance / sizes**2) if not plain else np.eye(2) * 1e12
            inverse = np.linalg.inv(design.T @ design + prior)
            self._solve = inverse @ design.T
            self.coefficients = self._solve @ y
            missed = y - design @ self.coefficients
            penalty = float(self.coefficients @ prior @ self.coefficients)
            variance = max((float(missed @ missed) + penalty) / max(len(y) - TERMS, 1), 1e-24)
        self.variance, self.freedom = variance, max(len(y) - TERMS, 1)
        self._covariance = variance * inverse
        rest = np.eye(len(y)) - design @ self._solve
        norm = np.sqrt(np.sum(rest**2, axis=1))
        self.residual = np.where(norm > 1e-6, missed / np.maximum(norm, 1e-6), 0.0)
        """Residuals, scaled so that independent noise keeps its variance."""
        self.minimum = self._minimum(self.coefficients[None])

    def draws(self) -> Minimum:
        """Minima of bowls drawn from the uncertainty of the coefficients (multivariate t)."""
        rng = np.random.default_rng(0)
        stretch = np.sqrt(self.freedom / rng.chisquare(self.freedom, DRAWS))
        root = np.linalg.cholesky(self._covariance + 1e-300 * np.eye(8))
        return self._minimum(self.coefficients + stretch[:, None] * (rng.standard_normal((DRAWS, 8)) @ root.T))

    def moved(self, changes: Array) -> Minimum:
        """Minima when the losses change (R x n)."""
        return self._minimum(self.coefficients + changes @ self._solve.T)

    def _minimum(self, coefficients: Array) -> Minimum:
        c, b1, b2, a11, a12, a22, k1, k2 = coefficients.T
        p, q = np.zeros_like(c), np.zeros_like(c)
        with np.errstate(all="ignore"):
            for _ in range(7):  # Newton's method
                pp, qq = 2 * a11 + 6 * k1 * p, 2 * a22 + 6 * k2 * q
                determinant = pp * qq - a12**2
                g1 = b1 + 2 * a11 * p + a12 * q + 3 * k1 * p**2
                g2 = b2 + a12 * p + 2 * a22 * q + 3 * k2 * q**2
                p = p - np.clip((qq * g1 - a12 * g2) / determinant, -1, 1)
                q = q - np.clip((pp * g2 - a12 * g1) / determinant, -1, 1)
            pp, qq = 2 * a11 + 6 * k1 * p, 2 * a22 + 6 * k2 * q
            slope = np.hypot(b1 + 2 * a11 * p + a12 * q + 3 * k1 * p**2, b2 + a12 * p + 2 * a22 * q + 3 * k2 * q**2)
            good = (pp > 0) & (pp * qq - a12**2 > 0) & (slope < 1e-6 * (1 + np.abs(c)))
            good &= (np.abs(p) < FAR) & (np.abs(q) < FAR)
            value = c + b1 * p + b2 * q + a11 * p**2 + a12 * p * q + a22 * q**2 + k1 * p**3 + k2 * q**3
            u, v = self._at[0] + p + self._ridge * q, self._at[1] + q
            parts = (u, v, value, self._ridge - a12 / pp, pp, qq - a12**2 / pp, k2)
            return Minimum(*(np.where(good, part, math.nan) for part in parts))
