"""Which layer group wants which learning rate: best ratios, how much they matter, and whether they move the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from disco.errors import UserError
from disco.fit._cells import Columns, complete, split
from disco.fit._ratio_bowl import NOTHING, Axis, Interval, RatioBowl, ratio_bowl
from disco.fit._result import Result
from disco.fit._transfer import margin_for

GROUPS = ("input", "hidden", "output")
TOLERANCE = 0.01
"""Nats that keeping the batch may cost for the verdict that a ratio does not move it."""

Moves = Literal["yes", "no", "cannot tell"]


@dataclass(frozen=True)
class GroupRatio(Result):
    """One layer group at one number of tokens. Ratios are log2, relative to the reference group's."""

    group: str
    reference: bool
    """Whether the others' ratios are relative to this one; its own is 0 by definition, without an interval."""
    together: tuple[str, ...]
    """Groups whose rates were only swept together with this one's."""
    swept: tuple[float, ...]
    """The ratios that were tried."""
    ratio: float
    """The best one; NaN where there is none to report."""
    interval: Interval | None
    """None where the runs do not bound it."""
    curvature: float
    """Nats per octave squared of this group's rate, the others' at their best: what one octave off costs."""
    curvature_interval: Interval | None
    retuned: float
    """The same for the ratio, with the common learning rate tuned anew at the other ratio. NaN for the reference."""
    retuned_interval: Interval | None
    over_batch: float
    """Change of the best ratio per doubling of the batch; NaN with one batch."""
    over_batch_interval: Interval | None
    batch_shift: float
    """Octaves that the best batch moves per octave of this ratio, the rate tuned anew; NaN with less than three
    batches."""
    batch_shift_interval: Interval | None
    margin: float
    """Shift, up or down, that would not matter: over the swept range it costs the tolerance."""
    moves_batch: Moves
    flags: tuple[str, ...]
    """Reasons not to take ``ratio`` for an optimum: "edge-low", "edge-high" (the best ratio lies beyond those tried),
    "flat" (not told from no minimum), "no-minimum", "few-points" (fewer than three ratios), "beside-edge" (the best
    ratio of another group lies beyond those tried, and this one may move with it)."""

    @property
    def usable(self) -> bool:
        """Whether this is an optimum."""
        return not self.flags and math.isfinite(self.ratio) and not self.reference


@dataclass(frozen=True)
class RatioOptimum(Result):
    """The best learning rates of the layer groups of one model at one number of tokens."""

    family: str
    """Without its ratios."""
    model: str
    tokens: int
    batch: float
    """log2 of the batch that all else is said for: the best one, or the one of the lowest run where that is unknown."""
    groups: tuple[GroupRatio, ...]
    lr: float
    """log2 of the reference group's rate (learning rate x ratio) at the optimum."""
    lr_interval: Interval | None
    loss: float
    """At the optimum, in nats."""
    gain: float
    """Nats that the best ratios save against equal ones, each at its best learning rate; NaN where equal ones lie
    outside those tried."""
    gain_interval: Interval | None
    noise: float
    """Standard deviation of the runs around the bowl, in nats."""
    n: int
    """Runs in the fit, and how many terms it has."""
    terms: int
    assumed: tuple[str, ...]
    """Interactions that the design does not tell and that are taken as none, such as "input x hidden"."""
    flags: tuple[str, ...]
    """Of the whole fit: "few-points", "no-minimum" (in the learning rate), "edge-low-lr", "edge-high-lr",
    "edge-low-batch", "edge-high-batch", "one-rate" (the ratios are those for this rate, whatever the best one)."""

    def group(self, name: str) -> GroupRatio:
        """One group."""
        return next(item for item in self.groups if name == item.group or name in item.together)

    @property
    def ranking(self) -> tuple[str, ...]:
        """Groups by what being off costs, the most sensitive first."""
        known = [item for item in self.groups if math.isfinite(item.curvature)]
        return tuple(item.group for item in sorted(known, key=lambda item: -item.curvature))


@dataclass(frozen=True)
class LayerGroups(Result):
    """Best ratios of the layer groups' learning rates, for every model and number of tokens that sweeps them."""

    optima: tuple[RatioOptimum, ...]
    tolerance: float
    confidence: float

    @property
    def studies(self) -> tuple[tuple[str, str], ...]:
        """(family without ratios, model)."""
        return tuple(dict.fromkeys((item.family, item.model) for item in self.optima))

    def of(self, family: str, model: str) -> tuple[RatioOptimum, ...]:
        """By number of tokens."""
        return tuple(item for item in self.optima if (item.family, item.model) == (family, model))


def without_ratios(family: str) -> str:
    """A family's name with the ratios of the layer groups taken out of it: what the runs of one ratio sweep share.

    ``disco.runs.table.families`` separates them, since for all other purposes other ratios are another recipe.
    """
    parts = family.split(", ")
    return ", ".join(part for part in parts if not part.startswith(tuple(f"ratio {group} " for group in GROUPS)))


def layer_groups(columns: Columns, tolerance: float = TOLERANCE, confidence: float = 0.9) -> LayerGroups:
    """Finds the best ratios of the layer groups' learning rates.

    Base learning rate and ratios are confounded: what a group feels is their product. So the loss is fitted over the
    rates of all groups (and the batch) at once, as a log-quadratic near its minimum, and a ratio is the difference of
    two best rates. Groups whose ratio to each other never changes count as one, and the largest such set, or with
    three the output group, is the reference of the ratios. Terms that the design does not tell (a sweep of one ratio
    at a time tells all of them if the learning rate is swept at each) are left out and named. Ratios so far found by
    this in kind: arXiv:2510.03871, Fig. 4 and 11.

    Args:
        columns: As for ``fit_table``, with at least one of ratio_input, ratio_hidden, ratio_output (a missing one is 1
            everywhere). Families that differ by these ratios alone are one sweep.
        tolerance: Nats that would not matter, for the verdict on the batch.
        confidence: Level of the intervals.

    Returns:
        One result per model and number of tokens with ratios that vary; none if no ratio does.

    Raises:
        UserError: as ``fit_table``; no column of ratios, or one that is not positive; tolerance or confidence out of
            their ranges.
    """
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise UserError(f"layer_groups: tolerance must be a positive number of nats, got {tolerance}")
    if not 0 < confidence < 1:
        raise UserError(f"layer_groups: confidence must lie between 0 and 1, got {confidence}")
    table = _table(columns)
    optima = tuple(
        _optimum(piece, blocks, tolerance, confidence)
        for study in split(table, "family", "model")
        if len(blocks := _blocks(study)) > 1
        for piece in split(study, "tokens")
    )
    return LayerGroups(optima, tolerance, confidence)


def varies(columns: Columns) -> bool:
    """Whether a ratio was swept."""
    ratios = [np.asarray(columns[f"ratio_{group}"], dtype=float) for group in GROUPS if f"ratio_{group}" in columns]
    return any(len(np.unique(ratio[np.isfinite(ratio)])) > 1 for ratio in ratios)


def _table(columns: Columns) -> dict[str, np.ndarray]:
    """Rows with a loss; ``family`` without ratios, ``log2 input`` and so on: the groups' own rates."""
    names = {group: f"ratio_{group}" for group in GROUPS}
    if not any(name in columns for name in names.values()):
        raise UserError(f"layer_groups: the table has none of the columns {', '.join(names.values())}")
    complete(columns, "")  # for its checks
    n = len(columns["lr"])
    use = np.isfinite(np.asarray(columns["loss"], dtype=float))
    use &= ~np.asarray(columns.get("diverged", np.zeros(n))).astype(bool)
    lr = np.log2(np.asarray(columns["lr"], dtype=float)[use])
    family = np.asarray(columns.get("family", np.full(n, ""))).astype(str)[use]
    result = {
        "family": np.array([without_ratios(name) for name in family]),
        "model": np.asarray(columns["model"]).astype(str)[use],
        "tokens": np.asarray(columns["tokens"])[use],
        "batch": np.log2(np.asarray(columns["batch"], dtype=float)[use]),
        "loss": np.asarray(columns["loss"], dtype=float)[use],
    }
    for group, name in names.items():
        ratio = np.asarray(columns.get(name, np.ones(n)), dtype=float)[use]
        bad = np.flatnonzero(~(np.isfinite(ratio) & (ratio > 0)))
        if len(bad):
            raise UserError(f"layer_groups: column {name} must be positive, got {ratio[bad[0]]}")
        result[group] = np.round(lr + np.log2(ratio), 9)
    return result


def _blocks(study: Columns) -> list[tuple[str, ...]]:
    """Groups whose rates keep their ratio, the reference first; in each the one that names it first."""
    blocks: list[list[str]] = []
    for group in reversed(GROUPS):
        near = (block for block in blocks if np.ptp(study[group] - study[block[0]]) < 1e-6)
        same = next(near, None)
        if same is None:
            blocks.append([group])
        else:
            same.append(group)
    return [tuple(block) for block in sorted(blocks, key=lambda block: -len(block))]  # stable: ties go to the output


def _optimum(rows: Columns, blocks: list[tuple[str, ...]], tolerance: float, confidence: float) -> RatioOptimum:
    lead = blocks[0][0]
    swept = {block[0]: np.unique(np.round(rows[block[0]] - rows[lead], 6)) for block in blocks[1:]}
    few = [group for group, values in swept.items() if len(values) < 3]
    lowest = int(np.argmin(rows["loss"]))
    use = np.ones(len(rows["loss"]), dtype=bool)
    for group in few:  # two ratios tell no minimum: stay at the better one
        away = rows[group] - rows[lead]
        use &= np.abs(away - away[lowest]) < 1e-6
    axes = [Axis("lr", rows[lead][use])]
    axes += [Axis(group, (rows[group] - rows[lead])[use]) for group in swept if group not in few]
    axes.append(Axis("batch", rows["batch"][use]))
    fit = ratio_bowl(axes, rows["loss"][use], confidence)
    equal = all(values[0] <= 0 <= values[-1] for values in swept.values())
    gain, gain_interval = fit.cost_of(dict.fromkeys(swept, 0.0)) if equal and not few else NOTHING
    lr, lr_interval = fit.optimum("lr")
    ordered = sorted(blocks, key=lambda block: GROUPS.index(block[0]))
    return RatioOptimum(
        family=str(rows["family"][0]),
        model=str(rows["model"][0]),
        tokens=int(rows["tokens"][0]),
        batch=fit.batch,
        groups=tuple(_group(fit, block, swept.get(block[0]), block[0] in few, tolerance) for block in ordered),
        lr=lr,
        lr_interval=lr_interval,
        loss=fit.loss,
        gain=gain,
        gain_interval=gain_interval,
        noise=fit.noise,
        n=fit.n,
        terms=fit.terms,
        assumed=fit.assumed,
        flags=fit.flags,
    )


def _group(fit: RatioBowl, block: tuple[str, ...], swept: np.ndarray | None, few: bool, tolerance: float) -> GroupRatio:
    """What the bowl says of one group; ``swept`` is None for the reference."""
    name, margin = block[0], math.nan
    ratio = retuned = over = shift = NOTHING
    moves: Moves = "cannot tell"
    if swept is None:
        ratio = (0.0, None)
    elif not few:
        ratio, retuned, over, shift = fit.optimum(name), fit.retuned(name), fit.over_batch(name), fit.batch_shift(name)
        margin, moves = _verdict(shift[1], fit.batch_stiffness, float(np.ptp(swept)), tolerance)
    curvature = fit.curvature("lr" if swept is None else name)
    return GroupRatio(
        group=name,
        reference=swept is None,
        together=block[1:],
        swept=() if swept is None else tuple(map(float, swept)),
        ratio=ratio[0],
        interval=ratio[1],
        curvature=curvature[0],
        curvature_interval=curvature[1],
        retuned=retuned[0],
        retuned_interval=retuned[1],
        over_batch=over[0],
        over_batch_interval=over[1],
        batch_shift=shift[0],
        batch_shift_interval=shift[1],
        margin=margin,
        moves_batch=moves,
        flags=("few-points",) if few else () if swept is None else fit.flags_of(name),
    )


def _verdict(shift: Interval | None, stiffness: float, octaves: float, tolerance: float) -> tuple[float, Moves]:
    """Whether the ratio moves the best batch by more than what would not matter over the swept octaves of ratio."""
    if not stiffness > 0:
        return math.nan, "cannot tell"
    margin = margin_for(stiffness, tolerance, octaves)
    if shift is None:
        return margin, "cannot tell"
    if -margin <= shift[0] and shift[1] <= margin:
        return margin, "no"
    return margin, "yes" if shift[0] > margin or shift[1] < -margin else "cannot tell"
