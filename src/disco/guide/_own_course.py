"""A norm carried on from a run's own course, without any other run."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from disco.guide._course import Course

Array = NDArray[np.float64]

REACH, POINTS = 1.0, 3
"""Octaves of path over which a run's own slope is taken, and points at least."""
BEND = 0.07
"""Part of its slope that a run loses per octave of path to come."""
SPREAD = (0.03, 0.19)
"""Standard deviation of the error, octaves of norm: at once, and per octave of path to come. These and the bend were
measured on 199 runs of Scion without and with momentum and of AdamW (docs/log.md)."""
STEEPEST = 1.0
"""What a norm gains grows at most in proportion to the path."""


def own_course(course: Course, tokens: float, layer: str = "output") -> tuple[float, float, str]:
    """log2 of the norm after ``tokens`` tokens, the standard deviation of its error, and why there is none (or "").

    What the norm has gained since its start goes on as a power of the path: the last ``own_slope``, which fades.
    """
    slope = own_slope(course, layer)
    if math.isnan(slope):
        return math.nan, math.nan, f"fewer than {POINTS} points with a norm that grew"
    start, x, y = _gains(course, layer)
    ahead = max(math.log2(course.path_at(tokens)) - float(x[-1]), 0.0)
    gained = 2.0 ** (float(y[-1]) + slope * (1 - math.exp(-BEND * ahead)) / BEND)
    return math.log2(start + gained), math.hypot(SPREAD[0], SPREAD[1] * ahead), ""


def own_slope(course: Course, layer: str = "output") -> float:
    """Octaves that the norm gains per octave of path: a least-squares line over the last ``REACH``; NaN of too few."""
    _, x, y = _gains(course, layer)
    if len(x) < POINTS:
        return math.nan
    near = x >= x[-1] - REACH - 1e-9
    near[-POINTS:] = True
    return float(np.clip(np.polyfit(x[near], y[near], 1)[0], 0.0, STEEPEST))


def _gains(course: Course, layer: str) -> tuple[float, Array, Array]:
    """Norm at the start (0 where it was not logged), and log2 of path and of what the norm gained."""
    norm = course.group_norm(layer)
    known = np.isfinite(norm) & np.isfinite(course.path) & (norm > 0)
    path, norm = course.path[known], norm[known]
    start = float(norm[0]) if len(path) and path[0] == 0 else 0.0
    grew = (path > 0) & (norm > start)
    return start, np.log2(path[grew]), np.log2(norm[grew] - start)
