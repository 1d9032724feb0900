"""Figures over learning rate and batch together: the loss surface with what is as good as its optimum, and the best
batch over tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go

from disco.fit import Bottom, Cell, Joint, Regret, StudyFit
from disco.fit._regret import OURS
from disco.report._style import (
    ACCENT,
    INK,
    PANELS,
    SCALE,
    Colours,
    amount,
    cell,
    log2,
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

WORST = 0.5
"""Quantile of the excess losses of a panel at which the colours end: what is far from the optimum is of no interest."""


def loss_surfaces(fit: StudyFit, family: str, model: str) -> go.Figure | None:
    """Every run at its batch and learning rate, coloured by its loss, with the joint optimum and the near-optimal set;
    one panel per number of tokens."""
    cells, _ = fit.of(family, model)
    by_tokens = {tokens: [c for c in cells if c.tokens == tokens] for tokens in sorted({c.tokens for c in cells})}
    horizons = spaced([tokens for tokens, group in by_tokens.items() if len(group) > 1], PANELS)
    if not horizons:
        return None
    bottoms = {b.tokens: b for b in fit.bottoms if (b.family, b.model) == (family, model)}
    figure = panels([f"{amount(tokens)} tokens" for tokens in horizons], height=300, shared=False)
    lost = [_surface(figure, by_tokens[t], bottoms.get(t), cell(panel)) for panel, t in enumerate(horizons)]
    top = float(np.median(lost))
    bar = {"title": {"text": "nats above the lowest", "side": "right"}, "thickness": 14}
    figure.update_layout(coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": round(top, 4), "colorbar": bar})
    drawn = any(bottom.optimum.usable for tokens, bottom in bottoms.items() if tokens in horizons)
    for name, style in (_KEYS if drawn else {"lowest run": _LOWEST}).items():
        figure.add_scatter(x=[None], y=[None], name=name, **style)
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
    )
    powers(figure, x=True, y=True)
    figure.update_xaxes(dtick=1)
    x_titles(figure, "batch (tokens)", len(horizons))
    y_titles(figure, "learning rate", len(horizons))
    return figure


_STAR = {
    "mode": "markers",
    "marker": {"symbol": "star", "size": 15, "color": ACCENT, "line": {"width": 1, "color": "white"}},
}
_RIDGE = {"mode": "lines", "line": {"color": INK, "width": 1.2, "dash": "dot"}}
_REGION = {"mode": "lines", "line": {"color": ACCENT, "width": 1.6}}
_LOWEST = {"mode": "markers", "marker": {"symbol": "circle-open", "size": 17, "color": INK, "line": {"width": 1.6}}}
_KEYS = {
    "joint optimum": _STAR,
    "ridge: best rate at each batch": _RIDGE,
    "as good as the optimum, within the noise of one run": _REGION,
    "lowest run": _LOWEST,
}


def _surface(figure: go.Figure, cells: list[Cell], bottom: Bottom | None, where: dict[str, int]) -> float:
    """One panel; returns the excess loss at which its colours should end."""
    rows = [(math.log2(c.batch), p.lr, p.loss, p.diverged) for c in cells for p in c.points]
    alive = [row for row in rows if math.isfinite(row[2])]
    if not alive:
        return 1.0
    low = min(alive, key=lambda row: row[2])
    excess = [row[2] - low[2] for row in alive]
    figure.add_scatter(
        x=rounded(row[0] for row in alive), y=rounded(row[1] for row in alive), mode="markers", showlegend=False,
        marker={"size": 11, "symbol": "square", "color": rounded(excess), "coloraxis": "coloraxis"},
        hovertemplate="batch 2<sup>%{x:.1f}</sup>, lr 2<sup>%{y:.2f}</sup>: +%{marker.color:.3f} nats<extra></extra>",
        **where,
    )  # fmt: skip
    dead = [row for row in rows if row[3]]
    if dead:
        figure.add_scatter(
            x=[row[0] for row in dead], y=[row[1] for row in dead], mode="markers", showlegend=False,
            marker={"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": "#999999"}},
            hovertemplate="diverged<extra></extra>", **where,
        )  # fmt: skip
    figure.add_scatter(x=[low[0]], y=[low[1]], showlegend=False, hoverinfo="skip", **_LOWEST, **where)
    rates = [row[1] for row in rows]
    figure.update_yaxes(range=[min(rates) - 0.4, max(rates) + 0.4], **where)
    best = bottom.optimum if bottom else None
    if best and best.usable and best.bowl:
        assert bottom is not None
        x = np.array(best.bowl.hull)[:, 1]
        ends = np.array([x.min(), x.max()])
        figure.add_scatter(
            x=rounded(ends), y=rounded(best.lr + best.ridge * (ends - best.batch)),
            showlegend=False, hoverinfo="skip", **_RIDGE, **where,
        )  # fmt: skip
        for line in _level(best, bottom.near.tolerance):
            figure.add_scatter(x=rounded(line[:, 0]), y=rounded(line[:, 1]), showlegend=False, hoverinfo="skip",
                               **_REGION, **where)  # fmt: skip
        text = f"joint optimum: batch {raised(best.batch)}, lr {raised(best.lr)}, loss {best.loss:.3f}<extra></extra>"
        figure.add_scatter(
            x=[round(best.batch, 4)], y=[round(best.lr, 4)], showlegend=False, hovertemplate=text, **_STAR, **where
        )
    return max(float(np.quantile(excess, WORST)), 1e-3)


def _level(best: Joint, tolerance: float) -> Iterator[np.ndarray]:
    """The line (log2 batch, log2 rate) where the bowl lies the tolerance above its minimum, within the runs."""
    assert best.bowl is not None
    root = np.linalg.cholesky(np.linalg.inv(np.array(best.bowl.hessian)))
    angle = np.linspace(0, 2 * np.pi, 121)
    line = (
        np.array([best.lr, best.batch])
        + math.sqrt(2 * tolerance) * np.stack([np.cos(angle), np.sin(angle)], 1) @ root.T
    )
    inside = np.array([best.bowl.contains(u, v) for u, v in line])
    yield np.where(inside[:, None], line, np.nan)[:, ::-1]


def best_batch(fit: StudyFit) -> go.Figure | None:
    """Best batch against tokens, every model, with the fitted rule."""
    figure = single(380)
    colours = Colours(0, max(1, len(fit.studies) - 1))
    drawn = False
    for index, study in enumerate(fit.studies):
        items = [item for item in fit.of(*study)[1] if len(item.batches) > 1]
        if not items:
            continue
        drawn = True
        aside = 0.05 * (index - (len(fit.studies) - 1) / 2)
        colour, name = colours.at(index), titled(*study)
        ends = [item.over_batch.interval if item.over_batch and item.over_batch.usable else None for item in items]
        figure.add_scatter(
            x=[math.log2(item.tokens) + aside for item in items], y=rounded(item.smooth_batch for item in items),
            error_y={
                "symmetric": False, "width": 4, "thickness": 1.2,
                "array": rounded(max(e[1] - i.smooth_batch, 0) if e else 0 for i, e in zip(items, ends, strict=True)),
                "arrayminus": rounded(
                    max(i.smooth_batch - e[0], 0) if e else 0 for i, e in zip(items, ends, strict=True)
                ),
            },
            mode="markers", showlegend=False,
            marker={
                "size": 11, "color": colour, "line": {"width": 2, "color": colour},
                "symbol": ["circle-open" if item.at_edge else "circle" for item in items],
            },
            hovertemplate=f"{name}<br>2<sup>%{{x:.1f}}</sup> tokens: batch 2<sup>%{{y:.2f}}</sup><extra></extra>",
        )  # fmt: skip
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker={"size": 11, "color": colour})
        law = fit.rule(*study, "batch(tokens)").law
        if law is not None:
            span = (items[0].tokens, 2 * items[-1].tokens)
            line = [law.predict({"tokens": float(tokens)}).log2 for tokens in span]
            style = {"color": colour, "width": 1, "dash": "dot"}
            figure.add_scatter(
                x=log2(span), y=rounded(line), mode="lines", line=style, showlegend=False, hoverinfo="skip"
            )
    if not drawn:
        return None
    powers(figure, x=True, y=True)
    figure.update_xaxes(title="tokens", dtick=1)
    figure.update_yaxes(title="best batch (tokens)", dtick=1)
    figure.update_layout(showlegend=True)
    return figure


def regrets(fit: StudyFit) -> go.Figure | None:
    """What each way of choosing would have lost on the held-out largest horizons: a dot per horizon, a bar the mean."""
    rolling = fit.rolling
    if rolling is None or not rolling.forecasts:
        return None
    methods = [
        method for method in rolling.methods if any(_priced(f.regret) for f in rolling.forecasts if f.method == method)
    ]
    if not methods:
        return None
    figure = single(140 + 26 * len(methods))
    names = [f"<b>{method}</b>" if method in OURS else method for method in methods]
    means = [rolling.mean(method) for method in methods]
    figure.add_bar(
        x=[round(m, 5) if math.isfinite(m) else None for m in means], y=names, orientation="h", name="mean",
        marker={"color": [ACCENT if m in OURS else "#b8b8b8" for m in methods], "opacity": 0.6}, hoverinfo="x",
    )  # fmt: skip
    own = [(f, name) for method, name in zip(methods, names, strict=True) for f in rolling.forecasts
           if f.method == method and _priced(f.regret)]  # fmt: skip
    figure.add_scatter(
        x=[round(f.regret.nats, 5) for f, _ in own if f.regret], y=[name for _, name in own], mode="markers",
        name="one held-out horizon", marker={"size": 7, "color": INK, "symbol": "circle-open"},
        customdata=[
            f"{f.model}, {amount(f.tokens)} tokens{f' ({f.note})' if f.note else ''}" for f, _ in own
        ],
        hovertemplate="%{customdata}: %{x:.4f} nats<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="nats above the best run", rangemode="tozero")
    figure.update_layout(margin={"l": 190})
    return figure


def _priced(regret: Regret | None) -> bool:
    return regret is not None and math.isfinite(regret.nats)
