"""Scaling rules of a study: from its optima to laws in batch, tokens and model size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from disco.errors import UserError
from disco.fit._cells import Cell, Horizon
from disco.fit._joint import Joint
from disco.fit._laws import (
    SIZES,
    HeldOut,
    Interaction,
    Interval,
    Rows,
    fit_rows,
    held_out,
    interaction,
    not_enough,
    rows_of,
    with_resamples,
)
from disco.fit._resample import Resamples
from disco.fit._result import Result
from disco.fit._rules import PowerLaw
from disco.runs.units import exact

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rule(Result):
    """A scaling rule of one model, or of the models of a family, or why there is none."""

    family: str
    model: str
    """Empty for a rule over several models."""
    name: str
    """"lr(batch, tokens)", "batch(tokens)", "lr(tokens)", "norm(tokens)" or "first-hit lr(batch, tokens)"; over several
    models with "parameters", or "width" and "depth", in the brackets."""
    recipe: str
    """Where its optima come from: "quadratic" or "paper" (see ``optimum``), or "joint" (see ``joint``)."""
    condition: str
    """What is held fixed or assumed, in words."""
    law: PowerLaw | None
    n: int
    """Optima it rests on."""
    left_out: int
    """Cells or horizons without a measured optimum (edges of the grid, flat, few points); ``law.censored`` of them
    bound the law from one side."""
    reason: str
    """Empty, or why there is no law and what is needed."""
    interaction: Interaction | None = None
    """Of batch and tokens; None where it cannot be told."""
    held_out: tuple[HeldOut, ...] = ()
    """Leaving out one number of tokens at a time."""


@dataclass(frozen=True)
class Composite(Result):
    """Exponent of the tokens in eta* at the best batch, two ways that should agree."""

    family: str
    model: str
    composite: float
    """From lr(batch, tokens) at batch(tokens): exponent of tokens + exponent of batch x that of the best batch."""
    direct: float
    """From lr(tokens)."""
    composite_interval: Interval | None
    """90%; None without resamples, since the three rules share their runs. So is the next."""
    difference_interval: Interval | None
    """Of composite minus direct; where it excludes 0, lr(batch, tokens) is no plane or the best batch no power law."""


def candidates(
    rules: Sequence[Rule], family: str, model: str, what: str, given: tuple[str, ...], recipe: str,
    sizes: Sequence[tuple[str, ...]] = (("parameters",),),
) -> Iterator[Rule]:  # fmt: skip
    """Rules to predict with, best first: over the models of the family with ``sizes`` in them, over all of them without
    a size (batches only), of the model itself. Without a law they say why. A rule for the batch with a size that is not
    told to matter is left out, since it costs precision."""
    plain = ", ".join(given)
    wanted = [("", f"{what}({plain}, {', '.join(names)})") for names in sizes]
    wanted += [("", f"{what}({plain})")] if what == "batch" else []
    for owner, name in (*wanted, (model, f"{what}({plain})")):
        for rule in rules:
            if (rule.family, rule.model, rule.name, rule.recipe) != (family, owner, name, recipe):
                continue
            if what == "batch" and rule.law is not None and "parameters" in rule.law.exponents:
                low, high = rule.law.interval("parameters")
                if low <= 0 <= high:
                    continue
            yield rule


class Scaling:
    """Builds the rules of a study; resampled where resamples are given. ``draws`` keeps their coefficients."""

    def __init__(self, cells: Sequence[Cell], horizons: Sequence[Horizon], resamples: Resamples | None) -> None:
        self.cells, self.horizons, self.resamples = cells, horizons, resamples
        self._draws: dict[tuple[str, str, str], Array] = {}

    def model_rules(
        self, family: str, model: str, hits: Sequence[tuple[int, float, float]], curves: int
    ) -> Iterator[Rule]:
        """The rules of one model.

        Args:
            family: Of the study.
            model: Of the study.
            hits: (batch, log2 rate, tokens) of the first hits of the optimal norm.
            curves: (batch, rate) pairs that could have had one.
        """
        cells = [i for i, cell in enumerate(self.cells) if (cell.family, cell.model) == (family, model)]
        items = [i for i, item in enumerate(self.horizons) if (item.family, item.model) == (family, model)]
        several = any(len(self.horizons[i].batches) > 1 for i in items)
        where = "at the best batch" if several else f"at a batch of {exact(self.horizons[items[0]].batch)} tokens"
        study = (family, model)
        yield self._rule(*study, "lr(batch, tokens)", "quadratic", "", self._rates(cells), len(cells))
        yield self._rule(*study, "lr(tokens)", "quadratic", where, self._best(items, "smooth_lr"), len(items))
        yield self._rule(*study, "lr(batch, tokens)", "paper", "", self._paper(cells), len(cells))
        yield self._rule(*study, "lr(tokens)", "paper", where, self._paper(self._at_best(items)), len(items))
        yield self._rule(
            *study, "batch(tokens)", "quadratic", "at the best learning rate", self._batches(items), len(items)
        )
        yield self._rule(*study, "norm(tokens)", "quadratic", where, self._best(items, "smooth_norm"), len(items))
        rows = rows_of(
            [rate for _, rate, _ in hits], {"batch": [b for b, _, _ in hits], "tokens": [t for _, _, t in hits]}
        )
        yield self._rule(*study, "first-hit lr(batch, tokens)", "quadratic", "norm = its optimum", rows, curves)

    def family_rules(self, family: str) -> Iterator[Rule]:
        """The rules over the models of one family, with a column per axis of size that varies."""
        cells = [i for i, cell in enumerate(self.cells) if cell.family == family]
        items = [i for i, item in enumerate(self.horizons) if item.family == family]
        for sizes in self._axes(cells):
            names = ", ".join(sizes)
            for name, rows, total, condition in (
                (f"lr(batch, tokens, {names})", self._rates(cells, sizes), len(cells), ""),
                (f"lr(tokens, {names})", self._best(items, "smooth_lr", sizes), len(items), "at the best batch"),
                (f"batch(tokens, {names})", self._batches(items, sizes), len(items), "at the best learning rate"),
                (f"norm(tokens, {names})", self._best(items, "smooth_norm", sizes), len(items), "at the best batch"),
            ):
                yield self._rule(family, "", name, "quadratic", condition, rows, total)
        if len({self.cells[i].model for i in cells}) > 1:
            rows, words = self._batches(items), "at the best learning rate, whatever the model"
            yield self._rule(family, "", "batch(tokens)", "quadratic", words, rows, len(items))

    def joint_rules(self, family: str, model: str | None, best: Mapping[tuple[str, str, int], Joint]) -> Iterator[Rule]:
        """Laws of the joint optima, ``best`` by (family, model, tokens): of one model over tokens, or of all models of
        a family over tokens and parameters and, for the batch, over tokens alone."""
        items = [
            i
            for i, h in enumerate(self.horizons)
            if h.family == family and model in (None, h.model) and (h.family, h.model, h.tokens) in best
        ]
        sizes = {self.horizons[i].parameters for i in items}
        if model is None and not (len(sizes) > 1 and all(size > 0 for size in sizes)):
            return
        for target in ("lr", "batch"):
            for columns in [()] if model is not None else [("parameters",), ()]:
                found = {i: best[family, self.horizons[i].model, self.horizons[i].tokens] for i in items}
                use = [i for i in items if found[i].usable]
                rows = self._over_tokens(use, [getattr(found[i], target) for i in use], columns)
                if self.resamples is not None:
                    moves = self.resamples.joint_lr if target == "lr" else self.resamples.joint_batch
                    rows = replace(rows, draws=rows.y + moves[:, use])
                name = f"{target}({', '.join(('tokens', *columns))})"
                where = f"at the best {'batch' if target == 'lr' else 'learning rate'}"
                yield self._rule(family, model or "", name, "joint", where, rows, len(items))

    def composite(self, family: str, model: str, rules: Sequence[Rule]) -> Composite | None:
        """Composite against direct exponent of one model; None where a rule is missing."""
        names = ("lr(batch, tokens)", "batch(tokens)", "lr(tokens)")
        found = {r.name: r.law for r in rules if (r.family, r.model, r.recipe) == (family, model, "quadratic")}
        plane, best, direct = (found.get(name) for name in names)
        if plane is None or best is None or direct is None:
            return None
        value = plane.exponents["tokens"] + plane.exponents["batch"] * best.exponents["tokens"]
        draws = [self._draws.get((family, model, name)) for name in names]
        composite_interval = difference_interval = None
        if all(d is not None for d in draws):
            of_plane, of_best, of_direct = (np.asarray(d) for d in draws)
            composites = of_plane[:, 2] + of_plane[:, 1] * of_best[:, 1]
            composite_interval = _spread(value, composites, (plane, best))
            gap = value - direct.exponents["tokens"]
            difference_interval = _spread(gap, composites - of_direct[:, 1], (plane, best, direct))
        return Composite(family, model, value, direct.exponents["tokens"], composite_interval, difference_interval)

    def _axes(self, cells: Sequence[int]) -> Iterator[tuple[str, ...]]:
        """Sets of size columns that vary among these cells and can be told apart."""
        known = {
            name: {float(getattr(self.cells[i], name)) for i in cells}
            for name in SIZES
            if all(getattr(self.cells[i], name) > 0 for i in cells)
        }
        if len(known.get("parameters", ())) > 1:
            yield ("parameters",)
        shapes = tuple(name for name in ("width", "depth") if len(known.get(name, ())) > 1)
        if shapes:
            yield shapes

    def _rates(self, cells: Sequence[int], sizes: tuple[str, ...] = ()) -> Rows:
        """Optimal rates of cells; an edge bounds the optimum by the middle of the grid's last step."""
        use, values, sides = [], [], []
        for index in cells:
            cell = self.cells[index]
            value, side = (cell.rate(), 0) if math.isfinite(cell.rate()) else _bound(cell)
            if math.isfinite(value):
                use.append(index)
                values.append(value)
                sides.append(side)
        columns = {name: [float(getattr(self.cells[i], name)) for i in use] for name in ("batch", "tokens", *sizes)}
        rows = rows_of(values, columns, sides)
        if self.resamples is None:
            return rows
        draws, draw_sides = self.resamples.rate[:, use].copy(), self.resamples.side[:, use].copy()
        fixed = rows.side != 0
        draws[:, fixed], draw_sides[:, fixed] = rows.y[fixed], rows.side[fixed]
        return replace(rows, draws=draws, draw_sides=draw_sides)

    def _paper(self, cells: Sequence[int]) -> Rows:
        use = [self.cells[i] for i in cells if math.isfinite(self.cells[i].rate("paper"))]
        return rows_of(
            [c.rate("paper") for c in use], {"batch": [c.batch for c in use], "tokens": [c.tokens for c in use]}
        )

    def _at_best(self, items: Sequence[int]) -> list[int]:
        """The cells at the best batch of horizons whose best batch is not at an edge."""
        place = {(c.family, c.model, c.batch, c.tokens): i for i, c in enumerate(self.cells)}
        best = [self.horizons[i] for i in items if not self.horizons[i].at_edge]
        return [place[h.family, h.model, h.batch, h.tokens] for h in best]

    def _best(self, items: Sequence[int], what: str, sizes: tuple[str, ...] = ()) -> Rows:
        """Optimal rates or norms at the best batch of each horizon, where that is not at an edge."""
        use = [i for i in items if not self.horizons[i].at_edge and math.isfinite(getattr(self.horizons[i], what))]
        draws = None if self.resamples is None else getattr(self.resamples, what)[:, use]
        return replace(self._over_tokens(use, [getattr(self.horizons[i], what) for i in use], sizes), draws=draws)

    def _batches(self, items: Sequence[int], sizes: tuple[str, ...] = ()) -> Rows:
        """Best batches; one at the edge of its grid bounds it by the middle of the grid's last step."""
        use, values, sides = [], [], []
        for index in items:
            item = self.horizons[index]
            if len(item.batches) < 2 or (not item.at_edge and not math.isfinite(item.smooth_lr)):
                continue
            if item.at_edge and "no-optimum" in item.flags:
                continue  # its loss is only an upper bound, so which batch is best is not known
            grid = np.log2(item.batches)
            side = ("edge-high" in item.flags) - ("edge-low" in item.flags)
            values.append(item.smooth_batch if not side else float(np.mean(grid[-2:] if side > 0 else grid[:2])))
            use.append(index)
            sides.append(side)
        rows = replace(self._over_tokens(use, values, sizes), side=np.array(sides, dtype=int))
        if self.resamples is None:
            return rows
        draws = self.resamples.smooth_batch[:, use].copy()
        fixed = rows.side != 0
        draws[:, fixed] = rows.y[fixed]
        return replace(rows, draws=draws, draw_sides=np.broadcast_to(rows.side, draws.shape))

    def _over_tokens(self, items: Sequence[int], values: Sequence[float], sizes: tuple[str, ...]) -> Rows:
        columns = {n: [float(getattr(self.horizons[i], n)) for i in items] for n in ("tokens", *sizes)}
        return rows_of(values, columns)

    def _rule(self, family: str, model: str, name: str, recipe: str, condition: str, rows: Rows, total: int) -> Rule:
        measured = rows.measured
        reason = not_enough(measured, total)
        rule = Rule(family, model, name, recipe, condition, None, len(measured.y), total - len(measured.y), reason)
        if reason:
            return rule
        try:
            law = fit_rows(rows)
        except UserError as error:  # sizes that vary together, for instance
            return replace(rule, reason=f"not enough: {error}")
        law, draws = with_resamples(law, rows, self.resamples)
        if draws is not None and recipe == "quadratic":
            self._draws[family, model, name] = draws
        found = None
        if "batch" in rows.x:
            found = interaction(rows, self.resamples)
            if found and found.p_value < 0.05:
                value = f"{found.value:+.3f}({found.standard_error:.3f})"
                note = f"the exponent of the batch changes by {value} per doubling of tokens: not quite a plane"
                law = replace(law, warnings=(*law.warnings, note))
        return replace(rule, law=law, interaction=found, held_out=tuple(held_out(rows)))


def _bound(cell: Cell) -> tuple[float, int]:
    """A bound of the optimal rate and on which side of it the optimum lies; NaN where the cell tells neither.

    That the lowest loss is at the last rate says that the optimum lies beyond the middle of the last step. It counts
    only if the loss really falls towards that edge: a line through the nearest points must slope at the 5% level.
    """
    side = ("edge-high" in cell.lr.flags) - ("edge-low" in cell.lr.flags)
    points = [point for point in cell.points if math.isfinite(point.loss)]
    if not side or len(points) < 4 or "few-points" in cell.lr.flags:
        return math.nan, 0
    near = points[-5:] if side > 0 else points[:5]
    line = stats.linregress([p.lr for p in near], [p.loss for p in near])
    if not (line.slope * side < 0 and line.pvalue < 0.1):  # one-sided 5%
        return math.nan, 0
    ends = near[-2:] if side > 0 else near[:2]
    return (ends[0].lr + ends[1].lr) / 2, side


def _spread(value: float, draws: Array, laws: Sequence[PowerLaw]) -> Interval:
    half = max(law.quantile(0.9) for law in laws) * float(np.nanstd(draws, ddof=1))
    return value - half, value + half
