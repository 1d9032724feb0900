"""A quadratic bowl of the loss over two logarithms at once, such as learning rate and batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import ConvexHull

from disco.errors import UserError
from disco.fit._result import Result

TERMS = 6
CONDITION = 1e6
"""Condition number of the design, columns of unit length, from which on the points do not determine six terms."""


@dataclass(frozen=True)
class Bowl(Result):
    """y = c + bu s + bv t + auu s^2 + auv s t + avv t^2 with s = u - centre[0], t = v - centre[1]."""

    coefficients: tuple[float, float, float, float, float, float]
    """(c, bu, bv, auu, auv, avv), about the centre."""
    centre: tuple[float, float]
    """Mean of the points."""
    vertex: tuple[float, float]
    """Where the gradient vanishes, as (u, v): a minimum only if ``is_minimum``; NaN where it vanishes nowhere."""
    value: float
    """y at the vertex."""
    covariance: tuple[tuple[float, ...], ...]
    """Of the coefficients, 6 x 6, by the residuals; NaN with six points only."""
    variance: float
    """Residual variance of a point of weight 1: the weighted sum of squares over n - 6; NaN with six points only."""
    n: int
    """Points in the fit."""
    hull: tuple[tuple[float, float], ...]
    """Corners of the convex hull of the points, counter-clockwise."""

    @property
    def freedom(self) -> int:
        """Points minus terms."""
        return self.n - TERMS

    @property
    def hessian(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Second derivatives of y over (u, v)."""
        _, _, _, uu, uv, vv = self.coefficients
        return (2 * uu, uv), (uv, 2 * vv)

    @property
    def is_minimum(self) -> bool:
        """Whether the bowl opens upward in every direction."""
        (uu, uv), (_, vv) = self.hessian
        return uu > 0 and uu * vv - uv**2 > 0

    @property
    def interior(self) -> bool:
        """Whether the vertex lies among the points: inside their convex hull."""
        return self.contains(*self.vertex)

    def contains(self, u: float, v: float) -> bool:
        """Whether (u, v) lies inside the convex hull of the points or on its border (to rounding)."""
        if not (math.isfinite(u) and math.isfinite(v)):
            return False
        corners = np.array(self.hull)
        edge = np.roll(corners, -1, axis=0) - corners
        away = np.array([u, v]) - corners
        left = edge[:, 0] * away[:, 1] - edge[:, 1] * away[:, 0]  # cross product: negative to the right of an edge
        return bool(np.all(left >= -1e-9 * np.ptp(corners, axis=0).prod()))

    def at(self, u: ArrayLike, v: ArrayLike) -> np.ndarray:
        """y of the bowl at points (u, v)."""
        design = _design(np.asarray(u, dtype=float) - self.centre[0], np.asarray(v, dtype=float) - self.centre[1])
        return np.asarray(design @ np.array(self.coefficients))


def bowl(u: ArrayLike, v: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> Bowl:
    """Fits the six terms by (weighted) least squares.

    Args:
        u: log2 of the learning rate, for instance; n values.
        v: log2 of the batch, for instance.
        y: Loss in nats.
        weights: Relative weights, one per point; None means equal ones.

    Returns:
        The bowl. The six-term form per (parameters, tokens) is the one Step Law's table is usually fitted with
        (arXiv:2503.04715); whether its vertex is an optimum to report is for ``is_minimum`` and ``interior`` to say.

    Raises:
        UserError: lengths differ, a value is not finite, a weight is not positive, fewer than six points, or points
            that do not determine the six terms (fewer than three distinct u or v, or all on a line or a conic).
    """
    us, vs, ys = (np.asarray(values, dtype=float) for values in (u, v, y))
    weight = np.ones(len(ys)) if weights is None else np.asarray(weights, dtype=float)
    if ys.ndim != 1 or not us.shape == vs.shape == weight.shape == ys.shape:
        shapes = ", ".join(str(values.shape) for values in (us, vs, ys, weight))
        raise UserError(f"bowl: u, v, y and weights must be vectors of one length, got shapes {shapes}")
    if not np.isfinite([us, vs, ys]).all() or not np.all(np.isfinite(weight) & (weight > 0)):
        raise UserError("bowl: u, v and y must be finite and weights positive; leave other points out")
    if len(ys) < TERMS:
        raise UserError(f"bowl: {TERMS} terms need at least as many points, got {len(ys)}")
    centre = (float(us.mean()), float(vs.mean()))
    design = _design(us - centre[0], vs - centre[1])
    root = np.sqrt(weight / weight.mean())
    scaled = design * root[:, None]
    length = np.linalg.norm(scaled, axis=0)
    if not length.all() or np.linalg.cond(scaled / length) > CONDITION:
        raise UserError(
            f"bowl: {len(ys)} points with {len(np.unique(us))} distinct u and {len(np.unique(vs))} distinct v do not "
            "determine a bowl; it needs three of each, not all on one curve"
        )
    unit = scaled / length
    solution = np.linalg.lstsq(unit, ys * root)[0] / length
    residual = (ys - design @ solution) * root
    freedom = len(ys) - TERMS
    variance = float(residual @ residual) / freedom if freedom else math.nan
    covariance = variance * np.linalg.inv(unit.T @ unit) / np.outer(length, length)
    c, bu, bv, uu, uv, vv = map(float, solution)
    s, t = _turn(bu, bv, uu, uv, vv)
    corners = np.stack([us, vs], axis=1)
    return Bowl(
        coefficients=(c, bu, bv, uu, uv, vv),
        centre=centre,
        vertex=(centre[0] + s, centre[1] + t),
        value=c + (bu * s + bv * t) / 2,
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        variance=variance,
        n=len(ys),
        hull=tuple((float(a), float(b)) for a, b in corners[ConvexHull(corners).vertices]),
    )


def _design(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """... x 6: the terms at each point."""
    return np.stack([np.ones_like(s), s, t, s * s, s * t, t * t], axis=-1)


def _turn(bu: float, bv: float, uu: float, uv: float, vv: float) -> tuple[float, float]:
    """The point of no slope, relative to the centre; NaN where the curvature is singular."""
    determinant = 4 * uu * vv - uv**2
    if abs(determinant) <= 1e-12 * (4 * abs(uu * vv) + uv**2):
        return math.nan, math.nan
    return (uv * bv - 2 * vv * bu) / determinant, (uv * bu - 2 * uu * bv) / determinant
