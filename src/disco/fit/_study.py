"""A whole study: optima, best batches, rules and norm transfer, from a table of runs at horizons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np

from disco.errors import UserError
from disco.fit._cells import Cell, Columns, Horizon, complete, fit_cell, fit_horizon, split
from disco.fit._result import Result
from disco.fit._rules import PowerLaw, power_law
from disco.fit._transfer import Transfer, margin_for, norm_transfer
from disco.runs.units import exact, two_to

NORM = "norm/output/rms_to_inf"
MIN_HORIZONS = 3
"""Numbers of tokens that a rule over tokens needs: with two, nothing can contradict it."""
MIN_CELLS = 5
"""Cells that a rule in batch and tokens needs: three parameters and two to tell the scatter."""
TOLERANCE = 0.01
"""Nats that a reused norm may cost for the verdict "transfers"."""


@dataclass(frozen=True)
class FirstHit(Result):
    """Where the norm of one (batch, learning rate) first reaches the optimal norm, between two horizons."""

    family: str
    model: str
    batch: int
    lr: float
    """log2 of the learning rate."""
    tokens: float


@dataclass(frozen=True)
class Rule(Result):
    """A scaling rule of one model, or why there is none."""

    family: str
    model: str
    name: str
    """"lr(batch, tokens)", "batch(tokens)", "lr(tokens)", "norm(tokens)" or "first-hit lr(batch, tokens)"."""
    recipe: str
    """Where its optima come from: "quadratic" or "paper" (see ``optimum``)."""
    condition: str
    """What is held fixed or assumed, in words."""
    law: PowerLaw | None
    n: int
    """Optima it rests on."""
    left_out: int
    """Cells or horizons that are not optima (edges of the grid, flat, few points)."""
    reason: str
    """Empty, or why there is no law and what is needed."""


@dataclass(frozen=True)
class Path(Result):
    """Optimal norm along one axis of scale, everything else fixed."""

    family: str
    model: str
    """Empty along width or depth."""
    axis: str
    """"tokens", "width" or "depth"."""
    condition: str
    at: tuple[tuple[str, int], ...]
    """(model, tokens) of each point."""
    scale: tuple[float, ...]
    """Tokens, width or depth of each point."""
    norm: tuple[float, ...]
    """log2 of the optimal norm at the best batch."""
    transfer: Transfer | None
    """None where the curvature, and so the margin, is unknown."""


@dataclass(frozen=True)
class StudyFit(Result):
    """Everything that is fitted to a study. ``to_dict`` is the content of fit.json."""

    norm: str
    """Column of the norm."""
    cells: tuple[Cell, ...]
    horizons: tuple[Horizon, ...]
    rules: tuple[Rule, ...]
    paths: tuple[Path, ...]
    hits: tuple[FirstHit, ...]
    warnings: tuple[str, ...]
    version: int = 1

    @property
    def studies(self) -> tuple[tuple[str, str], ...]:
        """The (family, model) pairs, small models first."""
        return tuple(dict.fromkeys((cell.family, cell.model) for cell in self.cells))

    def of(self, family: str, model: str) -> tuple[tuple[Cell, ...], tuple[Horizon, ...]]:
        """Cells and horizons of one family and model."""
        cells = tuple(cell for cell in self.cells if (cell.family, cell.model) == (family, model))
        return cells, tuple(item for item in self.horizons if (item.family, item.model) == (family, model))

    def cell(self, family: str, model: str, batch: int, tokens: int) -> Cell | None:
        """One cell, if the study has it."""
        key = (family, model, batch, tokens)
        return next((c for c in self.cells if (c.family, c.model, c.batch, c.tokens) == key), None)

    def path(self, family: str, model: str) -> Path:
        """Optimal norm of one model over tokens."""
        return next(p for p in self.paths if (p.family, p.model, p.axis) == (family, model, "tokens"))

    def rule(self, family: str, model: str, name: str, recipe: str = "quadratic") -> Rule:
        """One rule; its ``law`` is None where there were not enough optima."""
        key = (family, model, name, recipe)
        return next(r for r in self.rules if (r.family, r.model, r.name, r.recipe) == key)


def fit_table(columns: Columns, norm: str = NORM) -> StudyFit:
    """Fits a table with one row per run and horizon, as ``disco.runs.table.cells`` makes it.

    Args:
        columns: Arrays by name: model, batch (tokens), lr, tokens, loss (nats), and as far as there are any: family,
            width, depth, parameters, seed, sigma, loss_start, diverged, and the norm.
        norm: Column of the norm whose optimum is sought.

    Raises:
        UserError: no rows, a missing column, or a value that is not positive where it must be.
    """
    table = complete(columns, norm)
    if not len(table["lr"]):
        raise UserError("fit: the table has no rows with a loss; let at least one horizon finish")
    pieces = split(table, "family", "model", "tokens", "batch")
    cells = tuple(sorted(map(fit_cell, pieces), key=lambda c: (c.family, np.nan_to_num(c.parameters), c.model)))
    horizons = tuple(
        fit_horizon(tuple(group)) for _, group in groupby(cells, key=lambda c: (c.family, c.model, c.tokens))
    )
    fit = StudyFit(norm, cells, horizons, (), (), (), ())
    hits = tuple(hit for study in fit.studies for hit in _first_hits(*fit.of(*study)))
    rules = tuple(rule for study in fit.studies for rule in _rules(study, *fit.of(*study), hits))
    paths = (*_token_paths(fit), *_size_paths(fit, "width", "depth"), *_size_paths(fit, "depth", "width"))
    return replace(fit, hits=hits, rules=rules, paths=paths, warnings=tuple(_warnings(fit)))


def _first_hits(cells: Sequence[Cell], horizons: Sequence[Horizon]) -> Iterator[FirstHit]:
    """Tokens at which each (batch, rate) crosses the mean optimal norm, linear in logarithms between horizons."""
    found = [item for item in horizons if math.isfinite(item.smooth_norm)]
    norms = [item.smooth_norm for item in found if not item.at_edge] or [item.smooth_norm for item in found]
    if not norms:
        return
    curves: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for cell in cells:
        for point in cell.points:
            if math.isfinite(point.norm):
                curves.setdefault((cell.batch, point.lr), []).append((math.log2(cell.tokens), point.norm))
    target = float(np.mean(norms))
    for (batch, lr), curve in sorted(curves.items()):
        for (x0, y0), (x1, y1) in pairwise(curve):
            if y0 < target <= y1:
                x = x0 + (x1 - x0) * (target - y0) / (y1 - y0)
                yield FirstHit(cells[0].family, cells[0].model, batch, lr, 2.0**x)
                break


def _rules(
    study: tuple[str, str], cells: Sequence[Cell], horizons: Sequence[Horizon], hits: Sequence[FirstHit]
) -> Iterator[Rule]:
    def rule(name: str, recipe: str, condition: str, rows: Sequence[dict[str, float]], total: int) -> Rule:
        """Fits "y" of the rows (log2) to their other entries."""
        planar = "batch, tokens" in name
        reason = _not_enough(rows, total, planar)
        law = None
        if not reason:
            names = ("batch", "tokens") if planar else ("tokens",)
            law = power_law([2.0 ** row["y"] for row in rows], {key: [row[key] for row in rows] for key in names})
            law = _with_interaction(law, rows) if planar else law
        return Rule(*study, name, recipe, condition, law, len(rows), total - len(rows), reason)

    several = any(len(item.batches) > 1 for item in horizons)
    best = [item for item in horizons if not item.at_edge]
    where = "at the best batch" if several else f"at a batch of {exact(horizons[0].batch)} tokens"
    for recipe in ("quadratic", "paper"):
        found = [cell for cell in cells if math.isfinite(cell.rate(recipe))]
        rows = [{"y": c.rate(recipe), "batch": float(c.batch), "tokens": float(c.tokens)} for c in found]
        yield rule("lr(batch, tokens)", recipe, "", rows, len(cells))
        rates = [h.smooth_lr if recipe == "quadratic" else _cell_of(cells, h).rate(recipe) for h in best]
        yield rule("lr(tokens)", recipe, where, _over_tokens(best, rates), len(horizons))
    inside = [item for item in best if len(item.batches) > 1 and math.isfinite(item.smooth_lr)]
    rows = _over_tokens(inside, [item.smooth_batch for item in inside])
    yield rule("batch(tokens)", "quadratic", "at the best learning rate", rows, len(horizons))
    rows = _over_tokens(best, [item.smooth_norm for item in best])
    yield rule("norm(tokens)", "quadratic", where, rows, len(horizons))
    own = [hit for hit in hits if (hit.family, hit.model) == study]
    rows = [{"y": hit.lr, "batch": float(hit.batch), "tokens": hit.tokens} for hit in own]
    total = len({(cell.batch, point.lr) for cell in cells for point in cell.points})
    yield rule("first-hit lr(batch, tokens)", "quadratic", "norm = its optimum", rows, total)


def _over_tokens(horizons: Sequence[Horizon], values: Sequence[float]) -> list[dict[str, float]]:
    pairs = zip(horizons, values, strict=True)
    return [{"y": value, "tokens": float(item.tokens)} for item, value in pairs if math.isfinite(value)]


def _cell_of(cells: Sequence[Cell], item: Horizon) -> Cell:
    return next(cell for cell in cells if (cell.batch, cell.tokens) == (item.batch, item.tokens))


def _not_enough(rows: Sequence[dict[str, float]], total: int, planar: bool) -> str:
    """Why these optima do not carry a rule in tokens, or in batch and tokens; empty when they do."""
    horizons = len({row["tokens"] for row in rows})
    if horizons >= MIN_HORIZONS and np.ptp([row["y"] for row in rows]) < 1e-9:
        return f"not enough: all {len(rows)} optima are at the same grid point, too coarse to tell an exponent"
    if not planar:
        found = f"not enough: {len(rows)} of {total} horizons have an optimum and a best batch inside the grids"
        return f"{found}; needed: {MIN_HORIZONS}" if horizons < MIN_HORIZONS else ""
    batches = len({row["batch"] for row in rows})
    if len(rows) >= MIN_CELLS and batches > 1 and horizons >= MIN_HORIZONS:
        return ""
    found = (
        f"{len(rows)} of {total} cells have an optimum inside the grid, at {batches} batches and {horizons} horizons"
    )
    return f"not enough: {found}; needed: {MIN_CELLS} at 2 batches and {MIN_HORIZONS} horizons"


def _with_interaction(law: PowerLaw, rows: Sequence[dict[str, float]]) -> PowerLaw:
    """The plane, with a warning when the product of the logarithms is told from 0: then it is no plane."""
    columns = {name: [row[name] for row in rows] for name in ("batch", "tokens")}
    if len(rows) < MIN_CELLS + 1:
        return law
    try:
        curved = power_law([2.0 ** row["y"] for row in rows], columns, interactions=True)
    except UserError:  # the cells do not form a grid on which the product can be told from the plane
        return law
    low, high = curved.interval("batch:tokens", 0.95)
    if low <= 0 <= high:
        return law
    value, error = curved.exponents["batch:tokens"], curved.standard_errors["batch:tokens"]
    note = f"the exponent of the batch changes by {value:+.3f}({error:.3f}) per doubling of tokens: not quite a plane"
    return replace(law, warnings=(*law.warnings, note))


def _token_paths(fit: StudyFit) -> Iterator[Path]:
    for study in fit.studies:
        cells, horizons = fit.of(*study)
        use = [item for item in horizons if math.isfinite(item.smooth_norm) and not item.at_edge]
        several = any(len(item.batches) > 1 for item in horizons)
        where = "at the best batch" if several else f"at a batch of {exact(horizons[0].batch)} tokens"
        curvature = [norm.curvature for norm in (_cell_of(cells, item).norm for item in use) if norm]
        yield _path(*study, "tokens", where, use, [float(item.tokens) for item in use], curvature)


def _size_paths(fit: StudyFit, axis: str, other: str) -> Iterator[Path]:
    """Along width at each depth, or along depth at each width, at the horizon that most models share."""

    def fixed(item: Horizon) -> tuple[str, float]:
        return item.family, float(getattr(item, other))

    inside = [item for item in fit.horizons if not item.at_edge]
    known = [item for item in inside if np.isfinite([item.smooth_norm, item.width, item.depth]).all()]
    for (family, value), group in groupby(sorted(known, key=fixed), key=fixed):
        by_tokens: dict[int, list[Horizon]] = {}
        for item in group:
            by_tokens.setdefault(item.tokens, []).append(item)
        tokens = max(by_tokens, key=lambda t: (len(by_tokens[t]), t))
        use = sorted(by_tokens[tokens], key=lambda item: float(getattr(item, axis)))
        if len({getattr(item, axis) for item in use}) < 2:
            continue
        found = (fit.cell(item.family, item.model, item.batch, item.tokens) for item in use)
        curvature = [cell.norm.curvature for cell in found if cell and cell.norm]
        where = f"{other} {value:g}, {exact(tokens)} tokens, at the best batch"
        yield _path(family, "", axis, where, use, [float(getattr(item, axis)) for item in use], curvature)


def _path(
    family: str, model: str, axis: str, where: str, use: Sequence[Horizon], scale: list[float], curvature: list[float]
) -> Path:
    transfer = None
    norms = tuple(item.smooth_norm for item in use)
    if curvature and len(scale) > 1:
        octaves = math.log2(max(scale) / min(scale)) + 1  # the fitted range and one doubling more
        margin = margin_for(float(np.median(curvature)), TOLERANCE, octaves)
        transfer = norm_transfer(scale, [2.0**norm for norm in norms], margin)
    at = tuple((item.model, item.tokens) for item in use)
    return Path(family, model, axis, where, at, tuple(scale), norms, transfer)


def _warnings(fit: StudyFit) -> Iterator[str]:
    """What a reader must know before the numbers."""
    if len({cell.tokens for cell in fit.cells}) > 1:
        yield "horizons of one run are correlated but fitted as independent, so standard errors of rules are too small"
    for family, model in fit.studies:
        cells, horizons = fit.of(family, model)
        name = ", ".join(part for part in (model, family) if part)
        bad = [cell for cell in cells if not cell.usable]
        if bad:
            yield f"{name}: {len(bad)} of {len(cells)} cells have no optimum inside the grid and are left out of rules"
        torn = sorted({point.lr for cell in cells for point in cell.points if point.seeds and point.lost})
        if torn:
            rates = ", ".join(map(two_to, torn))
            yield f"{name}: of the seeds at learning rates {rates} some diverged; losses there are of those that lived"
        for flag, wanted in (("edge-low", "lower"), ("edge-high", "higher")):
            edges = groupby((c for c in bad if flag in c.lr.flags), key=lambda cell: cell.tokens)
            places = [f"{exact(tokens)} tokens (batch {_listed([c.batch for c in g])})" for tokens, g in edges]
            if places:
                yield f"{name}: {wanted} learning rates are needed at {', '.join(places)}"
            tokens_at = [item.tokens for item in horizons if flag in item.flags]
            if tokens_at:
                kind = "smaller" if flag == "edge-low" else "larger"
                yield f"{name}: a {kind} batch may be better still at {_listed(tokens_at)} tokens"
        if any("one-batch" in item.flags for item in horizons):
            yield f"{name}: one batch only, so nothing is known about the best one"


def _listed(values: Iterable[float]) -> str:
    """ "2^9, 2^10, 1,536"."""
    return ", ".join(map(exact, values))
