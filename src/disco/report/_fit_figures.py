"""Figures of what was fitted: optima, rules and a plan. Each is a plotly figure, or None where data are missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from disco.fit import Cell, Horizon, Path, StudyFit
from disco.guide import Plan
from disco.report._style import (
    ACCENT,
    INK,
    PANELS,
    SCALE,
    Colours,
    amount,
    bar,
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
from disco.report.tables import superscript


def loss_bowls(fit: StudyFit, family: str, model: str) -> go.Figure | None:
    """Loss against norm for every batch, one panel per number of tokens, with the fitted optima."""
    cells = [c for c in fit.of(family, model)[0] if c.norm is not None]
    if not cells:
        return None
    horizons = spaced(sorted({c.tokens for c in cells}), PANELS)
    batches = sorted({c.batch for c in cells})
    colours = Colours(math.log2(batches[0]), math.log2(batches[-1]))
    figure = panels([f"{amount(tokens)} tokens" for tokens in horizons], height=290, shared=False)
    named: set[str] = set()
    for panel, tokens in enumerate(horizons):
        shown = [c for c in cells if c.tokens == tokens]
        for each in shown:
            octave = math.log2(each.batch)
            _bowl(figure, each, f"batch {raised(octave)}", colours.at(octave), cell(panel), named)
        _zoom(figure, shown, cell(panel))
    _key(figure)
    powers(figure, x=True)
    x_titles(figure, "output norm", len(horizons))
    y_titles(figure, "loss (nats)", len(horizons))
    return figure


def size_bowls(fit: StudyFit, paths: Sequence[Path]) -> go.Figure | None:
    """Loss against norm at the best batch for models of different width or depth, one panel per path of the fit."""
    if not paths:
        return None
    columns = 2
    figure = panels(
        [superscript(f"{path.axis} ({path.condition})") for path in paths], height=340, columns=columns, shared=False
    )
    models = list(dict.fromkeys(item.model for item in fit.horizons))
    colours = Colours(0, max(1, len(models) - 1))
    named: set[str] = set()
    for panel, path in enumerate(paths):
        best = {(h.model, h.tokens): h.batch for h in fit.horizons if h.family == path.family}
        found = [fit.cell(path.family, model, best[model, tokens], tokens) for model, tokens in path.at]
        shown = [c for c in found if c is not None and c.norm is not None]
        for each in shown:
            _bowl(figure, each, each.model, colours.at(models.index(each.model)), cell(panel, columns), named)
        _zoom(figure, shown, cell(panel, columns))
    _key(figure)
    powers(figure, x=True)
    x_titles(figure, "output norm", len(paths), columns)
    y_titles(figure, "loss (nats)", len(paths), columns)
    return figure


def norm_over_tokens(fit: StudyFit) -> go.Figure | None:
    """Optimal norm at the best batch against tokens, for every model, with the fitted line."""
    figure = single(400)
    colours = Colours(0, max(1, len(fit.studies) - 1))
    levels: list[float] = []
    for index, study in enumerate(fit.studies):
        items = [item for item in fit.of(*study)[1] if math.isfinite(item.norm)]
        if not items:
            continue
        aside = 0.06 * (index - (len(fit.studies) - 1) / 2)  # so that models do not hide each other
        colour, name = colours.at(index), titled(*study)
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker={"size": 11, "color": colour})
        intervals = [_norm_interval(fit, item) for item in items]
        figure.add_scatter(
            x=[math.log2(item.tokens) + aside for item in items], y=rounded(item.norm for item in items),
            error_y={
                "symmetric": False, "width": 4, "thickness": 1.2,
                "array": rounded(high - item.norm for item, (_, high) in zip(items, intervals, strict=True)),
                "arrayminus": rounded(item.norm - low for item, (low, _) in zip(items, intervals, strict=True)),
            },
            mode="markers", showlegend=False,
            marker={
                "size": 11, "color": colour, "line": {"width": 2, "color": colour},
                "symbol": ["circle-open" if item.at_edge else "circle" for item in items],
            },
            hovertemplate=f"{name}<br>2<sup>%{{x:.1f}}</sup> tokens: norm 2<sup>%{{y:.2f}}</sup><extra></extra>",
        )  # fmt: skip
        levels += [item.norm for item in items]
        law = fit.rule(*study, "norm(tokens)").law
        if law is not None:
            ends = (items[0].tokens, 2 * items[-1].tokens)
            line = [law.predict({"tokens": float(tokens)}).log2 for tokens in ends]
            style = {"color": colour, "width": 1, "dash": "dot"}
            figure.add_scatter(x=log2(ends), y=line, mode="lines", line=style, showlegend=False, hoverinfo="skip")
    if not levels:
        return None
    middle = (min(levels) + max(levels)) / 2
    reach = max(1.0, 0.75 * (max(levels) - min(levels)))
    powers(figure, x=True, y=True)
    figure.update_xaxes(title="tokens", dtick=1)
    figure.update_yaxes(title="optimal output norm", range=[middle - reach, middle + reach], dtick=0.5)
    figure.update_layout(showlegend=True)
    return figure


def first_hits(fit: StudyFit, family: str, model: str) -> go.Figure | None:
    """Learning rate against batch of the runs whose norm crosses its optimum, coloured by the tokens it took."""
    hits = [hit for hit in fit.hits if (hit.family, hit.model) == (family, model)]
    if not hits:
        return None
    tokens = np.log2([hit.tokens for hit in hits])
    batches = sorted({hit.batch for hit in hits})
    figure = single()
    law = fit.rule(family, model, "first-hit lr(batch, tokens)").law
    octaves = range(math.ceil(tokens.min()), math.floor(tokens.max()) + 1) if law else ()
    for octave in octaves:
        assert law is not None
        line = [law.predict({"batch": batch, "tokens": 2.0**octave}).log2 for batch in (batches[0], batches[-1])]
        figure.add_scatter(
            x=log2((batches[0], batches[-1])), y=line, mode="lines+text", text=["", f" {raised(octave)} tokens"],
            textposition="middle right", textfont={"size": 11}, showlegend=False, hoverinfo="skip", cliponaxis=False,
            line={"color": Colours(tokens.min(), tokens.max()).at(octave), "width": 1, "dash": "dot"},
        )  # fmt: skip
    figure.add_scatter(
        x=log2(hit.batch for hit in hits), y=rounded(hit.lr for hit in hits), mode="markers", showlegend=False,
        marker={
            "size": 13, "color": rounded(tokens), "colorscale": SCALE, "line": {"width": 1, "color": "white"},
            "colorbar": bar("tokens at the crossing") | {"x": 1.09},
        },
        hovertemplate="batch 2<sup>%{x:.0f}</sup>, lr 2<sup>%{y:.2f}</sup>: 2<sup>%{marker.color:.2f}</sup> tokens"
        "<extra></extra>",
    )  # fmt: skip
    powers(figure, x=True, y=True)
    figure.update_xaxes(title="batch (tokens)", dtick=1)
    figure.update_yaxes(title="learning rate")
    return figure


def rate_against_batch(fit: StudyFit, plan: Plan) -> go.Figure | None:
    """Optimal learning rate against batch per number of tokens, the fitted rule, and the plan."""
    cells, _ = fit.of(plan.family, plan.model)
    if not any(c.usable for c in cells):
        return None
    horizons = sorted({c.tokens for c in cells})
    colours = Colours(math.log2(horizons[0]), math.log2(horizons[-1]))
    figure = single(500)
    for tokens in horizons:
        colour, name = colours.at(math.log2(tokens)), f"{amount(tokens)} tokens"
        group = [c for c in cells if c.tokens == tokens]
        inside = [c for c in group if c.usable]
        _rates(figure, inside, colour, name)
        edge = [c for c in group if not c.usable and math.isfinite(c.lowest.loss)]
        figure.add_scatter(
            x=log2(c.batch for c in edge), y=rounded(c.lowest.lr for c in edge), mode="markers", legendgroup=name,
            marker={"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": colour}}, showlegend=False,
            hovertemplate="no optimum inside the grid<extra></extra>",
        )  # fmt: skip
        if inside:
            _rule_line(figure, fit, plan, tokens, [c.batch for c in inside], colour, name)
    batches = [c.batch for c in cells]
    _rule_line(figure, fit, plan, plan.tokens, [*batches, plan.batch.value], ACCENT, "plan")
    if math.isfinite(plan.lr.value):
        x, y = math.log2(plan.batch.value), math.log2(plan.lr.value)
        low, high = (math.log2(end) for end in plan.lr.interval) if plan.lr.interval else (y, y)
        error = {"symmetric": False, "array": [high - y], "arrayminus": [y - low], "color": ACCENT}
        default = "" if plan.supported else " (default)"
        figure.add_scatter(
            x=[x], y=[y], mode="markers", marker={"symbol": "star", "size": 17, "color": ACCENT}, error_y=error,
            name=f"plan for {amount(plan.tokens)}{default}", legendgroup="plan",
        )  # fmt: skip
    figure.add_scatter(
        x=[None], y=[None], mode="markers", name="lowest of the grid,<br>but no optimum",
        marker={"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": INK}},
    )  # fmt: skip
    powers(figure, x=True, y=True)
    figure.update_xaxes(title="batch (tokens)", dtick=1)
    figure.update_yaxes(title="optimal learning rate")
    return figure


def _bowl(figure: go.Figure, of: Cell, name: str, colour: str, where: dict[str, int], named: set[str]) -> None:
    """One cell: its runs, the parabola near its minimum, and the minimum or the lowest run where there is none."""
    points = sorted((p for p in of.points if math.isfinite(p.norm) and math.isfinite(p.loss)), key=lambda p: p.norm)
    label = {"name": name, "legendgroup": name, **where}
    figure.add_scatter(
        x=rounded(p.norm for p in points), y=rounded(p.loss for p in points), mode="markers", **label,
        marker={"size": 5.5, "color": colour}, showlegend=name not in named,
        customdata=[raised(p.lr) for p in points],
        hovertemplate=f"{name}, lr %{{customdata}}<br>norm 2<sup>%{{x:.2f}}</sup>, loss %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
    named.add(name)
    best = of.norm
    if best is None or not points:
        return
    quiet = {"showlegend": False, **label}
    if not best.usable:
        low = min(points, key=lambda p: p.loss)
        marker = {"symbol": "circle-open", "size": 13, "color": colour, "line": {"width": 2}}
        figure.add_scatter(x=[low.norm], y=[low.loss], mode="markers", marker=marker, hoverinfo="skip", **quiet)
        return
    x = np.linspace(max(points[0].norm, best.x - 1.5), min(points[-1].norm, best.x + 1.5), 25)
    line = {"color": colour, "width": 1.4}
    y = best.y + best.curvature * (x - best.x) ** 2
    figure.add_scatter(x=rounded(x), y=rounded(y), mode="lines", line=line, hoverinfo="skip", **quiet)
    marker = {"symbol": "star", "size": 12, "color": colour, "line": {"width": 1, "color": INK}}
    text = f"optimum of {name}: norm {raised(best.x)}, loss {best.y:.3f}<extra></extra>"
    figure.add_scatter(
        x=[round(best.x, 4)], y=[round(best.y, 4)], mode="markers", marker=marker, hovertemplate=text, **quiet
    )


def _key(figure: go.Figure) -> None:
    """Legend entries for the two kinds of minimum."""
    star = {"symbol": "star", "size": 12, "color": "white", "line": {"width": 1.2, "color": INK}}
    ring = {"symbol": "circle-open", "size": 12, "color": INK, "line": {"width": 2}}
    for marker, name in ((star, "optimum"), (ring, "lowest run,<br>not an optimum")):
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)


def _zoom(figure: go.Figure, cells: Sequence[Cell], where: dict[str, int]) -> None:
    """Shows the bottom of the bowls: every lowest run and the parabolas to 1.5 octaves, but no more than three
    quarters of the runs."""
    points = [p for c in cells for p in c.points if math.isfinite(p.loss) and math.isfinite(p.norm)]
    if not points:
        return
    losses = [p.loss for p in points]
    ends = [c.norm.y + 2.25 * c.norm.curvature for c in cells if c.norm and c.norm.usable]
    low = min(losses)
    high = float(np.quantile(losses, 0.75))
    if ends:
        high = min(high, max([c.lowest.loss for c in cells if math.isfinite(c.lowest.loss)] + ends))
    room = max(high - low, 1e-3)
    norms = [p.norm for p in points if p.loss <= high + 0.1 * room]
    figure.update_yaxes(range=[low - 0.12 * room, high + 0.15 * room], **where)
    figure.update_xaxes(range=[min(norms) - 0.3, max(norms) + 0.3], **where)


def _norm_interval(fit: StudyFit, item: Horizon) -> tuple[float, float]:
    found = fit.cell(item.family, item.model, item.batch, item.tokens)
    interval = found.norm.interval if found and found.norm else None
    return interval or (item.norm, item.norm)


def _rates(figure: go.Figure, cells: Sequence[Cell], colour: str, name: str) -> None:
    intervals = [c.lr.interval or (c.lr.x, c.lr.x) for c in cells]
    figure.add_scatter(
        x=log2(c.batch for c in cells), y=rounded(c.lr.x for c in cells), mode="markers", name=name, legendgroup=name,
        marker={"size": 10, "color": colour},
        error_y={
            "symmetric": False, "width": 4, "thickness": 1.2, "color": colour,
            "array": rounded(high - c.lr.x for c, (_, high) in zip(cells, intervals, strict=True)),
            "arrayminus": rounded(c.lr.x - low for c, (low, _) in zip(cells, intervals, strict=True)),
        },
        hovertemplate="batch 2<sup>%{x:.0f}</sup>: lr 2<sup>%{y:.2f}</sup><extra></extra>",
    )  # fmt: skip


def _rule_line(
    figure: go.Figure, fit: StudyFit, plan: Plan, tokens: int, batches: Sequence[float], colour: str, group: str
) -> None:
    law = fit.rule(plan.family, plan.model, "lr(batch, tokens)").law
    if law is None:
        return
    ends = (min(batches), max(batches))
    line = [law.predict({"batch": batch, "tokens": float(tokens)}).log2 for batch in ends]
    style = {"color": colour, "width": 1.2, "dash": "dash" if group == "plan" else "dot"}
    figure.add_scatter(
        x=log2(ends), y=rounded(line), mode="lines", line=style, legendgroup=group, showlegend=False, hoverinfo="skip"
    )
