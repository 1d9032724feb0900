"""Reasons not to take a minimum for an optimum: the edges of the grid, a second valley, a dip that no run shows."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from disco.fit._noise import Array, Noise

SEPARATE = 3.0
"""Standard deviations by which a barrier between two local minima must rise above both."""


def valleys(grid: Array, mean: Array, runs: Array, sigma: float, known: Noise | None) -> list[str]:
    """ "multi-modal" when a barrier between two local minima stands out of the noise.

    A minimum at an end of the grid counts only if it is as low as the lowest; one inside only if it is lower than both
    ends, since runs near divergence are noisy.

    Args:
        grid, mean, runs: Distinct x, mean loss and number of runs at each.
        sigma: Standard deviation of one run by the local fit; ``known`` is better.
    """
    if len(mean) < 5:
        return []
    apart = _apart(grid, mean, runs, sigma, known)
    lowest = int(np.argmin(mean))
    for other in range(len(mean)):
        if abs(other - lowest) < 2:
            continue
        between = slice(min(lowest, other) + 1, max(lowest, other))
        top = between.start + int(np.argmax(mean[between]))
        error = apart * np.sqrt(1 / runs[top] + 1 / runs[[lowest, other]])
        inside = 0 < other < len(mean) - 1
        counts = mean[other] < min(mean[0], mean[-1]) if inside else mean[other] - mean[lowest] < error[1]
        if counts and np.all(mean[top] - mean[[lowest, other]] > error):
            return ["multi-modal"]
    return []


def too_low(grid: Array, mean: Array, runs: Array, at: tuple[float, float], sigma: float, known: Noise | None) -> bool:
    """Whether a fitted minimum lies lower than a convex curve through the runs beside it can.

    Between two runs a convex curve lies above the straight line through the next two to the left, and above that
    through the next two to the right. A polynomial that bends around a jump of the losses, where runs begin to break,
    dips below them by far; a curve that the form can follow stays above, whatever its flanks
    (benchmarks/coverage/cell.py), unless the runs are two octaves apart and all but free of noise.

    Args:
        grid, mean, runs: Distinct x, mean loss and number of runs at each.
        at: x and y of the minimum.
        sigma: Standard deviation of one run by the local fit; ``known`` is better.
    """
    right = int(np.searchsorted(grid, at[0]))
    if len(mean) < 5 or not 0 < right < len(grid):
        return False
    apart = _apart(grid, mean, runs, sigma, known)
    for near, far in ((right - 1, right - 2), (right, right + 1)):
        if 0 <= far < len(grid):
            beyond = (at[0] - grid[near]) / (grid[near] - grid[far])
            line = mean[near] + beyond * (mean[near] - mean[far])
            if line - at[1] > apart * math.hypot((1 + beyond) / math.sqrt(runs[near]), beyond / math.sqrt(runs[far])):
                return True
    return False


def bounds(grid: Array, diverged: Array) -> tuple[float, float]:
    """Range in which a minimum can lie: the grid, extended to the nearest diverged run on either side."""
    low, high = grid[0], grid[-1]
    below, above = diverged[diverged < low], diverged[diverged > high]
    steps = np.diff(grid) if len(grid) > 1 else np.zeros(1)
    if len(below):
        low = below.max() if np.isfinite(below.max()) else low - steps[0]
    if len(above):
        high = above.min() if np.isfinite(above.min()) else high + steps[-1]
    return float(low), float(high)


def edges(lowest: int, grid: Array, low: float, high: float) -> list[str]:
    flags = []
    if lowest == 0 and low == grid[0]:
        flags.append("edge-low")
    if lowest == len(grid) - 1 and high == grid[-1]:
        flags.append("edge-high")
    return flags


def _apart(grid: Array, mean: Array, runs: Array, sigma: float, known: Noise | None) -> float:
    """``SEPARATE`` standard deviations of one run, more of them where it is less well known (Student's t)."""
    if known is not None:
        sigma, freedom = known.sd, known.freedom
    else:
        rough, freedom = _roughness(grid, mean, runs)
        sigma = min(sigma, rough) if math.isfinite(sigma) else rough
    factor = SEPARATE if math.isinf(freedom) else float(stats.t.isf(stats.norm.sf(SEPARATE), freedom))
    return factor * sigma


def _roughness(x: Array, y: Array, runs: Array) -> tuple[float, float]:
    """Standard deviation of one run by what cubics through any five neighbours leave, and its degrees of freedom."""
    left = []
    for start in range(len(x) - 4):
        five = slice(start, start + 5)
        across = np.linalg.svd(np.vander(x[five] - x[five].mean(), 4).T)[2][-1]
        left.append(float(across @ y[five]) / math.sqrt(float(np.sum(across**2 / runs[five]))))
    return math.sqrt(float(np.mean(np.square(left)))), float(len(left))
