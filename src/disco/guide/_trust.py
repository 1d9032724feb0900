"""Whether to act on a plan, and why not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from disco.fit import Horizon
from disco.guide._cost import TOLERANCE, Curvatures
from disco.guide._estimates import Estimate
from disco.guide._settings import COMPARED, Difference
from disco.guide._target import Target
from disco.runs.units import counted, error_digits, power

Trust = Literal["ok", "caution", "do not trust"]
Reason = tuple[Trust, str]
"""How much it weighs ("ok": only worth knowing), and what it is."""
LEVELS: tuple[Trust, ...] = ("ok", "caution", "do not trust")

WIDE = 1.0
"""Octaves on either side of the learning rate beyond which an interval is a reason for caution."""
EDGES = 0.5
"""Share of the cells of the largest horizon without an optimum from which on the grid was in the wrong place."""
SIGNIFICANT = 0.05
"""p-value below which an interaction of batch and tokens counts as seen."""
STRAY = 1.0
"""Octaves outside the grid of batches from which on a batch is not to be trusted."""


def verdict(reasons: Sequence[Reason]) -> Trust:
    """The worst of them."""
    return LEVELS[max((LEVELS.index(level) for level, _ in reasons), default=0)]


def reasons(
    target: Target, stage: str, batch: Estimate, lr: Estimate, curved: Curvatures, unlike: Sequence[Difference],
    unrecorded: Sequence[str], adaptive: bool, pooled: bool,
) -> Iterator[Reason]:  # fmt: skip
    """Everything that speaks against the plan.

    Args:
        target: The run.
        stage: Name of the one that the plan rests on.
        batch: As recommended.
        lr: As recommended.
        curved: Of the study.
        unlike: Settings that differ from the sweep's.
        unrecorded: Settings of the run that the sweep does not tell, by dotted name.
        adaptive: Whether the rates are Adam's.
        pooled: Whether the rate rests on all models of the family.
    """
    for name, number in (("batch", batch), ("learning rate", lr)):
        if number.source == "default":
            yield "do not trust", f"the {name} is a default, not a prediction"
    yield from _reach(target, target.family_horizons if pooled else target.horizons)
    yield from _grid(target, batch)
    yield from _optima(target, pooled)
    if curved.lr is None:
        yield "do not trust", "no optimum was found, so what a wrong learning rate costs is not known"
    yield from _size(target, adaptive)
    if lr.interval and (lr.interval[1] / lr.interval[0]) > 2 ** (2 * WIDE):
        yield "caution", f"the interval of the learning rate is wider than {WIDE:g} octave on either side"
    for each in unlike:
        yield "do not trust" if each.setting == "optimizer.name" else "caution", each.text
    if unrecorded:
        names = [COMPARED[name][0] for name in unrecorded]
        listed = f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"
        yield "caution", f"the sweep's {listed} not recorded, so not compared with the run's"
    if len({study[0] for study in target.fit.studies}) > 1:
        yield "ok", f"the study has several families; this is for {target.family!r}"
    if stage != "one-stage":  # that one has the product
        yield from _bend(target, batch.value, curved)


def _bend(target: Target, batch: float, curved: Curvatures) -> Iterator[Reason]:
    """lr(batch, tokens) is no plane, and that matters here.

    How far its product term, change of the exponent of the batch per doubling of tokens, moves the rate at the plan is
    counted from the middle of the optima, about which the plane is fitted. With much data a term that moves nothing is
    significant too, so the move has to cost more than ``TOLERANCE`` as well.
    """
    found = target.fit.rule(target.family, target.model, "lr(batch, tokens)").interaction
    if found is None or found.p_value >= SIGNIFICANT or curved.lr is None:
        return
    use = [cell for cell in target.cells if cell.usable]
    away = [
        math.log2(value) - sum(math.log2(getattr(cell, name)) for cell in use) / len(use)
        for name, value in (("batch", batch), ("tokens", target.tokens))
    ]
    moved = found.value * math.prod(away)
    nats = curved.lr * moved**2
    if nats >= TOLERANCE:
        change = error_digits(found.value, found.standard_error)
        text = f"the exponent of the batch changes by {change} per doubling of tokens, which the rule leaves out: about"
        yield "caution", f"{text} {abs(moved):.1f} octaves of learning rate here, {nats:.2g} nats"


def _reach(target: Target, horizons: Sequence[Horizon]) -> Iterator[Reason]:
    first, last = horizons[0].tokens, horizons[-1].tokens
    octaves, span = math.log2(target.tokens / last), math.log2(last / first)
    text = f"extrapolated {octaves:.1f} doublings of tokens from a study that spans {span:.1f}"
    if octaves > max(span, 1.0):
        yield "do not trust", f"{text}: a law that bends would not show"
    elif octaves > max(span / 2, 1.0):
        yield "caution", text
    if octaves < -span:
        far = octaves < -span - max(span, 1.0)
        text = f"the run is shorter than the shortest horizon swept, {counted(first)} tokens"
        yield "do not trust" if far else "caution", text


def _grid(target: Target, batch: Estimate) -> Iterator[Reason]:
    cells = target.cells
    grid = sorted({cell.batch for cell in cells})
    if len(grid) == 1 and batch.source == "rule":
        yield "caution", "one batch was swept with this model, so its best batch is that of the rule over all models"
    elif len(grid) == 1:
        known = batch.source == "given" and batch.value == grid[0]
        yield "caution" if known else "do not trust", "one batch was swept, so nothing is known about the best one"
    if not grid[0] <= batch.value <= grid[-1]:
        far = batch.value > grid[-1] * 2**STRAY or batch.value < grid[0] / 2**STRAY
        ends = f"{counted(grid[0])} to {counted(grid[-1])} tokens"
        text = f"a batch of {power(batch.value)} lies outside the grid of {ends}"
        yield "do not trust" if far and batch.source == "given" else "caution", text
    edges = [item for item in target.horizons if item.at_edge]
    if batch.source == "rule" and len(edges) * 2 > len(target.horizons):
        yield (
            "caution",
            f"the best batch was at the edge of the grid at {len(edges)} of {len(target.horizons)} horizons",
        )


def _optima(target: Target, pooled: bool) -> Iterator[Reason]:
    """Cells without an optimum: at the largest horizon, or of all models where the rule rests on all."""
    if pooled:
        cells = [cell for cell in target.fit.cells if cell.family == target.family]
        where = "of all models"
    else:
        cells = [cell for cell in target.cells if cell.tokens == target.last.tokens]
        where = "of the largest horizon"
    bad = [cell for cell in cells if not cell.usable]
    text = f"{len(bad)} of {len(cells)} cells {where} have no optimum"
    if len(bad) > EDGES * len(cells):
        flags = ", ".join(sorted({flag for cell in bad for flag in cell.lr.flags}))
        yield "do not trust", f"{text} ({flags}): the grid was in the wrong place, or the runs too noisy"
    elif bad:
        yield "ok", f"{text} and are left out"


def _size(target: Target, adaptive: bool) -> Iterator[Reason]:
    rules = [rule for rule in target.fit.rules if rule.family == target.family and rule.law is not None]
    for name in target.given:
        measured = any(rule.law and name in rule.law.exponents and rule.name.startswith("lr") for rule in rules)
        value, known = getattr(target.size, name), getattr(target.last, name)
        if measured:
            largest = max(getattr(cell, name) for cell in target.fit.cells if cell.family == target.family)
            if value > 4 * largest:
                yield "caution", f"{name} {value:,.6g} is far beyond the largest swept, {largest:,.6g}"
            continue
        level, why = _assumption(name, adaptive)
        swept = f"{known:,.6g}" if math.isfinite(known) else "unknown"
        yield level, f"{name} {value:,.6g} is not that of the sweep ({swept}): assumed, not measured: {why}"


def _assumption(name: str, adaptive: bool) -> Reason:
    """What carries over to another size where the sweep has one size only."""
    if adaptive:
        return "do not trust", (
            "no change of the learning rate, although Adam's falls with the size (arXiv:2203.03466); sweep another size"
        )
    if name == "width":
        return "caution", (
            "a learning rate in the layer's operator norm transfers over width by theory (arXiv:2405.14813, "
            "arXiv:2409.20325), and so is the best batch taken to"
        )
    if name == "depth":
        return "caution", "the best learning rate did not move with depth in arXiv:2510.03871, Tables 1 to 3"
    return "caution", "rates in operator norms and best batches do not move with the number of parameters"
