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

    What the norm has gained since its start goes on as a power of the path: the last slope, which fades.
    """
    path = course.path_at(tokens)
    middle = _at_path(course, math.log2(path), layer) if path > 0 else math.nan
    if math.isnan(middle):
        return math.nan, math.nan, f"fewer than {POINTS} points with a norm that grew"
    ahead = max(math.log2(path) - float(_gains(course, layer)[1][-1]), 0.0)
    return middle, math.hypot(SPREAD[0], SPREAD[1] * ahead), ""


def own_slope(course: Course, tokens: float, layer: str = "output") -> float:
    """Octaves of the norm after ``tokens`` tokens per octave of the rate of the whole run, so of its path; or NaN."""
    path = course.path_at(tokens)
    if not path > 0:
        return math.nan
    low, high = (_at_path(course, math.log2(path) + octaves, layer) for octaves in (-0.5, 0.5))
    return high - low


def _at_path(course: Course, at: float, layer: str) -> float:
    """log2 of the norm at a log2 path: as measured, or carried on by a least-squares line over the last ``REACH``."""
    start, x, y = _gains(course, layer)
    if len(x) < POINTS:
        return math.nan
    if at <= x[-1]:
        return math.log2(start + 2.0 ** float(np.interp(at, x, y)))
    near = x >= x[-1] - REACH - 1e-9
    near[-POINTS:] = True
    slope = float(np.clip(np.polyfit(x[near], y[near], 1)[0], 0.0, STEEPEST))
    gained = float(y[-1]) + slope * (1 - math.exp(-BEND * (at - float(x[-1])))) / BEND
    return math.log2(start + 2.0**gained)


def _gains(course: Course, layer: str) -> tuple[float, Array, Array]:
    """Norm at the start (0 where it was not logged), and log2 of path and of what the norm gained."""
    norm = course.group_norm(layer)
    known = np.isfinite(norm) & np.isfinite(course.path) & (norm > 0)
    path, norm = course.path[known], norm[known]
    start = float(norm[0]) if len(path) and path[0] == 0 else 0.0
    grew = (path > 0) & (norm > start)
    return start, np.log2(path[grew]), np.log2(norm[grew] - start)
