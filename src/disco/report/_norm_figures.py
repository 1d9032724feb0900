"""Figures of norms beyond the optimum of the output norm: how they grow, which of them transfers, and what the recipe
of the fit, momentum or decay change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import polars as pl

from disco.fit import NORM, Cell, StudyFit
from disco.report._style import (
    ACCENT,
    PANELS,
    Colours,
    amount,
    cell,
    chained,
    panels,
    powers,
    raised,
    rounded,
    single,
    spaced,
    titled,
    x_titles,
    y_titles,
)

Study = tuple[str, str]

CLOSE = 1.0
"""Octaves of steps on either side over which the slope of the norm is taken."""


def norm_growth(curves: pl.DataFrame) -> go.Figure | None:
    """Slope of log norm over log steps against the norm, along every run: where growth slows, and for which batch.

    Args:
        curves: Of one family and model, as ``disco.runs.table.curves`` makes it.
    """
    if NORM not in curves.columns:
        return None
    data = curves.drop_nulls(NORM).filter(pl.col("step") > 0, pl.col(NORM) > 0).sort("batch", "lr", "run", "step")
    lines: dict[int, list[tuple[list[float], list[float], float]]] = {}
    for run in data.partition_by("run", maintain_order=True):
        x, slope = _slopes(np.log2(run["step"].to_numpy()), np.log2(run[NORM].to_numpy()))
        if len(x):
            lines.setdefault(run["batch"][0], []).append((rounded(x), rounded(slope), math.log2(run["lr"][0])))
    if not lines:
        return None
    batches = sorted(lines)
    shown = spaced(batches, PANELS)
    rates = [rate for group in lines.values() for _, _, rate in group]
    colours = Colours(min(rates), max(rates))
    figure = panels([f"batch {raised(math.log2(batch))} tokens" for batch in shown], height=260)
    for panel, batch in enumerate(shown):
        for rate in sorted({rate for _, _, rate in lines[batch]}):
            same = [(x, y) for x, y, r in lines[batch] if r == rate]
            figure.add_scatter(
                x=chained(x for x, _ in same), y=chained(y for _, y in same), mode="lines", showlegend=False,
                line={"color": colours.at(rate), "width": 1.3}, **cell(panel),
                hovertemplate=f"lr {raised(rate)}<br>norm 2<sup>%{{x:.2f}}</sup>, slope %{{y:.2f}}<extra></extra>",
            )  # fmt: skip
    colours.bar(figure, "learning rate")
    powers(figure, x=True)
    figure.update_yaxes(range=[-0.15, 1.25])
    x_titles(figure, "output norm", len(shown))
    y_titles(figure, "slope", len(shown))
    return figure


PARTS = 0.25
"""Octaves of path between the points at which runs are compared."""


def norm_collapse(curves: pl.DataFrame) -> go.Figure | None:
    """How far the output norm of each run is from the median run's at the same path, coloured by batch.

    Args:
        curves: Of one family and model, as ``disco.runs.table.curves`` makes it.
    """
    if NORM not in curves.columns or "path" not in curves.columns:
        return None
    data = (
        curves.drop_nulls([NORM, "path"])
        .filter(pl.col("path") > 0, pl.col(NORM) > 0)
        .sort("batch", "lr", "run", "step")
    )
    runs = [run for run in data.partition_by("run", maintain_order=True) if len(run) > 1]
    if len(runs) < 3:
        return None
    paths = [np.log2(run["path"].to_numpy()) for run in runs]
    grid = np.arange(math.ceil(min(x[0] for x in paths) / PARTS), max(x[-1] for x in paths) / PARTS) * PARTS
    norms = [np.log2(run[NORM].to_numpy()) for run in runs]
    rows = [np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in zip(paths, norms, strict=True)]
    table = np.array(rows)[:, np.isfinite(rows).sum(axis=0) >= 3]
    grid = grid[np.isfinite(rows).sum(axis=0) >= 3]
    if not len(grid):
        return None
    table -= np.nanmedian(table, axis=0)
    batches = np.log2([run["batch"][0] for run in runs])
    colours = Colours(batches.min(), batches.max())
    figure = single(380)
    for batch in np.unique(batches):
        same = [row for row, own in zip(table, batches, strict=True) if own == batch]
        figure.add_scatter(
            x=chained(rounded(grid[np.isfinite(row)]) for row in same), name=f"batch {raised(batch)}", mode="lines",
            y=chained(rounded(row[np.isfinite(row)]) for row in same), line={"color": colours.at(batch), "width": 1.2},
            hovertemplate=f"batch {raised(batch)}<br>path 2<sup>%{{x:.1f}}</sup>: %{{y:+.2f}} octaves<extra></extra>",
        )  # fmt: skip
    powers(figure, x=True)
    reach = max(0.2, 1.2 * float(np.nanquantile(np.abs(table), 0.98)))
    figure.update_layout(xaxis_title="path length", yaxis_title="octaves from the median run")
    figure.update_yaxes(range=[-reach, reach])
    return figure


def _slopes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y at half octaves of ascending x, and its least-squares slope over an octave on either side."""
    if len(x) < 3:
        return np.empty(0), np.empty(0)
    at = np.arange(x[0] + CLOSE, x[-1] - CLOSE + 1e-9, 0.5)
    first, last = np.searchsorted(x, at - CLOSE - 1e-9), np.searchsorted(x, at + CLOSE + 1e-9)
    centre = x[0]
    sums = np.cumsum(np.stack([np.ones_like(x), x - centre, y, (x - centre) ** 2, (x - centre) * y]), axis=1)
    sums = np.concatenate([np.zeros((5, 1)), sums], axis=1)
    n, sx, sy, sxx, sxy = sums[:, last] - sums[:, first]
    enough = (n >= 3) & (x[np.minimum(last, len(x)) - 1] - x[np.minimum(first, len(x) - 1)] > CLOSE)
    n, sx, sy, sxx, sxy, at = (values[enough] for values in (n, sx, sy, sxx, sxy, at))
    slope = (sxy - sx * sy / n) / (sxx - sx**2 / n)
    return sy / n + slope * (at - centre - sx / n), slope


@dataclass(frozen=True)
class NormOptima:
    """Optima of one norm at the best batch of every number of tokens of one study."""

    name: str
    """"norm/output/rms_to_rms"."""
    study: Study
    tokens: tuple[float, ...]
    norm: tuple[float, ...]
    """log2."""
    intervals: tuple[tuple[float, float], ...]


def norm_optima(fit: StudyFit) -> list[NormOptima]:
    """The optimum of every norm that was logged, where the output norm's is sought: at the best batch per horizon."""
    found = []
    for study in fit.studies:
        best = [fit.cell(*study, item.batch, item.tokens) for item in fit.of(*study)[1] if not item.at_edge]
        at: dict[str, list[tuple[float, float, tuple[float, float]]]] = {}
        for cell_ in best:
            for name, optimum in cell_.norms.items() if cell_ else ():
                if cell_ and optimum.usable and optimum.interval:
                    at.setdefault(name, []).append((float(cell_.tokens), optimum.x, optimum.interval))
        found += [
            NormOptima(name, study, *(tuple(column) for column in zip(*points, strict=True)))
            for name, points in sorted(at.items())
        ]
    return found


def norms_compared(found: Sequence[NormOptima], studies: Sequence[Study]) -> go.Figure | None:
    """Optimal value of every logged norm against tokens, a panel each, a colour for every study."""
    names = list(dict.fromkeys(item.name for item in found))
    if len(names) < 2:
        return None
    colours = Colours(0, max(1, len(studies) - 1))
    figure = panels([" ".join(name.split("/")[1:]) for name in names], height=270, shared=False)
    for panel, name in enumerate(names):
        levels: list[float] = []
        for item in (item for item in found if item.name == name):
            index = studies.index(item.study)
            label = titled(*item.study)
            aside = 0.06 * (index - (len(studies) - 1) / 2)
            figure.add_scatter(
                x=rounded(np.log2(item.tokens) + aside), y=rounded(item.norm), mode="markers", name=label,
                legendgroup=label, showlegend=name == names[0], marker={"size": 9, "color": colours.at(index)},
                error_y={
                    "symmetric": False, "width": 4, "thickness": 1.2,
                    "array": rounded(h - x for x, (_, h) in zip(item.norm, item.intervals, strict=True)),
                    "arrayminus": rounded(x - low for x, (low, _) in zip(item.norm, item.intervals, strict=True)),
                },
                hovertemplate=f"{label}<br>2<sup>%{{x:.1f}}</sup> tokens: 2<sup>%{{y:.2f}}</sup><extra></extra>",
                **cell(panel),
            )  # fmt: skip
            levels += item.norm
        middle, reach = (min(levels) + max(levels)) / 2, max(1.0, 0.8 * (max(levels) - min(levels)))
        figure.update_yaxes(range=[middle - reach, middle + reach], **cell(panel))
    powers(figure, x=True, y=True)
    figure.update_xaxes(dtick=1)
    x_titles(figure, "tokens", len(names))
    y_titles(figure, "optimal norm", len(names))
    figure.update_layout(showlegend=len(studies) > 1)
    return figure


RECIPES = {"local fit": "quadratic", "the paper's fit": "paper", "lowest run": "lowest"}


def recipes(fit: StudyFit, family: str, model: str) -> go.Figure | None:
    """Optimal norm and learning rate of every horizon's best batch, by the recipe that finds them."""
    cells, horizons = fit.of(family, model)
    own = [c for item in horizons for c in cells if (c.batch, c.tokens) == (item.batch, item.tokens)]
    if not any(c.norm is not None and (c.norm.usable or (c.paper and c.paper.usable)) for c in own):
        return None
    figure = panels(["optimal norm", "optimal learning rate"], height=330, columns=2, shared=False)
    colours = dict(zip(RECIPES, (Colours(0, 2).at(0), ACCENT, "#8a8a8a"), strict=True))
    for shift, (name, recipe) in enumerate(RECIPES.items()):
        for panel, pick in enumerate((_norm_by, _rate_by)):
            points = [(math.log2(c.tokens) + 0.08 * (shift - 1), *pick(c, recipe)) for c in own]
            points = [point for point in points if math.isfinite(point[1])]
            figure.add_scatter(
                x=rounded(p[0] for p in points), y=rounded(p[1] for p in points), mode="markers", name=name,
                legendgroup=name, showlegend=panel == 0, **cell(panel, 2),
                marker={"size": 9, "color": colours[name], "symbol": ["circle", "diamond", "x-thin"][shift],
                        "line": {"width": 2 if shift == 2 else 0, "color": colours[name]}},
                error_y={
                    "symmetric": False, "width": 4, "thickness": 1.2, "array": rounded(p[3] - p[1] for p in points),
                    "arrayminus": rounded(p[1] - p[2] for p in points),
                },
                hovertemplate=f"{name}<br>2<sup>%{{x:.1f}}</sup> tokens: 2<sup>%{{y:.2f}}</sup><extra></extra>",
            )  # fmt: skip
    powers(figure, x=True, y=True)
    figure.update_xaxes(dtick=1)
    x_titles(figure, "tokens", 2, 2)
    return figure


def _norm_by(of: Cell, recipe: str) -> tuple[float, float, float]:
    """log2 norm with the ends of its interval."""
    if recipe == "lowest":
        return (of.lowest.norm,) * 3
    found = of.norm if recipe == "quadratic" else of.paper
    if found is None or not found.usable:
        return (math.nan,) * 3
    low, high = found.interval or (found.x, found.x)
    return found.x, low, high


def _rate_by(of: Cell, recipe: str) -> tuple[float, float, float]:
    """log2 learning rate with the ends of its interval."""
    if recipe == "lowest":
        return (of.lowest.lr,) * 3
    rate = of.rate(recipe)
    low, high = of.lr.interval or (rate, rate) if recipe == "quadratic" else (rate, rate)
    return rate, low, high


def variants(fit: StudyFit, model: str) -> go.Figure | None:
    """Families of one model side by side at the largest horizon they share: how sharp the loss is in the norm at the
    best batch, and in the batch at the best rate."""
    families = [family for family, name in fit.studies if name == model]
    shared = set.intersection(*({h.tokens for h in fit.of(f, model)[1]} for f in families)) if families else set()
    if len(families) < 2 or not shared:
        return None
    tokens = max(shared)
    colours = Colours(0, len(families) - 1)
    figure = panels(["over the norm, at the best batch", "over the batch, at the best rate"], 360, 2, shared=True)
    top = []
    for index, family in enumerate(families):
        cells, horizons = fit.of(family, model)
        own = [c for c in cells if c.tokens == tokens]
        item = next(h for h in horizons if h.tokens == tokens)
        best = next(c for c in own if c.batch == item.batch)
        name = titled(family, "") or model
        look = {"color": colours.at(index)}
        points = [p for p in best.points if math.isfinite(p.norm) and math.isfinite(p.loss)]
        common = {"mode": "lines+markers", "marker": look | {"size": 7}, "line": look | {"width": 1}, "name": name}
        excess = {c.batch: c.loss - best.loss for c in own if math.isfinite(c.loss)}
        top += [p.loss - best.loss for p in points] + list(excess.values())
        points.sort(key=lambda p: p.norm)
        figure.add_scatter(
            x=rounded(p.norm for p in points), y=rounded(p.loss - best.loss for p in points), legendgroup=name,
            hovertemplate=f"{name}<br>norm 2<sup>%{{x:.2f}}</sup>: +%{{y:.3f}} nats<extra></extra>", **common,
            **cell(0, 2),
        )  # fmt: skip
        figure.add_scatter(
            x=[math.log2(b) for b in excess], y=rounded(excess.values()), legendgroup=name, showlegend=False,
            hovertemplate=f"{name}<br>batch 2<sup>%{{x:.1f}}</sup>: +%{{y:.3f}} nats<extra></extra>", **common,
            **cell(1, 2),
        )  # fmt: skip
    if not top:
        return None
    high = max(float(np.quantile(top, 0.7)), 0.02)
    figure.update_yaxes(range=[-0.08 * high, 1.1 * high])
    powers(figure, x=True)
    figure.update_xaxes(title="output norm", **cell(0, 2))
    figure.update_xaxes(title="batch (tokens)", dtick=1, **cell(1, 2))
    y_titles(figure, f"nats above the best, {amount(tokens)} tokens", 2, 2)
    return figure
