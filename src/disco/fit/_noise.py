"""How noisy the losses are, and weights that do not collapse the sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def weights(sigma: ArrayLike | None, n: int, floor: bool) -> Array:
    """Least-squares weights 1 / sigma^2, of mean 1.

    Args:
        sigma: Standard deviations of ``n`` points; None, or all of them 0 or missing, means equal weights.
        n: Number of points.
        floor: Raise every sigma to at least their median. A window of three evaluations knows its spread only to
            a factor of two, and a lucky small one would otherwise take all the weight.

    A sigma of 0 or NaN beside positive ones counts as the smallest positive one: no point is ever infinitely certain.
    """
    if sigma is None:
        return np.ones(n)
    spread = np.asarray(sigma, dtype=float)
    positive = spread[np.isfinite(spread) & (spread > 0)]
    if not len(positive):
        return np.ones(n)
    spread = np.where(np.isfinite(spread) & (spread > 0), spread, positive.min())
    if floor:
        spread = np.maximum(spread, np.median(positive))
    result = spread**-2.0
    return np.asarray(result / result.mean())


def effective(weight: Array) -> float:
    """Kish's effective number of points, (sum w)^2 / sum w^2: their number when all weights are equal."""
    return float(weight.sum() ** 2 / (weight**2).sum())


def pooled(sigma: ArrayLike) -> float:
    """Root mean square of the standard deviations that are there; NaN when none is."""
    spread = np.asarray(sigma, dtype=float)
    spread = spread[np.isfinite(spread)]
    return float(np.sqrt(np.mean(spread**2))) if len(spread) else float("nan")


def within_groups(y: ArrayLike, group: ArrayLike) -> float:
    """Standard deviation of ``y`` around the means of its groups, pooled over them; NaN without a repeated group.

    With y the losses of several seeds and group their learning rate this is the noise from run to run, which the
    window of one run does not see.
    """
    values, labels = np.asarray(y, dtype=float), np.asarray(group)
    use = np.isfinite(values)
    values, labels = values[use], labels[use]
    names, index = np.unique(labels, return_inverse=True)
    freedom = len(values) - len(names)
    if freedom < 1:
        return float("nan")
    means = np.bincount(index, values) / np.bincount(index)
    return float(np.sqrt(np.sum((values - means[index]) ** 2) / freedom))
