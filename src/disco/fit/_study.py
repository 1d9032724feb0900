"""A whole study: optima, best batches, rules and norm transfer, from a table of runs at horizons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import numpy as np

from disco.errors import UserError
from disco.fit._cells import Cell, Columns, Horizon, complete, fit_cells, fit_horizon
from disco.fit._joint import Joint, NearOptimal, bottom
from disco.fit._laws import MIN_HORIZONS
from disco.fit._layer_groups import LayerGroups, layer_groups, varies
from disco.fit._regret import Rolling
from disco.fit._resample import resample
from disco.fit._result import Result
from disco.fit._rules import PowerLaw
from disco.fit._scaling import Composite, Rule, Scaling
from disco.fit._surface import DRAWS, Surface, surface
from disco.fit._transfer import CORRELATION, Transfer, margin_for, norm_transfer, octaves_between, transfers
from disco.runs.units import exact, two_to

NORM = "norm/output/rms_to_inf"
BOOTSTRAPS = 1000
"""Resamples of whole runs for a report."""
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
    others: dict[str, Transfer] = field(default_factory=dict)
    """Along tokens the same test for every logged norm, by column, those that transfer best first."""


@dataclass(frozen=True)
class Bottom(Result):
    """The joint optimum of one model at one number of tokens, and what is as good."""

    family: str
    model: str
    parameters: float
    tokens: int
    optimum: Joint
    near: NearOptimal
    """Within the noise of one run."""


@dataclass(frozen=True)
class OneStage(Result):
    """One model of the loss over all runs of a family, or why there is none."""

    family: str
    surface: Surface | None
    reason: str


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
    bottoms: tuple[Bottom, ...] = ()
    composites: tuple[Composite, ...] = ()
    surfaces: tuple[OneStage, ...] = ()
    bootstraps: int = 0
    """Resamples of whole runs behind the standard errors of rules; 0: horizons are taken as independent."""
    rolling: Rolling | None = None
    """The largest horizon of each model predicted from the smaller ones; None without resamples or enough horizons."""
    layers: LayerGroups | None = None
    """Best ratios of the layer groups' learning rates; None where no ratio was swept."""

    @property
    def default_stage(self) -> str:
        """What a plan should rest on: the stage with the least regret in ``rolling``; without it "two-stage"."""
        return (self.rolling.best if self.rolling else "") or "two-stage"

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


def fit_table(columns: Columns, norm: str = NORM, bootstraps: int = 0, seed: int = 0) -> StudyFit:
    """Fits a table with one row per run and horizon, as ``disco.runs.table.cells`` makes it.

    Args:
        columns: Arrays by name: model, batch (tokens), lr, tokens, loss (nats), and as far as there are any: family,
            run, width, depth, parameters, seed, sigma, loss_start, diverged, and the norm.
        norm: Column of the norm whose optimum is sought.
        bootstraps: Resamples of whole runs for the standard errors of rules (1,000 are plenty). Where it is not 0, the
            one-stage model of the loss and the rolling origin come along. 0: standard errors from the scatter of the
            optima, which takes horizons as independent.
        seed: Of the resamples.

    Raises:
        UserError: no rows or no finite loss, a missing column, a value that is not positive where it must be, or
            negative bootstraps.
    """
    if bootstraps < 0 or 0 < bootstraps < 100:
        raise UserError(f"fit: bootstraps must be 0 or at least 100, got {bootstraps}")
    loss = complete(columns, norm)["loss"]
    if len(loss) and not np.isfinite(loss).any():
        raise UserError(
            f"fit: all {len(loss)} rows diverged or have a loss that is not finite; add runs at lower learning rates, "
            "or check which column the losses were taken from"
        )
    fit = fit_once(columns, norm, bootstraps, seed)
    if bootstraps and any(len(fit.of(*study)[1]) > MIN_HORIZONS for study in fit.studies):
        from disco.fit._rolling import rolling_origin  # it fits tables itself

        fit = replace(fit, rolling=rolling_origin(columns, norm=norm))
    return replace(fit, layers=layer_groups(columns)) if varies(columns) else fit


def fit_once(columns: Columns, norm: str, bootstraps: int, seed: int) -> StudyFit:
    """``fit_table`` without the rolling origin, which calls this for the smaller horizons."""
    table = complete(columns, norm)
    if not len(table["lr"]):
        raise UserError("fit: the table has no rows with a loss; let at least one horizon finish")
    cells = tuple(sorted(fit_cells(table), key=lambda c: (c.family, np.nan_to_num(c.parameters), c.model)))
    horizons = tuple(
        fit_horizon(tuple(group)) for _, group in groupby(cells, key=lambda c: (c.family, c.model, c.tokens))
    )
    fit = StudyFit(norm, cells, horizons, (), (), (), (), bootstraps=bootstraps)
    hits = tuple(hit for study in fit.studies for hit in _first_hits(*fit.of(*study)))
    resamples = resample(columns, norm, cells, horizons, bootstraps, seed) if bootstraps else None
    scaling = Scaling(cells, horizons, resamples)
    rules = [rule for study in fit.studies for rule in scaling.model_rules(*study, *_hit_rows(fit, hits, *study))]
    bottoms = tuple(_bottoms(fit))
    best = {(item.family, item.model, item.tokens): item.optimum for item in bottoms}
    rules += [rule for study in fit.studies for rule in scaling.joint_rules(*study, best)]
    families = tuple(dict.fromkeys(family for family, _ in fit.studies))
    rules += [rule for family in families for rule in scaling.family_rules(family)]
    rules += [rule for family in families for rule in scaling.joint_rules(family, None, best)]
    composites = (scaling.composite(*study, rules) for study in fit.studies)
    fit = replace(
        fit,
        hits=hits,
        rules=tuple(rules),
        paths=(
            *_token_paths(replace(fit, rules=tuple(rules))),
            *_size_paths(fit, "width", "depth"),
            *_size_paths(fit, "depth", "width"),
        ),
        bottoms=bottoms,
        composites=tuple(item for item in composites if item),
        surfaces=tuple(_one_stage(columns, family, min(bootstraps, DRAWS), seed) for family in families)
        if bootstraps
        else (),
    )
    return replace(fit, warnings=tuple(_warnings(fit)))


def _hit_rows(
    fit: StudyFit, hits: Sequence[FirstHit], family: str, model: str
) -> tuple[list[tuple[int, float, float]], int]:
    """First hits of one model, and how many curves could have had one."""
    cells, _ = fit.of(family, model)
    own = [(hit.batch, hit.lr, hit.tokens) for hit in hits if (hit.family, hit.model) == (family, model)]
    return own, len({(cell.batch, point.lr) for cell in cells for point in cell.points})


def _bottoms(fit: StudyFit) -> Iterator[Bottom]:
    for item in fit.horizons:
        if len(item.batches) < 3:
            continue
        cells = [fit.cell(item.family, item.model, batch, item.tokens) for batch in item.batches]
        rows = [(2.0**point.lr, cell.batch, point.loss) for cell in cells if cell for point in cell.points]
        lr, batch, loss = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
        yield Bottom(item.family, item.model, item.parameters, item.tokens, *bottom(lr, batch, loss))


def _one_stage(columns: Columns, family: str, bootstraps: int, seed: int) -> OneStage:
    """The surface over the runs of one family; sizes enter where all of them are known."""
    n = len(columns["lr"])
    own = np.asarray(columns.get("family", np.full(n, ""))).astype(str) == family
    own &= ~np.asarray(columns.get("diverged", np.zeros(n)), dtype=bool)
    use = {name: np.asarray(values)[own] for name, values in columns.items()}
    sizes = np.asarray(use.get("parameters", np.full(own.sum(), math.nan)), dtype=float)
    if len(set(use["model"].tolist())) > 1 and not (np.isfinite(sizes).all() and len(np.unique(sizes)) > 1):
        return OneStage(family, None, "several models and no column parameters that tells them apart")
    known = sizes if np.isfinite(sizes).all() and len(sizes) else None
    names = ("model", "batch", "lr", "seed")
    seed_column = use.get("seed", np.zeros(own.sum()))
    labels = use.get("run", np.array(["/".join(map(str, k)) for k in zip(
        *(use.get(name, seed_column).tolist() for name in names), strict=True)]))  # fmt: skip
    try:
        found = surface(use["lr"], use["batch"], use["tokens"], use["loss"], known, labels, bootstraps, seed)
    except UserError as error:
        return OneStage(family, None, str(error))
    except np.linalg.LinAlgError:
        return OneStage(family, None, "the runs do not determine the model: its equations are singular")
    return OneStage(family, found, "")


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


def _cell_of(cells: Sequence[Cell], item: Horizon) -> Cell:
    return next(cell for cell in cells if (cell.batch, cell.tokens) == (item.batch, item.tokens))


def _token_paths(fit: StudyFit) -> Iterator[Path]:
    for study in fit.studies:
        cells, horizons = fit.of(*study)
        use = [item for item in horizons if math.isfinite(item.smooth_norm) and not item.at_edge]
        several = any(len(item.batches) > 1 for item in horizons)
        where = "at the best batch" if several else f"at a batch of {exact(horizons[0].batch)} tokens"
        curvature = [norm.curvature for norm in (_cell_of(cells, item).norm for item in use) if norm]
        law = fit.rule(*study, "norm(tokens)").law if fit.bootstraps else None
        scale = [float(item.tokens) for item in use]
        noise = [cell.run_noise.correlation for cell in cells if cell.run_noise]
        correlation = float(noise[0]) if noise and math.isfinite(noise[0]) else CORRELATION
        path = _path(*study, "tokens", where, use, scale, curvature, correlation, law)
        others = _side_by_side([item for item in horizons if not item.at_edge], correlation)
        if path.transfer and fit.norm in others:
            others[fit.norm] = path.transfer  # its error is that of resampled runs
        yield replace(path, others=others)


def _side_by_side(horizons: Sequence[Horizon], correlation: float) -> dict[str, Transfer]:
    """Which of the logged norms stays put over tokens, at the best batches."""
    names = sorted({name for item in horizons for name in item.norms})
    norms = {name: [item.norms.get(name, math.nan) for item in horizons] for name in names}
    curvatures = {name: [item.curvatures.get(name, math.nan) for item in horizons] for name in names}
    known = {name: float(np.nanmedian(c)) for name, c in curvatures.items() if np.isfinite(c).any()}
    return transfers([float(item.tokens) for item in horizons], norms, known, TOLERANCE, correlation=correlation)


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
    family: str, model: str, axis: str, where: str, use: Sequence[Horizon], scale: list[float],
    curvature: list[float], correlation: float = 0.0, law: PowerLaw | None = None,
) -> Path:  # fmt: skip
    """``correlation``: of optima an octave apart, 0 where each has runs of its own; ``law``: over resampled runs."""
    transfer = None
    norms = tuple(item.smooth_norm for item in use)
    if curvature and len(scale) > 1:
        margin = margin_for(float(np.median(curvature)), TOLERANCE, octaves_between(scale))
        known = (law.standard_errors["tokens"], law.degrees) if law and math.isfinite(law.degrees) else (None, None)
        transfer = norm_transfer(
            scale, [2.0**norm for norm in norms], margin, error=known[0], degrees=known[1], correlation=correlation
        )
    at = tuple((item.model, item.tokens) for item in use)
    return Path(family, model, axis, where, at, tuple(scale), norms, transfer)


def _warnings(fit: StudyFit) -> Iterator[str]:
    """What a reader must know before the numbers."""
    if len({cell.tokens for cell in fit.cells}) > 1 and not fit.bootstraps:
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
