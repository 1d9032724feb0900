"""The optimum over learning rate and batch together, and all that is as good as it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from disco.errors import UserError
from disco.fit._basin import Basin
from disco.fit._bowl import TERMS, Bowl, bowl
from disco.fit._result import Result

Array = NDArray[np.float64]
Interval = tuple[float, float]

REACH = 1.5
"""Octaves of batch, and of rate from the ridge, within which all runs join the bowl."""
NEAREST = 5
"""Fewest distinct batches and rates on which the bowl rests, where the grid has so many."""
SPARE = 3
"""Runs that the bowl needs beyond its six terms before it is more than an interpolation."""


@dataclass(frozen=True)
class Joint(Result):
    """Minimum of the loss over (log2 learning rate, log2 batch) at one number of tokens."""

    lr: float
    """log2; NaN where there is no minimum to report, and so for ``batch`` and ``loss``."""
    batch: float
    """log2."""
    loss: float
    """At the minimum, in nats."""
    lr_interval: Interval | None
    """None where the runs do not bound it."""
    batch_interval: Interval | None
    ridge: float
    """Exponent alpha of eta ~ B^alpha, the best rate at a batch near the minimum."""
    ridge_error: float
    noise: float
    """Standard deviation of the runs around the bowl, in nats: their noise and what a bowl cannot follow."""
    flags: tuple[str, ...]
    """Reasons not to take it for an optimum: "edge-low-lr", "edge-high-lr", "edge-low-batch", "edge-high-batch" (the
    minimum lies beyond the runs), "no-minimum" (no bowl), "flat" (not told from none), "few-points"."""
    n: int
    """Runs in the fit."""
    bowl: Bowl | None

    @property
    def usable(self) -> bool:
        """Whether this is an optimum: a minimum without a flag."""
        return not self.flags and math.isfinite(self.lr)


@dataclass(frozen=True)
class NearBatch(Result):
    """One batch of the grid and what choosing it costs. Rates are log2."""

    batch: float
    """In the units given, not its logarithm."""
    lr: float
    """Best rate at this batch."""
    lr_range: Interval | None
    """Rates that stay within the tolerance of the best of all; None where none does."""
    cost: float
    """Nats that the best rate at this batch loses against the joint optimum."""
    cost_interval: Interval


@dataclass(frozen=True)
class NearOptimal(Result):
    """The region of learning rate and batch whose loss is within a tolerance of the best."""

    tolerance: float
    """Nats."""
    batches: tuple[NearBatch, ...]
    """Those of the grid that the bowl spans, ascending."""
    largest: float
    """Largest batch, between those of the grid too, that is estimated to cost no more than the tolerance; NaN without
    an optimum."""
    largest_sure: float
    """Largest batch of which the upper end of the cost's interval is within the tolerance; NaN where none is."""
    smallest: float
    """Smallest batch that is estimated to cost no more than the tolerance."""
    bounded: bool
    """Whether a larger batch was measured and costs more. If not, ``largest`` is the end of the grid, not a limit."""
    flags: tuple[str, ...]
    """Those of the joint optimum."""


def joint(
    lr: ArrayLike, batch: ArrayLike, loss: ArrayLike, within: float | None = None, confidence: float = 0.9
) -> Joint:
    """Finds the best learning rate and batch of one number of tokens.

    Args:
        lr: Learning rates of the runs (not logarithms).
        batch: Their batches.
        loss: Their losses in nats; a run without a finite one (diverged) is left out.
        within: Use the runs whose loss is below (1 + within) times the least, as is done for Step Law's table with
            0.02. None is local, as in ``optimum``: batches within 1.5 octaves of the minimum and rates within 1.5
            octaves of the ridge through it, at least five of each; and flanks may be steep or level off, across the
            ridge and along it, as far as those of one scan may (``_basin``).
        confidence: Level of the intervals: where the loss, minimal over the other one, is sure to fall and to rise.

    Raises:
        UserError: arrays of different length, or a rate or batch that is not positive.
    """
    return _Bottom(lr, batch, loss, within, confidence).joint


def near_optimal(
    lr: ArrayLike,
    batch: ArrayLike,
    loss: ArrayLike,
    tolerance: float | None = None,
    within: float | None = None,
    confidence: float = 0.9,
) -> NearOptimal:
    """The batches, and the rates at each, that cost no more than ``tolerance`` against the joint optimum.

    Args:
        lr: As for ``joint``, and so are batch, loss, within and confidence.
        batch: See lr.
        loss: See lr.
        tolerance: Nats that do not matter. None means the standard deviation of one run around the bowl: a difference
            that one more run would not show.
        within: See lr.
        confidence: See lr.

    Raises:
        UserError: as ``joint``, or a tolerance that is not positive.
    """
    return bottom(lr, batch, loss, tolerance, within, confidence)[1]


def bottom(
    lr: ArrayLike,
    batch: ArrayLike,
    loss: ArrayLike,
    tolerance: float | None = None,
    within: float | None = None,
    confidence: float = 0.9,
) -> tuple[Joint, NearOptimal]:
    """``joint`` and ``near_optimal`` of the same runs at once."""
    found = _Bottom(lr, batch, loss, within, confidence)
    return found.joint, found.near(tolerance)


class _Bottom:
    """The joint optimum of some runs and what is needed for the region around it."""

    def __init__(
        self, lr: ArrayLike, batch: ArrayLike, loss: ArrayLike, within: float | None, confidence: float
    ) -> None:
        u, v, y = _runs(lr, batch, loss)
        fit, use = _bowl(u, v, y, within)
        self.confidence, self.basin, self.batches = confidence, None, v[use]
        if fit is None or not fit.is_minimum:
            self.joint = _none(("no-minimum",) if fit else ("few-points",), fit.n if fit else len(y), fit)
            return
        self.basin = Basin(u[use], v[use], y[use], fit, plain=within is not None)
        self.joint = _joint(u, v, fit, self.basin, confidence)

    def near(self, tolerance: float | None) -> NearOptimal:
        """The region within ``tolerance``."""
        if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
            raise UserError(f"near_optimal: tolerance must be a positive number of nats, got {tolerance}")
        best = self.joint
        limit = best.noise if tolerance is None else tolerance
        if self.basin is None or self.basin.minimum is None or math.isnan(best.lr):
            return NearOptimal(limit, (), math.nan, math.nan, math.nan, False, best.flags)
        tails = [(1 - self.confidence) / 2, (1 + self.confidence) / 2]
        grid = np.unique(self.batches)  # no cost is claimed beyond the runs of the fit
        costs, drawn = self.basin.costs(grid)
        lows, highs = np.quantile(drawn, tails, axis=0, method="inverted_cdf")
        rates = best.lr + best.ridge * (grid - best.batch)
        batches = []
        for v, rate, cost, low, high in zip(grid, rates, costs, lows, highs, strict=True):
            half = math.sqrt(2 * max(limit - cost, 0.0) / self.basin.minimum.across)
            span = (float(rate) - half, float(rate) + half) if cost <= limit else None
            batches.append(NearBatch(2.0**v, float(rate), span, float(cost), (float(low), float(high))))
        fine = np.linspace(grid[0], grid[-1], 101)
        costs, drawn = self.basin.costs(fine)
        near = fine[costs <= limit]
        sure = fine[np.quantile(drawn, tails[1], axis=0, method="inverted_cdf") <= limit]
        return NearOptimal(
            tolerance=limit,
            batches=tuple(batches),
            largest=2.0 ** float(near[-1]) if len(near) else math.nan,
            largest_sure=2.0 ** float(sure[-1]) if len(sure) else math.nan,
            smallest=2.0 ** float(near[0]) if len(near) else math.nan,
            bounded=bool(len(near) and near[-1] < fine[-1]),
            flags=best.flags,
        )


def _runs(lr: ArrayLike, batch: ArrayLike, loss: ArrayLike) -> tuple[Array, Array, Array]:
    rates, batches, losses = (np.asarray(values, dtype=float) for values in (lr, batch, loss))
    if rates.ndim != 1 or not rates.shape == batches.shape == losses.shape:
        shapes = ", ".join(str(values.shape) for values in (rates, batches, losses))
        raise UserError(f"joint: lr, batch and loss must be vectors of one length, got shapes {shapes}")
    for name, values in (("lr", rates), ("batch", batches)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise UserError(f"joint: {name} must be positive, got {values[bad[0]]} at index {bad[0]}")
    keep = np.isfinite(losses)
    return np.log2(rates[keep]), np.log2(batches[keep]), losses[keep]


def joint_moves(u: Array, v: Array, y: Array, signs: Array, bends: Array) -> tuple[Array, Array]:
    """Change of the joint optimum, (rate, batch), when the runs' residuals keep or change their sign (R x n) and the
    flanks bend by so many units (R x 2 NODES, see ``Basin.bends``), to first order.

    The local runs stay the same, so that all refits are one product. NaN if the data have no minimum.
    """
    nothing = np.full(len(signs), math.nan)
    fit, use = _bowl(u, v, y, None)
    if fit is None or not fit.is_minimum:
        return nothing, nothing.copy()
    basin = Basin(u[use], v[use], y[use], fit, plain=False)
    if basin.minimum is None:
        return nothing, nothing.copy()
    return basin.moves(signs[:, use] * basin.residual + bends @ basin.bends)


def _bowl(u: Array, v: Array, y: Array, within: float | None) -> tuple[Bowl | None, NDArray[np.bool_]]:
    """The bowl over the chosen runs, None when they do not determine one; and which they are."""
    use = np.ones(len(y), dtype=bool)
    if len(y) < TERMS + SPARE:
        return None, use
    if within is not None:
        use = y < (1 + within) * y.min()
        return _try(u, v, y, use), use
    lowest = int(np.argmin(y))
    centre, ridge, seen = (float(u[lowest]), float(v[lowest])), 0.0, []
    while True:
        off = u - centre[0] - ridge * (v - centre[1])
        use = (np.abs(v - centre[1]) <= _reach(v - centre[1])) & (np.abs(off) <= _reach(u - centre[0]))
        fit = _try(u, v, y, use)
        chosen = tuple(np.flatnonzero(use))
        if fit is None or chosen in seen or not fit.is_minimum or not _inside(fit, u, v):
            return fit, use
        seen.append(chosen)
        centre, ridge = fit.vertex, -fit.hessian[0][1] / fit.hessian[0][0]


def _reach(away: Array) -> float:
    distance = np.sort(np.abs(np.unique(np.round(away, 6))))
    return float(max(distance[min(NEAREST, len(distance)) - 1] + 1e-6, REACH))


def _try(u: Array, v: Array, y: Array, use: NDArray[np.bool_]) -> Bowl | None:
    if use.sum() < TERMS + SPARE:
        return None
    try:
        return bowl(u[use], v[use], y[use])
    except UserError:  # too few distinct rates or batches
        return None


def _inside(fit: Bowl, u: Array, v: Array) -> bool:
    (a, b) = fit.vertex
    return bool(u.min() <= a <= u.max() and v.min() <= b <= v.max())


def _none(flags: tuple[str, ...], n: int, fit: Bowl | None = None) -> Joint:
    nan, noise = math.nan, math.sqrt(fit.variance) if fit else math.nan
    return Joint(nan, nan, nan, None, None, nan, nan, noise, flags, n, fit)


def _joint(u: Array, v: Array, fit: Bowl, basin: Basin, confidence: float) -> Joint:
    at = basin.minimum
    vertex = fit.vertex if at is None else (at.u, at.v)
    flags = []
    for name, value, grid in (("lr", vertex[0], u), ("batch", vertex[1], v)):
        if value < grid.min():
            flags.append(f"edge-low-{name}")
        if value > grid.max():
            flags.append(f"edge-high-{name}")
    if not flags and not fit.contains(*vertex):  # within either range but not among the runs: name the nearer side
        flags.append("edge-low-batch" if vertex[1] < fit.centre[1] else "edge-high-batch")
    if flags or at is None:
        return _none(tuple(flags) or ("no-minimum",), fit.n, fit)
    intervals = basin.interval(0, confidence), basin.interval(1, confidence)
    return Joint(
        lr=at.u,
        batch=at.v,
        loss=at.value,
        lr_interval=intervals[0],
        batch_interval=intervals[1],
        ridge=at.ridge,
        ridge_error=basin.ridge_error,
        noise=math.sqrt(basin.variance),
        flags=("flat",) if None in intervals else (),
        n=fit.n,
        bowl=fit,
    )
