"""How the figures look: panels, axes in powers of two, colours by an ordered quantity, legends."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from disco.report.tables import superscript
from disco.runs.units import counted, two_to

WIDTH, NARROW = 1180, 760
COLUMNS = 3
PANELS = 6
"""Most panels of one figure; of more batches or horizons, evenly spaced ones are shown."""
SCALE = "Viridis"
INK, ACCENT = "#2a2a2a", "#d6336c"


class Colours:
    """Colours of an ordered quantity, from dark (low) to light (high); the palest end of the scale is not used."""

    END = 0.9

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = float(low), float(max(high, low + 1e-9))

    def at(self, value: float) -> str:
        part = (value - self.low) / (self.high - self.low)
        return _sample(round(self.END * min(max(part, 0.0), 1.0), 3))

    def bar(self, figure: go.Figure, title: str) -> None:
        """Adds a colour bar in powers of two to a figure whose traces use ``at``."""
        stops = np.linspace(0, 1, 9)
        scale = [[float(stop), _sample(self.END * stop)] for stop in stops]
        marker = {"color": [self.low, self.high], "colorscale": scale, "showscale": True, "colorbar": bar(title)}
        figure.add_scatter(x=[None, None], y=[None, None], mode="markers", marker=marker, showlegend=False)


@cache
def _sample(part: float) -> str:
    return str(sample_colorscale(SCALE, [part])[0])


def bar(title: str) -> dict[str, Any]:
    """A colour bar whose values are log2."""
    return {"title": {"text": title, "side": "right"}, "tickprefix": "2<sup>", "ticksuffix": "</sup>", "thickness": 14}


def raised(log2: float) -> str:
    """2 with a raised exponent, as plotly text."""
    return superscript(two_to(log2))


def amount(count: float) -> str:
    """A count of tokens as plotly text."""
    return superscript(counted(count))


def titled(family: str, model: str) -> str:
    """Name of a study as plotly text: "d64-L2, scion, ratio hidden 2^-3" with its exponent raised."""
    return superscript(html.escape(", ".join(filter(None, (model, family)))))


def log2(values: Iterable[float] | pl.Series) -> list[float | None]:
    """Rounded logarithms for a figure; None where there is none."""
    return [round(math.log2(v), 4) if v is not None and math.isfinite(v) and v > 0 else None for v in values]


def chained(lines: Iterable[Iterable[float | None]]) -> list[float | None]:
    """Several lines as one, with gaps between them: plotly draws one long trace much faster than many."""
    return [value for line in lines for value in (*line, None)]


def rounded(values: Iterable[float]) -> list[float]:
    """Four decimals: enough for a screen, and a small page."""
    return [round(float(value), 4) for value in values]


def cell(panel: int, columns: int = COLUMNS) -> dict[str, int]:
    """Row and column of a panel."""
    return {"row": panel // columns + 1, "col": panel % columns + 1}


def spaced(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def single(height: int = 440) -> go.Figure:
    """An empty figure with one panel."""
    return _framed(go.Figure(), height)


def panels(titles: Sequence[str], height: int, columns: int = COLUMNS, shared: bool = True) -> go.Figure:
    """An empty figure with one panel per title, ``height`` pixels each; ``shared``: one y range for all."""
    rows, columns = math.ceil(len(titles) / columns), min(columns, len(titles))
    total = rows * height + 110
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=list(titles),
        shared_yaxes="all" if shared else False,
        horizontal_spacing=0.035 if shared else 0.06 if columns > 2 else 0.09,
        vertical_spacing=75 / (total - 130) if rows > 1 else 0,
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    return _framed(figure, total, WIDTH if len(titles) > 1 else NARROW)


def _framed(figure: go.Figure, height: int, width: int = WIDTH) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        width=width,
        height=height,
        margin={"l": 70, "r": 30, "t": 40, "b": 60},
        font={"size": 12.5, "color": INK},
        hoverlabel={"font": {"size": 12}},
        legend={"tracegroupgap": 0},
    )
    figure.update_xaxes(showline=True, linecolor="#cccccc", gridcolor="#eeeeee", zeroline=False, ticks="outside")
    figure.update_yaxes(showline=True, linecolor="#cccccc", gridcolor="#eeeeee", zeroline=False, ticks="outside")
    return figure


def powers(figure: go.Figure, x: bool = False, y: bool = False) -> None:
    """Marks axes whose values are log2."""
    for wanted, update in ((x, figure.update_xaxes), (y, figure.update_yaxes)):
        if wanted:
            update(tickprefix="2<sup>", ticksuffix="</sup>", nticks=9)


def x_titles(figure: go.Figure, title: str, count: int, columns: int = COLUMNS) -> None:
    """Titles the abscissae of the lowest panel of each column."""
    for panel in range(count):
        if panel + columns >= count:
            figure.update_xaxes(title=title, **cell(panel, columns))


def y_titles(figure: go.Figure, title: str, count: int, columns: int = COLUMNS) -> None:
    """Titles the ordinates of the first panel of each row."""
    for panel in range(0, count, columns):
        figure.update_yaxes(title=title, **cell(panel, columns))
