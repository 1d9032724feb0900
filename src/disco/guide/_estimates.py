"""The best batch and learning rate by each stage of the fit, and how far the stages agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from disco.fit import Bottom, Prediction, Result, Rule
from disco.fit._scaling import candidates as choices
from disco.guide._target import Target

WIDEST = 2.0
"""Octaves on either side beyond which a 90% interval says too little to be a recommendation."""
STAGES = ("two-stage", "joint", "one-stage")
NORMAL = 1.6449
"""Standard deviations on either side of a 90% interval."""
RIDGE_FLOOR = 0.1
"""Least share of the variance of the joint rate that is left at a fixed batch."""


@dataclass(frozen=True)
class Estimate(Result):
    """One recommended number. ``value`` and ``interval`` are plain numbers, not logarithms."""

    value: float
    """NaN when nothing can be said."""
    interval: tuple[float, float] | None
    """90% prediction interval of the true optimum, as far as a cap allows; None for what is given and for a default."""
    source: str
    """"given", "rule" (fitted and predicted), "assumed" (a rule, carried to another size by an assumption), "capped"
    (the best one is larger than allowed) or "default" (carried over)."""
    why: str
    """What the number rests on, or why there is no better one."""


@dataclass(frozen=True)
class Said:
    """What a stage says about one number, in log2, or why it says nothing."""

    prediction: Prediction | None
    why: str
    assumed: bool = False
    """Whether a size that was asked for is not in the rule."""
    pooled: bool = False
    """Whether it rests on all models of the family."""

    @property
    def sd(self) -> float:
        """Standard deviation that would give the interval to a normal variable, in octaves."""
        assert self.prediction is not None
        return (self.prediction.high - self.prediction.low) / 2 / NORMAL


@dataclass(frozen=True)
class Stage:
    """One way from runs to a recommendation."""

    name: str
    batch: Said
    """The best batch."""
    rate: Callable[[float], Said]
    """The best learning rate at a batch (plain number)."""


def stages(target: Target) -> dict[str, Stage]:
    """All stages of the fit, by name."""
    found = (_two_stage(target), _joint(target), _one_stage(target))
    return {stage.name: stage for stage in found}


def agreed(own: Said, others: Sequence[Said]) -> Said:
    """What the first says, its interval widened by how far the others are from it.

    The stages differ in what they assume of the shape of the loss (a curve per cell, a lopsided bowl, one formula for
    all runs), and no interval of theirs knows about the part that its own assumption gets wrong. So the variance is
    that of the stage plus that between them: the mean square of the distances from it, its own 0 included (a mixture
    over models, of which the one that predicts best counts twice; Draper 1995, J. R. Stat. Soc. B 57:45).
    """
    if own.prediction is None:
        return own
    at = own.prediction
    apart = [0.0, 0.0, *(other.prediction.log2 - at.log2 for other in others if other.prediction is not None)]
    between = NORMAL * math.sqrt(float(np.mean(np.square(apart))))
    low, high = at.log2 - math.hypot(at.log2 - at.low, between), at.log2 + math.hypot(at.high - at.log2, between)
    return replace(own, prediction=Prediction(at.log2, low, high))


def _two_stage(target: Target) -> Stage:
    """Laws of the optima of cells, and of the best batches of horizons."""

    def rate(batch: float) -> Said:
        said = _predict(target, candidates(target, "lr", ("batch", "tokens"), "quadratic"), batch)
        only = {cell.batch for cell in target.cells}
        if said.prediction is None and only == {int(batch)}:  # one batch: no rule in the batch is needed
            said = _predict(target, candidates(target, "lr", ("tokens",), "quadratic"), batch)
        return said

    return Stage("two-stage", _predict(target, candidates(target, "batch", ("tokens",), "quadratic")), rate)


def _joint(target: Target) -> Stage:
    """Laws of the joint optima; the rate at another batch lies along the ridge of the bowl."""
    best = _predict(target, candidates(target, "batch", ("tokens",), "joint"))
    at_best = _predict(target, candidates(target, "lr", ("tokens",), "joint"))
    bottoms = usable_bottoms(target)

    def rate(batch: float) -> Said:
        if best.prediction is None or at_best.prediction is None or not bottoms:
            return at_best if at_best.prediction is None else replace(best, prediction=None)
        errors = np.array([max(item.optimum.ridge_error, 1e-3) for item in bottoms])
        slope = float(np.average([item.optimum.ridge for item in bottoms], weights=errors**-2))
        away = math.log2(batch) - best.prediction.log2
        # Errors along the ridge and across it are independent, and along it the rate moves with the batch.
        square = max(at_best.sd**2 - (slope * best.sd) ** 2, RIDGE_FLOOR * at_best.sd**2)
        half = NORMAL * math.sqrt(square + (away * float(np.median(errors))) ** 2)
        middle = at_best.prediction.log2 + slope * away
        return replace(at_best, prediction=Prediction(middle, middle - half, middle + half))

    return Stage("joint", best, rate)


def usable_bottoms(target: Target) -> list[Bottom]:
    """Joint optima of the study, short horizons first."""
    own = [b for b in target.fit.bottoms if (b.family, b.model) == (target.family, target.model)]
    return [bottom for bottom in own if bottom.optimum.usable]


def _one_stage(target: Target) -> Stage:
    """The model of the loss over all runs of the family."""
    found = next((item for item in target.fit.surfaces if item.family == target.family), None)
    surface = found.surface if found else None
    if surface is None:
        reason = found.reason.removeprefix("surface: ") if found else "the fit was made without resamples"
        nothing = Said(None, f"no one-stage model: {reason}")
        return Stage("one-stage", nothing, lambda _: nothing)
    sized = surface.centre[2] != 0
    size = target.size.parameters if sized else 1.0
    if not size > 0:
        nothing = Said(None, "no one-stage model: the number of parameters of the run is not known")
        return Stage("one-stage", nothing, lambda _: nothing)
    why = f"one model of the loss over {surface.runs} runs"

    def said(value: float, interval: tuple[float, float] | None) -> Said:
        if interval is None or (interval[1] - interval[0]) / 2 > WIDEST:
            return Said(None, f"{why}, whose resamples do not bound it here")
        return Said(
            Prediction(value, *interval), why, bool(target.given) and not (sized and target.size.parameters > 0)
        )

    def rate(batch: float) -> Said:
        best = surface.optimum(target.tokens, batch, size)
        return said(best.lr, best.lr_interval)

    best = surface.optimum(target.tokens, parameters=size)
    return Stage("one-stage", said(best.batch, best.batch_interval), rate)


def candidates(target: Target, what: str, given: tuple[str, ...], recipe: str) -> Iterator[Rule]:
    """Rules to try for the run, best first; see ``fit._scaling.candidates``."""
    wanted = set(target.given or ("parameters",))
    sizes = [names for names in (("width", "depth"), ("width",), ("depth",), ("parameters",)) if wanted & set(names)]
    return choices(target.fit.rules, target.family, target.model, what, given, recipe, sizes)


def _predict(target: Target, rules: Iterator[Rule], batch: float | None = None) -> Said:
    """The first rule that predicts with an interval to act on."""
    refused = ""
    for rule in rules:
        if rule.law is None:
            refused = f"no rule {rule.name}: {rule.reason}"
            continue
        values = target.values(batch)
        if not all(values.get(name, math.nan) > 0 for name in rule.law.exponents):
            continue
        prediction = rule.law.predict(values)
        half = prediction.high - prediction.log2
        if half > WIDEST:
            size = f"plus or minus {half:.1f} octaves" if math.isfinite(half) else "unbounded"
            refused = f"the rule {rule.name} from {rule.n} optima predicts here with an interval that is {size}"
            continue
        assumed = not set(target.given) <= set(rule.law.exponents)
        return Said(prediction, f"rule {rule.name} from {rule.n} optima", assumed, not rule.model)
    return Said(None, refused or "no rule in tokens")
