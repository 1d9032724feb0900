"""What being wrong costs, in nats: from the curvatures of the loss around its optimum over learning rate and batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from disco.fit import Prediction, Result
from disco.guide._estimates import Said, usable_bottoms
from disco.guide._target import Target

NEAR = 1.0
"""Octaves from the best batch within which cells tell the curvature over the learning rate."""
HORIZONS = 2
"""Largest horizons that tell the curvatures."""
TOLERANCE = 0.01
"""Nats that do not matter, where neither the user nor the noise of the runs says so."""


@dataclass(frozen=True)
class Curvatures(Result):
    """Nats that being one octave off costs; d octaves off cost d^2 as much. None where the study does not tell."""

    lr: float | None = None
    """Off the best learning rate, at a batch near the best one."""
    batch: float | None = None
    """Off the best batch, at the best learning rate of each."""


@dataclass(frozen=True)
class Cost(Result):
    """Nats above the loss at the true optimum. None where no curvature is known."""

    lr_ends: tuple[float, float] | None = None
    """If the true best learning rate is at the low or the high end of its interval."""
    batch_ends: tuple[float, float] | None = None
    """If the true best batch is, at the best learning rate for the batch that is used."""
    expected: float | None = None
    """Mean over the predictive distributions of both."""
    of_batch: float | None = None
    """Part of ``expected`` due to the batch, which a given or capped one makes large."""
    of_batch_interval: tuple[float, float] | None = None
    """90% interval of what the batch costs; its best rate assumed."""


@dataclass(frozen=True)
class LargestBatch(Result):
    """Largest batch whose best learning rate loses no more than ``tolerance`` against the best batch."""

    tolerance: float
    """Nats."""
    batch: float
    """Tokens, by the estimate."""
    sure: float | None
    """By the cautious end: were the best batch at the low end of its interval; None where that is not known."""
    lr: float | None
    """Learning rate there."""
    why: str


def curvatures(target: Target) -> Curvatures:
    """Medians over the cells near the best batch, and over the batches, of the largest horizons that have any."""
    rates: list[float] = []
    batches: list[float] = []
    seen = 0
    bowls = {item.tokens: item.optimum.bowl for item in usable_bottoms(target)}
    for item in reversed(target.horizons):
        own = [cell for cell in target.cells if cell.tokens == item.tokens and cell.usable]
        near = [cell.lr.curvature for cell in own if abs(math.log2(cell.batch) - item.smooth_batch) <= NEAR]
        if seen < HORIZONS and own:
            rates += near or [cell.lr.curvature for cell in own]
            seen += 1
        bowl = bowls.get(item.tokens)
        if len(batches) < HORIZONS:
            if item.over_batch is not None and item.over_batch.usable:
                batches.append(item.over_batch.curvature)
            elif bowl is not None:
                (uu, uv), (_, vv) = bowl.hessian
                batches.append((vv - uv**2 / uu) / 2)
    return Curvatures(*(float(np.median(each)) if each else None for each in (rates, batches)))


def cost(curved: Curvatures, rate: Said, best: Said, batch: float, lr: float) -> Cost:
    """What the recommendation costs.

    Args:
        curved: Of the study.
        rate: Prediction of the best rate at ``batch``.
        best: Prediction of the best batch.
        batch: Tokens per step, as it is used.
        lr: The rate that is used.
    """
    of_rate = of_batch = None
    if curved.lr is not None and rate.prediction is not None:
        of_rate = curved.lr * (rate.sd**2 + (math.log2(lr) - rate.prediction.log2) ** 2)
    if curved.batch is not None and best.prediction is not None:
        of_batch = curved.batch * (best.sd**2 + (math.log2(batch) - best.prediction.log2) ** 2)
    both = of_rate + of_batch if of_rate is not None and of_batch is not None else of_rate
    return Cost(
        lr_ends=_ends(curved.lr, rate.prediction, lr),
        batch_ends=_ends(curved.batch, best.prediction, batch),
        expected=both,
        of_batch=of_batch,
        of_batch_interval=_range(curved.batch, best.prediction, batch),
    )


def _ends(curvature: float | None, at: Prediction | None, used: float) -> tuple[float, float] | None:
    if curvature is None or at is None:
        return None
    return curvature * (math.log2(used) - at.low) ** 2, curvature * (math.log2(used) - at.high) ** 2


def _range(curvature: float | None, at: Prediction | None, used: float) -> tuple[float, float] | None:
    ends = _ends(curvature, at, used)
    if ends is None or at is None:
        return None
    return 0.0 if at.low <= math.log2(used) <= at.high else min(ends), max(ends)


def largest_batch(
    target: Target, curved: Curvatures, best: Said, rate: Callable[[float], Said], tolerance: float | None
) -> LargestBatch | None:
    """How far the batch can be raised.

    The distance from the best batch is that measured at the largest horizons, where a larger batch was measured that
    costs more (``NearOptimal``), otherwise by the curvature; the best batch itself grows with the tokens by its rule.

    Args:
        target: The run.
        curved: Of the study.
        best: Prediction of the best batch.
        rate: Best rate at a batch.
        tolerance: Nats that do not matter; None means the noise of one run, as measured around the largest bowl.
    """
    bounded = [item for item in usable_bottoms(target) if item.near.bounded and item.near.largest > 0][-HORIZONS:]
    nats = tolerance or (bounded[-1].near.tolerance if bounded else TOLERANCE)
    if best.prediction is None:
        return None
    if bounded:
        steps = [
            (math.log2(item.near.largest) - item.optimum.batch) * math.sqrt(nats / item.near.tolerance)
            for item in bounded
        ]
        step, how = float(np.median(steps)), "as measured at the largest horizons"
    elif curved.batch is not None:
        step, how = math.sqrt(nats / curved.batch), "by the curvature"
    else:
        return None
    most = math.log2(target.tokens)
    batch, sure = min(best.prediction.log2 + step, most), min(best.prediction.low + step, most)
    there = rate(2.0**batch).prediction
    why = f"{step:.1f} octaves above the best batch, {how}"
    return LargestBatch(nats, 2.0**batch, 2.0**sure, 2.0**there.log2 if there else None, why)
