"""How noisy the losses are, and weights that do not collapse the sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from disco.fit._result import Result

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Noise(Result):
    """A standard deviation of the loss of one run, and how well it is known."""

    sd: float
    """Nats."""
    freedom: float
    """Degrees of freedom of its estimate; infinite: exact."""
    correlation: float = math.nan
    """Of the losses of one run at numbers of tokens an octave apart, shrunk to 1/2; NaN where it has one horizon."""


@dataclass(frozen=True)
class Contrasts:
    """What one scan says about the noise of its runs: independent contrasts z ~ N(0, sigma^2 + bend), in which the
    polynomial has dropped out and ``bend`` is the variance that the shape of the curve may add, and repeated runs."""

    z: Array
    bend: Array
    squares: float
    """Squared deviations of runs (seeds) from the mean at their x."""
    freedom: float
    """Degrees of freedom of ``squares``."""
    x: Array = field(default_factory=lambda: np.zeros(0))
    """Distinct x of the runs behind ``z``, ascending."""
    basis: Array = field(default_factory=lambda: np.zeros((0, 0)))
    """len(x) x len(z), orthonormal columns: ``z`` from the losses."""


WINDOW_FREEDOM = 2.0
"""Degrees of freedom that all windows of a study together count as."""
SMOOTH_CELLS, SMOOTH_FREEDOM = 6, 12.0
"""Cells and degrees of freedom from which on the noise may depend on batch and tokens."""


def pooled_noise(
    scans: Sequence[Contrasts | None], batch: ArrayLike, tokens: ArrayLike, runs: Sequence[object] | None = None,
    windows: ArrayLike | None = None,
) -> list[Noise | None]:  # fmt: skip
    """Standard deviation of the loss of one run in every cell, pooled over all of them.

    By restricted likelihood from the residuals of the cells' own curves and the spread between seeds. How much the
    curves bend is estimated with it, within a factor of e or so of what ``_smooth`` assumes. log sigma is linear in
    log batch and log tokens where Akaike's criterion prefers that and there are six cells and twelve degrees of
    freedom.

    Args:
        scans: One per cell; None where a cell says nothing.
        batch, tokens: Positive, of each cell.
        runs: Cells of equal entries share their runs, as horizons of one batch do, which correlates their noise. The
            correlation is estimated (``correlation``), and so many cells count as their squares hold independent ones.
            None: all independent.
        windows: Spread within a run's last evaluations, one per cell. It does not see the seed, but contains the fall
            of the loss; so all of them together count as an estimate with two degrees of freedom: to a factor of two.

    Returns:
        One per cell, its degrees of freedom those of the pool; None where nothing is known.
    """
    nothing: list[Noise | None] = [None] * len(scans)
    some = [scan for scan in scans if scan is not None]
    rows = np.array([scan is not None for scan in scans])
    window = pooled(np.zeros(0) if windows is None else windows)
    seen = WINDOW_FREEDOM if window > 0 else 0.0
    information = sum(len(scan.z) + scan.freedom for scan in some) + seen
    squares = sum(float(scan.z @ scan.z) + scan.squares for scan in some) + (seen * window**2 if seen else 0.0)
    if not some or information < 1 or squares <= 0:
        return nothing
    logs = np.stack([np.log2(np.asarray(batch, dtype=float)), np.log2(np.asarray(tokens, dtype=float))], axis=1)
    logs = logs - logs.mean(axis=0)

    top = math.log(squares / information)
    lowest = top - 14

    def loss(parameters: Array) -> float:
        """Minus twice the log-likelihood, of log sigma^2 = level + slopes (log batch, log tokens), and bend times e^t
        with t ~ N(0, 1)."""
        level, t, *slopes = parameters
        total = t * t - 0.5 * level + 100 * max(0.0, lowest - level)  # the prior of sigma is that of ``_smooth``
        if seen:
            total += seen * (level + window**2 * math.exp(-max(level, lowest - 14)))
        for scan, at in zip(some, logs[rows], strict=True):
            log_square = max(level + float(at[: len(slopes)] @ slopes), lowest - 14)
            variance = math.exp(log_square) + math.exp(t) * scan.bend
            total += float(np.sum(np.log(variance) + scan.z**2 / variance))
            total += scan.freedom * log_square + scan.squares * math.exp(-log_square)
        return total

    # From the top and from far below: where the bend explains nearly all there are two maxima.
    starts = [np.array([level, 0.0]) for level in (top, top - 4)]
    best = min((_minimum(loss, start) for start in starts), key=lambda found: found[0])
    varied = bool(np.all(np.ptp(logs[rows], axis=0) > 0))
    if varied and len(some) >= SMOOTH_CELLS and information >= SMOOTH_FREEDOM:
        sloped = _minimum(loss, np.append(best[1], [0.0, 0.0]))
        if sloped[0] < best[0] - 4:
            best = sloped
    level, t, *slopes = best[1]
    square = np.exp(level + logs[:, : len(slopes)] @ slopes)
    bend, octaves = math.exp(t), np.log2(np.asarray(tokens, dtype=float))
    share = np.zeros(len(scans))  # curvature of the likelihood in log sigma^2, in units of that of one plain residual
    shared: dict[object, list[int]] = {}
    for index, scan in enumerate(scans):
        if scan is not None:
            share[index] = np.sum((square[index] / (square[index] + bend * scan.bend)) ** 2) + scan.freedom
            shared.setdefault(index if runs is None else runs[index], []).append(index)
    groups = [group for group in shared.values() if len(group) > 1]
    along = _correlation(scans, square, bend, octaves, groups) if groups else math.nan
    freedom = seen - len(slopes)
    for group in shared.values():  # those of a sum of squares, of which the cells of a group share what the least has
        of_squares = along ** (2 * np.abs(np.subtract.outer(octaves[group], octaves[group])))  # alone: nan^0 = 1
        common = float(np.sum(of_squares * np.minimum.outer(share[group], share[group])))
        freedom += float(share[group].sum()) ** 2 / max(common, 1e-300)
    if freedom < 1:
        return nothing
    return [Noise(float(math.sqrt(value)), float(freedom), along) for value in square]


def _correlation(
    scans: Sequence[Contrasts | None], square: Array, bend: float, octaves: Array, groups: Sequence[Sequence[int]]
) -> float:
    """Correlation of a run's losses one octave of tokens apart; d octaves apart it is that to the power of d.

    Its posterior mean, with a flat prior from 0 to 1, from products of a run's residuals at two horizons, pooled over
    all runs. The residuals are those of the scans' own curves; contrasts in which the bend of a curve may exceed the
    noise weigh little.

    Args:
        scans, octaves: One per cell; log2 of its tokens.
        square: Variance of the noise in each cell.
        bend: Factor of the scans' ``bend``.
        groups: Indices of cells that share their runs.
    """
    residuals: dict[int, tuple[Array, Array, Array]] = {}
    for index, scan in enumerate(scans):
        if scan is not None:
            weight = (square[index] / (square[index] + bend * scan.bend)) ** 2
            residual = scan.basis @ (weight * scan.z) / math.sqrt(square[index])
            residuals[index] = np.round(scan.x, 9), residual, scan.basis * weight @ scan.basis.T
    sums: dict[float, tuple[float, float]] = {}
    for i, j in (pair for group in groups for pair in combinations(group, 2)):
        (x, first, spread), (other_x, second, other) = residuals[i], residuals[j]
        _, of_i, of_j = np.intersect1d(x, other_x, return_indices=True)
        apart = round(abs(float(octaves[i] - octaves[j])), 2)
        product, alone = sums.get(apart, (0.0, 0.0))
        product += float(first[of_i] @ second[of_j])
        sums[apart] = product, alone + float(np.sum(spread[np.ix_(of_i, of_i)] * other[np.ix_(of_j, of_j)]))
    rho = np.linspace(0.0, 0.99, 100)
    log_chance = np.zeros(len(rho))
    for apart, (product, alone) in sums.items():
        if alone > 1e-9:  # the mean of so many products of two normal variables, about their correlation
            expected = rho**apart
            log_chance -= 0.5 * alone * (product / alone - expected) ** 2 / (1 + expected**2)
            log_chance -= 0.5 * np.log1p(expected**2) * alone / (1 + alone)
    chance = np.exp(log_chance - log_chance.max())
    return float(chance @ rho / chance.sum())


def _minimum(loss: Callable[[Array], float], start: Array) -> tuple[float, Array]:
    found = optimize.minimize(
        loss, start, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-3, "maxiter": 2000}
    )
    return float(found.fun), np.asarray(found.x)


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
