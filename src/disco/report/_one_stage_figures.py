"""The one-stage model of the loss over learning rate and batch, beside the optima of the two-stage fits."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go

from disco.fit import StudyFit, Surface
from disco.guide import Plan
from disco.report import _select as select
from disco.report._style import (
    ACCENT,
    INK,
    PANELS,
    SCALE,
    amount,
    cell,
    panels,
    powers,
    raised,
    rounded,
    spaced,
    x_titles,
    y_titles,
)

GRID = (33, 41)
"""Batches and rates at which the model is drawn."""
BEYOND = 0.5
"""Octaves around the runs that are drawn."""
WORST = 0.5
"""Quantile of the excess losses of the runs at which the colours end."""
LEVELS = 8
"""Contours."""
STAR = {
    "mode": "markers",
    "marker": {"symbol": "star", "size": 15, "color": ACCENT, "line": {"width": 1, "color": "white"}},
}
DIAMOND = {
    "mode": "markers",
    "marker": {"symbol": "diamond", "size": 11, "color": "white", "line": {"width": 2, "color": INK}},
}
RIDGE = {"mode": "lines", "line": {"color": INK, "width": 1.2, "dash": "dot"}}
KEYS = {"optimum of the model": STAR, "ridge: best rate at each batch": RIDGE, "two-stage optimum": DIAMOND}


def one_stage(fit: StudyFit, family: str, model: str, plan: Plan) -> go.Figure | None:
    """Contours of the one-stage model at the horizons of one model and at the planned one, with the runs in the same
    colours, the ridge, and the optima of both stages.

    Args:
        fit: Of the study.
        family: One family.
        model: One model of it.
        plan: For that model; its tokens make the last panel, which has no runs.
    """
    surface, _ = select.one_stage(fit, family)
    cells, items = fit.of(family, model)
    rows = [(c.tokens, math.log2(c.batch), p.lr, p.loss) for c in cells for p in c.points if math.isfinite(p.loss)]
    size = cells[0].parameters if surface and surface.centre[2] else 1.0
    if surface is None or not rows or not size > 0:
        return None
    tokens, batches, rates, losses = np.array(rows).T
    horizons = [*spaced(sorted({item.tokens for item in items}), PANELS - 1), plan.tokens]
    two = {item.tokens: (item.smooth_batch, item.smooth_lr) for item in items if not item.flags}
    ours = next((each for each in plan.answers if each.name == "two-stage"), None)
    if ours and ours.lr and ours.batch:
        two[plan.tokens] = (math.log2(ours.batch), math.log2(ours.lr))
    planned = surface.optimum(plan.tokens, parameters=size)
    x = np.linspace(batches.min() - BEYOND, max(batches.max(), planned.batch) + BEYOND, GRID[0])
    y = np.linspace(min(rates.min(), planned.lr) - BEYOND, rates.max() + BEYOND, GRID[1])
    titles = [f"{amount(each)} tokens" for each in horizons]
    figure = panels([*titles[:-1], f"{titles[-1]}, planned"], height=300, shared=False)
    excess = []
    for panel, each in enumerate(horizons):
        here = tokens == each
        floor = _panel(figure, surface, each, size, (x, y), cell(panel))
        over = losses[here] - floor
        excess += [float(np.quantile(over, WORST))] if len(over) else []
        figure.add_scatter(
            x=rounded(batches[here]), y=rounded(rates[here]), mode="markers", showlegend=False,
            marker={"size": 9, "color": rounded(over), "coloraxis": "coloraxis", "line": {"width": 1, "color": INK}},
            hovertemplate="batch 2<sup>%{x:.1f}</sup>, lr 2<sup>%{y:.2f}</sup>: measured +%{marker.color:.3f} nats"
            "<extra></extra>", **cell(panel),
        )  # fmt: skip
        if each in two and all(map(math.isfinite, two[each])):
            of_batch, of_rate = two[each]
            text = f"two-stage optimum: batch {raised(of_batch)}, lr {raised(of_rate)}<extra></extra>"
            figure.add_scatter(
                x=[round(of_batch, 4)], y=[round(of_rate, 4)], showlegend=False, hovertemplate=text, **DIAMOND,
                **cell(panel),
            )  # fmt: skip
    top = max(float(np.median(excess)), 1e-3)
    figure.update_traces(
        selector={"type": "contour"}, contours={"start": 0, "end": round(top, 4), "size": round(top / LEVELS, 5)}
    )
    bar = {"title": {"text": "nats above the model's least", "side": "right"}, "thickness": 14}
    figure.update_layout(coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": round(top, 4), "colorbar": bar})
    for name, style in KEYS.items():
        figure.add_scatter(x=[None], y=[None], name=name, **style)
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
    )
    powers(figure, x=True, y=True)
    figure.update_xaxes(dtick=1, range=[round(x[0], 3), round(x[-1], 3)])
    figure.update_yaxes(range=[round(y[0], 3), round(y[-1], 3)])
    x_titles(figure, "batch (tokens)", len(horizons))
    y_titles(figure, "learning rate", len(horizons))
    return figure


def _panel(
    figure: go.Figure, surface: Surface, tokens: int, size: float, axes: tuple[np.ndarray, np.ndarray],
    where: dict[str, int],
) -> float:  # fmt: skip
    """Contours, ridge and optimum at one horizon; returns the least loss of the model there."""
    x, y = axes
    best = surface.optimum(tokens, parameters=size)
    z = surface.loss(2.0 ** y[:, None], 2.0 ** x[None, :], float(tokens), size) - best.loss
    figure.add_contour(
        x=rounded(x), y=rounded(y), z=[rounded(row) for row in z], coloraxis="coloraxis", line={"width": 0.6},
        hoverinfo="skip", **where,
    )  # fmt: skip
    ridge = [surface.optimum(tokens, 2.0**batch, size).lr for batch in (x[0], x[-1])]
    figure.add_scatter(x=rounded((x[0], x[-1])), y=rounded(ridge), showlegend=False, hoverinfo="skip", **RIDGE, **where)
    text = f"optimum of the model: batch {raised(best.batch)}, lr {raised(best.lr)}<extra></extra>"
    figure.add_scatter(
        x=[round(best.batch, 4)], y=[round(best.lr, 4)], showlegend=False, hovertemplate=text, **STAR,
        error_x=_bar(best.batch, best.batch_interval), error_y=_bar(best.lr, best.lr_interval), **where,
    )  # fmt: skip
    return best.loss


def _bar(value: float, interval: tuple[float, float] | None) -> dict[str, object]:
    low, high = interval or (value, value)
    return {
        "symmetric": False, "width": 4, "thickness": 1.2, "color": ACCENT,
        "array": rounded([max(high - value, 0)]), "arrayminus": rounded([max(value - low, 0)]),
    }  # fmt: skip
