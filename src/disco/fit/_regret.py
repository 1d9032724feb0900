"""What a choice of learning rate and batch costs against the best run of a measured grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import CloughTocher2DInterpolator
from scipy.spatial import QhullError

from disco.errors import UserError
from disco.fit._result import Result

Choice = tuple[float, float]
"""log2 of learning rate and batch."""

CAP = 1.0
"""Nats above the best run at which losses are cut off before interpolation, so that divergence does not bend it."""
OURS = ("two-stage", "joint", "one-stage")
"""Stages that ``plan`` may rest on: optima per cell, then laws; joint optima, then laws; one model of the loss."""


@dataclass(frozen=True)
class Regret(Result):
    """What a choice of learning rate and batch loses, in nats, against the best run of the grid."""

    interpolated: float
    """Smooth between the runs, which it reproduces (cubic over triangles, in logarithms; Clough & Tocher 1965); NaN
    outside their hull. Negative where it promises better than every run of the grid."""
    nearest: float
    """Of the run nearest to the choice in octaves; infinite if that one diverged."""
    outside: float
    """Octaves from the choice to the nearest run where it lies outside the hull, else 0."""

    @property
    def nats(self) -> float:
        """Interpolated, or outside the grid that of the nearest run."""
        return self.nearest if math.isnan(self.interpolated) else self.interpolated


@dataclass(frozen=True)
class Forecast(Result):
    """One method's choice for one held-out horizon."""

    family: str
    model: str
    tokens: int
    method: str
    lr: float
    """log2; NaN where the method makes no choice, and so for ``batch``."""
    batch: float
    regret: Regret | None
    note: str
    """"in-sample" (the rule was fitted to this table), "calibrated" (constants from the smaller horizons), or why
    there is no choice."""


@dataclass(frozen=True)
class Rolling(Result):
    """All methods on all held-out horizons."""

    forecasts: tuple[Forecast, ...]

    def mean(self, method: str) -> float:
        """Mean regret in nats over the held-out horizons; infinite if the method makes no choice on one of them."""
        own = [f.regret.nats if f.regret else math.inf for f in self.forecasts if f.method == method]
        return float(np.mean(own)) if own else math.inf

    @property
    def methods(self) -> tuple[str, ...]:
        """Lowest mean regret first."""
        return tuple(sorted(dict.fromkeys(f.method for f in self.forecasts), key=self.mean))

    @property
    def best(self) -> str:
        """The stage of ours with the lowest regret: what ``plan`` should rest on; empty where none made a choice."""
        ranked = [method for method in self.methods if method in OURS and math.isfinite(self.mean(method))]
        return ranked[0] if ranked else ""


def regret(lr: ArrayLike, batch: ArrayLike, loss: ArrayLike, choice: Choice) -> Regret:
    """Prices a choice on a measured grid.

    Args:
        lr: Learning rates of the runs of one model and horizon.
        batch: Their batches.
        loss: Their losses in nats; not finite means diverged.
        choice: log2 of learning rate and batch.

    Raises:
        UserError: arrays of different length, or no run with a loss.
    """
    points = np.stack([np.log2(np.asarray(lr, dtype=float)), np.log2(np.asarray(batch, dtype=float))], axis=1)
    y = np.asarray(loss, dtype=float)
    if len(y) != len(points) or not np.isfinite(y).any():
        raise UserError(f"regret: needs one loss per run and one that is finite, got {len(y)} for {len(points)} runs")
    best = float(np.nanmin(np.where(np.isfinite(y), y, math.nan)))
    away = np.hypot(*(points - np.array(choice)).T)
    near = float(y[np.argmin(away)])
    try:
        there = np.isfinite(y)
        # A straight line between two runs lies above a curved loss: on a grid of octaves by more than rules differ.
        inside = float(CloughTocher2DInterpolator(points[there], np.minimum(y[there], best + CAP))(*choice))
    except (QhullError, ValueError):  # fewer than three runs, or all on a line
        inside = math.nan
    outside = float(away.min()) if math.isnan(inside) else 0.0
    return Regret(inside - best, (near if math.isfinite(near) else math.inf) - best, outside)
