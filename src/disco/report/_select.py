"""What is shown: of a sweep over layer-group ratios one set of them in full, of a decay branch its whole way, of
one-stage models those that describe the runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import polars as pl

from disco.fit import StudyFit, Surface
from disco.fit._layer_groups import without_ratios
from disco.runs.reader import Run

OUTSIDE = 1.0
"""Octaves outside the rates swept that a best rate of the one-stage model may lie."""


def focus(fit: StudyFit) -> StudyFit:
    """The fit without the families that differ from a better one of the same model by layer-group ratios alone.

    Better: more cells, which make a better study of batch and rate, then the lower loss at the largest horizon. Every
    set of ratios is a family of its own, and a page with all of them would say the same thing dozens of times.
    """
    best: dict[tuple[str, str], tuple[float, float, tuple[str, str]]] = {}
    for family, model in fit.studies:
        cells, horizons = fit.of(family, model)
        last = horizons[-1]
        rank = (-len(cells), last.loss if math.isfinite(last.loss) else math.inf, (family, model))
        key = (without_ratios(family), model)
        best[key] = min(best.get(key, rank), rank)
    kept = {study for *_, study in best.values()}
    if len(kept) == len(fit.studies):
        return fit
    families = {family for family, _ in kept}

    def own(items: Iterable[Any]) -> tuple[Any, ...]:
        """Those of the studies kept; of what spans models, those of their families."""
        shown = ((item.family, item.model) in kept or (not item.model and item.family in families) for item in items)
        return tuple(compress(items, shown))

    return replace(
        fit,
        cells=own(fit.cells),
        horizons=own(fit.horizons),
        rules=own(fit.rules),
        paths=own(fit.paths),
        hits=own(fit.hits),
        bottoms=own(fit.bottoms),
        composites=own(fit.composites),
    )


def one_stage(fit: StudyFit, family: str) -> tuple[Surface | None, str]:
    """The one-stage model of a family, or None and why it is not to be shown.

    Least squares may end in a valley that is not that of the runs; then its best rates lie outside those swept.
    """
    found = next((item for item in fit.surfaces if item.family == family), None)
    if found is None:
        return None, "it takes a fit with resamples"
    surface = found.surface
    if surface is None:
        return None, found.reason.removeprefix("surface: ")
    sized = surface.centre[2] != 0
    own = [item for item in fit.horizons if item.family == family and (item.parameters > 0 or not sized)]
    rates = [point.lr for cell in fit.cells if cell.family == family for point in cell.points]
    if not own:
        return None, "the sizes of the models are not known"
    best = [surface.optimum(item.tokens, parameters=item.parameters if sized else 1.0).lr for item in own]
    outside = sum(not min(rates) - OUTSIDE <= lr <= max(rates) + OUTSIDE for lr in best)
    if 2 * outside > len(best):
        return None, (
            f"the formula fitted to {surface.runs} runs has its best rate outside those swept at {outside} of "
            f"{len(best)} horizons, so it does not describe them"
        )
    return surface, ""


def through_parents(curves: pl.DataFrame, runs: Sequence[Run]) -> pl.DataFrame:
    """Curves with those of decay branches led back to step 0 through the runs that they branched from.

    A branch records its own steps only. Its parent's rows before them are repeated under its name, as far as the parent
    is among the runs.
    """
    if curves.is_empty():
        return curves
    parents = {run.id: run.config.get("parent") for run in runs}
    by_run = {part["run"][0]: part for part in curves.partition_by("run", maintain_order=True)}
    head = ("run", "model", "family", "batch", "lr", "seed")

    def whole(run: str, seen: tuple[str, ...] = ()) -> pl.DataFrame:
        part, parent = by_run[run], parents.get(run)
        if not parent or parent not in by_run or parent in seen:
            return part
        before = whole(parent, (*seen, run)).filter(pl.col("step") < part["step"].min())
        mine = part.select(head).head(1)
        return pl.concat([before.with_columns(pl.lit(mine[key][0]).alias(key) for key in head), part])

    if not any(parents.get(run) in by_run for run in by_run):
        return curves
    return pl.concat([whole(run) for run in by_run])
