"""Figures of layer groups: all runs of a ratio sweep as parallel coordinates, and the best ratios over tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from disco.fit._layer_groups import GROUPS, LayerGroups, RatioOptimum, without_ratios
from disco.report._style import ACCENT, Colours, amount, cell, chained, panels, powers, raised, rounded, spaced

ROWS = 3
"""Most horizons drawn as parallel coordinates."""
TOP = 10
"""The best runs are one in so many."""
SHADES = 12
"""Colours of the best runs: plotly draws few long traces faster than many short ones."""
WIDEST = 0.42
"""Width of the longest bar of a histogram, in distances between axes."""


def parallel_coordinates(
    columns: Mapping[str, np.ndarray], found: LayerGroups, family: str, model: str
) -> go.Figure | None:
    """Every run as a line over the rates of the layer groups, the batch and the loss; the best tenth coloured, with a
    histogram of its values beside every axis. One panel per number of tokens.

    Args:
        columns: As ``disco.runs.table.columns`` makes it.
        found: Of the same.
        family: Without ratios.
        model: One model.
    """
    horizons = spaced([item.tokens for item in found.of(family, model)], ROWS)
    if not horizons:
        return None
    base = np.array([without_ratios(str(name)) for name in columns.get("family", np.full(len(columns["lr"]), ""))])
    loss = np.where(np.asarray(columns["diverged"]).astype(bool), np.nan, np.asarray(columns["loss"], dtype=float))
    figure = panels([f"{amount(tokens)} tokens" for tokens in horizons], height=300, columns=1, shared=False)
    figure.update_layout(width=1180)
    labels = list(figure.layout.annotations)
    for panel, tokens in enumerate(horizons):
        use = (base == family) & (columns["model"] == model) & (columns["tokens"] == tokens) & np.isfinite(loss)
        lr = np.log2(np.asarray(columns["lr"], dtype=float)[use])
        axes = {f"{g} rate": lr + np.log2(np.asarray(columns[f"ratio_{g}"], dtype=float)[use]) for g in GROUPS}
        axes["batch"] = np.log2(np.asarray(columns["batch"], dtype=float)[use])
        labels += _lines(figure, axes, loss[use], cell(panel, 1))
    figure.update_layout(annotations=labels, bargap=0, barmode="overlay", showlegend=False)
    return figure


def _lines(figure: go.Figure, axes: dict[str, np.ndarray], loss: np.ndarray, where: dict[str, int]) -> list[Any]:
    """One panel; returns the labels of its axes."""
    order = np.argsort(loss, kind="stable")
    best = order[: max(3, math.ceil(len(order) / TOP))]
    rest = order[len(best) :]
    scaled = {name: _unit(values) for name, values in axes.items()}
    excess = loss - loss.min()
    top = float(np.quantile(excess, 0.5)) or 1.0
    scaled["loss"] = np.clip(excess / top, 0, 1.08)
    y = np.stack(list(scaled.values()), axis=1)
    x = list(range(y.shape[1]))
    figure.add_scatter(
        x=chained(x for _ in rest), y=chained(rounded(y[i]) for i in rest), mode="lines", hoverinfo="skip",
        line={"color": "#9a9a9a", "width": 0.6}, opacity=max(0.15, min(0.5, 40 / len(order))), **where,
    )  # fmt: skip
    colours = Colours(0, max(1, len(best) - 1))
    share = math.ceil(len(best) / SHADES)
    for first in reversed(range(0, len(best), share)):
        runs = best[first : first + share]
        text = [
            "<br>".join((*(f"{name} {raised(values[run])}" for name, values in axes.items()), f"loss {loss[run]:.3f}"))
            for run in runs
        ]
        figure.add_scatter(
            x=chained(x for _ in runs), y=chained(rounded(y[run]) for run in runs), mode="lines",
            text=[line for line in text for _ in range(len(x) + 1)], hovertemplate="%{text}<extra></extra>",
            line={"color": colours.at(first), "width": 2}, **where,
        )  # fmt: skip
    figure.add_scatter(
        x=x, y=rounded(y[best[0]]), mode="lines", line={"color": colours.at(0), "width": 3.5}, hoverinfo="skip", **where
    )
    labels: list[dict[str, Any]] = []
    for index, (name, values) in enumerate(axes.items()):
        grid, counts = np.unique(np.round(values[best], 2), return_counts=True)
        figure.add_bar(
            x=rounded(WIDEST * counts / counts.max()), y=rounded(_unit(values, grid)), base=[index] * len(grid),
            orientation="h", width=0.035, marker={"color": ACCENT, "opacity": 0.55}, customdata=counts.tolist(),
            hovertemplate=f"{name}: %{{customdata}} of the best tenth<extra></extra>", **where,
        )  # fmt: skip
        ticks = spaced(sorted(set(np.round(values, 2).tolist())), 7)
        labels += _ticks(figure, index, rounded(_unit(values, np.array(ticks))), [raised(t) for t in ticks], where)
    levels = [0.0, 0.25, 0.5, 0.75, 1.0]
    said = [f"+{level * top:.3f}" if level else f"{loss.min():.3f}" for level in levels]
    labels += _ticks(figure, len(axes), levels, said, where)
    figure.update_xaxes(
        range=[-0.35, len(axes) + 0.25], tickvals=x, ticktext=list(scaled),
        showgrid=False, ticks="", side="bottom", **where,
    )  # fmt: skip
    figure.update_yaxes(range=[-0.08, 1.12], visible=False, **where)
    return labels


def _ticks(
    figure: go.Figure, index: int, at: list[float], text: list[str], where: dict[str, int]
) -> list[dict[str, Any]]:
    """One vertical axis; returns the labels on its left, since plotly adds many at once much faster than one by one."""
    figure.add_scatter(
        x=[index, index],
        y=[-0.02, 1.02],
        mode="lines",
        line={"color": "#555555", "width": 1},
        hoverinfo="skip",
        **where,
    )
    panel = str(where["row"]) if where["row"] > 1 else ""
    return [
        {
            "x": index - 0.03, "y": y, "text": label, "showarrow": False, "xanchor": "right", "font": {"size": 11},
            "borderpad": 1, "bgcolor": "rgba(255,255,255,0.8)", "xref": f"x{panel}", "yref": f"y{panel}",
        }
        for y, label in zip(at, text, strict=True)
    ]  # fmt: skip


def _unit(values: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
    """Values as parts of their range."""
    low, range_ = float(values.min()), float(np.ptp(values))
    return np.asarray(
        ((values if at is None else at) - low) / range_ if range_ else np.full(len(values if at is None else at), 0.5)
    )


def best_ratios(found: LayerGroups, family: str, model: str) -> go.Figure | None:
    """Best ratio of every swept group against tokens with its interval, and what an octave off costs per group."""
    items = found.of(family, model)
    groups = [group.group for group in items[0].groups] if items else []
    if not any(group.usable for item in items for group in item.groups):
        return None
    figure = panels(["best ratio", "cost of a rate one octave off"], height=330, columns=2, shared=False)
    colours = dict(zip(GROUPS, (Colours(0, 2).at(i) for i in range(3)), strict=True))
    for shift, name in enumerate(groups):
        best = [(item.tokens, g.ratio, g.interval or (g.ratio, g.ratio)) for item in items
                for g in item.groups if g.group == name and g.usable]  # fmt: skip
        cost = [(item.tokens, g.curvature, g.curvature_interval) for item in items
                for g in item.groups if g.group == name and g.curvature_interval]  # fmt: skip
        for panel, points in enumerate((best, cost)):
            figure.add_scatter(
                x=rounded(math.log2(t) + 0.06 * (shift - 1) for t, _, _ in points),
                y=rounded(value for _, value, _ in points), mode="markers", name=name, legendgroup=name,
                showlegend=panel == 1, marker={"size": 10, "color": colours[name]}, **cell(panel, 2),
                error_y={
                    "symmetric": False, "width": 4, "thickness": 1.2,
                    "array": rounded(high - value for _, value, (_, high) in points),
                    "arrayminus": rounded(value - low for _, value, (low, _) in points),
                },
            )  # fmt: skip
    powers(figure, x=True)
    figure.update_xaxes(dtick=1, title="tokens")
    figure.update_yaxes(
        tickprefix="2<sup>", ticksuffix="</sup>", title=f"ratio to {_reference(items[0])}", **cell(0, 2)
    )
    figure.update_yaxes(title="nats", rangemode="tozero", **cell(1, 2))
    return figure


def _reference(item: RatioOptimum) -> str:
    """The groups that ratios are relative to."""
    lead = next(group for group in item.groups if group.reference)
    return " and ".join((lead.group, *lead.together))
