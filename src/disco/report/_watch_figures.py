"""Figures of a run that is watched: against its plan, and what was forecast when."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from disco.guide import Band, Check, Plan
from disco.guide._bands import LOSS, along, half_width, named
from disco.guide._course import Course
from disco.guide._forecast import Forecast, forecast
from disco.report._style import ACCENT, INK, cell, log2, panels, powers, rounded, single
from disco.report.watch_text import target_name

SHADE = "rgba(70, 130, 180, 0.18)"
FAN = "rgba(214, 51, 108, 0.18)"
NODES = 24
"""Points of the fan, and of forecasts made on the way."""
PAST = 10
"""Octaves of tokens before the horizon from which forecasts on the way are shown."""


def fan(course: Course, plan: Plan, check: Check) -> go.Figure | None:
    """Output norm over tokens: so far, the planned band, the forecast with its interval up to the end, and the norm
    to end with.

    Args:
        course: The run so far.
        plan: That it follows.
        check: Of the run now.
    """
    tokens, _, norms = along(course, "output")
    if not len(tokens):
        return None
    figure = single(height=460)
    _planned(figure, plan, check.horizon)
    figure.add_scatter(
        x=log2(tokens), y=rounded(norms), mode="lines+markers", name="the run",
        line={"color": INK, "width": 2}, marker={"size": 4},
        hovertemplate="2<sup>%{x:.1f}</sup> tokens: norm 2<sup>%{y:.2f}</sup><extra></extra>",
    )  # fmt: skip
    nodes = NODES if check.forecast is not None and tokens[-1] < check.horizon else 0
    ahead = np.geomspace(tokens[-1], check.horizon, nodes).tolist()
    found = [forecast(course, at, plan.growth) for at in ahead]
    _fan(figure, [(each.tokens, each) for each in found if math.isfinite(each.log2)], "forecast")
    if check.target is not None:
        figure.add_scatter(
            x=log2([check.horizon]), y=[check.target.log2], mode="markers", name=f"{target_name(check)} at the end",
            marker={"color": ACCENT, "size": 11, "symbol": "diamond"},
            error_y={"type": "data", "symmetric": False, "array": [check.target.high - check.target.log2],
                     "arrayminus": [check.target.log2 - check.target.low], "color": ACCENT},
        )  # fmt: skip
    powers(figure, x=True, y=True)
    figure.update_xaxes(title="tokens")
    figure.update_yaxes(title="output norm")
    return figure


def forecasts(course: Course, plan: Plan, check: Check) -> go.Figure | None:
    """The forecast of the final norm over the tokens at which it was made: it should stay in its own interval."""
    if check.forecast is None or not course.last > 0:
        return None
    start = max(check.horizon * 2.0**-PAST, float(course.tokens[course.tokens > 0][0]))
    when = np.geomspace(start, course.last, NODES) if start < course.last else np.array([course.last])
    made = [(float(at), forecast(course.until(float(at)), check.horizon, plan.growth)) for at in when]
    made = [(at, each) for at, each in made if each.source != "none" and math.isfinite(each.log2)]
    if not made:
        return None
    figure = single(height=380)
    _fan(figure, made, "forecast made then")
    if check.target is not None:
        for value, dash in ((check.target.log2, "dash"), (check.target.low, "dot"), (check.target.high, "dot")):
            figure.add_hline(y=value, line={"color": ACCENT, "width": 1.2, "dash": dash})
    powers(figure, x=True, y=True)
    figure.update_xaxes(title="tokens when it was made")
    figure.update_yaxes(title="output norm at the end")
    return figure


def against_bands(course: Course, bands: Sequence[Band]) -> go.Figure | None:
    """Loss and every layer group's norm against the band of the study's runs, a panel each."""
    shown = [band for band in bands if len(along(course, band.quantity)[0])]
    if not shown:
        return None
    titles = ["loss (nats)" if band.quantity == LOSS else named(band.quantity) for band in shown]
    figure = panels(titles, height=300, columns=2, shared=False)
    for panel, band in enumerate(shown):
        where = cell(panel, 2)
        _, x, y = along(course, band.quantity)
        at, value, half = (np.array(each) for each in (band.at, band.value, half_width(band, len(bands))))
        _shade(figure, at, value - half, value + half, SHADE, "band of the study", panel == 0, where)
        figure.add_scatter(
            x=rounded(x), y=rounded(y), mode="lines+markers", name="the run", showlegend=panel == 0,
            line={"color": INK, "width": 1.8}, marker={"size": 4}, **where,
        )  # fmt: skip
        raised = {"tickprefix": "2<sup>", "ticksuffix": "</sup>", "nticks": 9}
        figure.update_xaxes(title="tokens" if band.quantity == LOSS else "path length", **raised, **where)
        if band.quantity != LOSS:
            figure.update_yaxes(**raised, **where)
    return figure


def _planned(figure: go.Figure, plan: Plan, horizon: float) -> None:
    """The planned norms along the way: of the plan's marks."""
    marks = [mark for mark in plan.norms if mark.tokens <= 1.01 * horizon]
    if marks:
        x, low, high = (
            np.log2([pick(mark) for mark in marks])
            for pick in (lambda m: m.tokens, lambda m: m.interval[0], lambda m: m.interval[1])
        )
        _shade(figure, x, low, high, SHADE, "planned (90%)", True, {})


def _fan(figure: go.Figure, made: Sequence[tuple[float, Forecast]], name: str) -> None:
    if not made:
        return
    x = np.log2([at for at, _ in made])
    low, middle, high = (np.array([getattr(each, end) for _, each in made]) for end in ("low", "log2", "high"))
    _shade(figure, x, low, high, FAN, f"{name} (90%)", True, {})
    figure.add_scatter(x=rounded(x), y=rounded(middle), mode="lines", name=name, line={"color": ACCENT, "width": 2})


def _shade(
    figure: go.Figure,
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    colour: str,
    name: str,
    legend: bool,
    where: dict,
) -> None:
    """A filled region between two lines."""
    figure.add_scatter(
        x=rounded([*x, *x[::-1]]), y=rounded([*high, *low[::-1]]), fill="toself", fillcolor=colour, mode="lines",
        line={"width": 0}, name=name, showlegend=legend, hoverinfo="skip", **where,
    )  # fmt: skip
