"""The figures of a report. Here those of training, from tables of curves; ``_fit_figures``, ``_surface_figures``,
``_one_stage_figures``, ``_norm_figures`` and ``_layer_figures`` have those of fits.

Each is a plotly figure, or None where data are missing.
"""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import polars as pl

from disco.fit import NORM
from disco.report._fit_figures import first_hits, loss_bowls, norm_over_tokens, rate_against_batch, size_bowls
from disco.report._layer_figures import best_ratios, parallel_coordinates
from disco.report._norm_figures import norm_collapse, norm_growth, norm_optima, norms_compared, recipes, variants
from disco.report._one_stage_figures import one_stage
from disco.report._style import (
    ACCENT,
    PANELS,
    Colours,
    cell,
    chained,
    log2,
    panels,
    powers,
    raised,
    rounded,
    spaced,
    x_titles,
    y_titles,
)
from disco.report._surface_figures import best_batch, loss_surfaces, regrets

__all__ = [
    "best_batch",
    "best_ratios",
    "first_hits",
    "layer_norms",
    "loss_against_norm",
    "loss_bowls",
    "loss_surfaces",
    "norm_against_progress",
    "norm_collapse",
    "norm_growth",
    "norm_optima",
    "norm_over_tokens",
    "norms_compared",
    "one_stage",
    "parallel_coordinates",
    "rate_against_batch",
    "recipes",
    "regrets",
    "size_bowls",
    "variants",
]

ASSIGNED = {"input": "one_to_rms", "hidden": "rms_to_rms", "output": "rms_to_inf"}
"""The norm whose steepest descent updates a layer group."""


def loss_against_norm(curves: pl.DataFrame) -> go.Figure | None:
    """Loss against output norm along every run, one panel per batch, coloured by learning rate.

    Lines are the training loss, averaged over half octaves of steps and their neighbours; dots the last held-out loss.

    Args:
        curves: Of one family and model, as ``disco.runs.table.curves`` makes it.
    """
    data = _measured(curves, NORM, "loss_train")
    if data.is_empty():
        return None
    ends = data.drop_nulls("loss_valid").filter(pl.col("step") > 0).group_by("run", maintain_order=True).last()
    data = _smoothed(data)
    batches = spaced(_values(data, "batch"), PANELS)
    rates = np.log2(data["lr"].to_numpy())
    colours = Colours(rates.min(), rates.max())
    figure = panels([f"batch {raised(math.log2(batch))} tokens" for batch in batches], height=290)
    for panel, batch in enumerate(batches):
        for same in data.filter(pl.col("batch") == batch).partition_by("lr", maintain_order=True):
            lr, runs = same["lr"][0], same.partition_by("run", maintain_order=True)
            dots = ends.filter(pl.col("batch") == batch, pl.col("lr") == lr)
            look = {"color": colours.at(math.log2(lr))}
            text = f"lr {raised(math.log2(lr))}<br>norm 2<sup>%{{x:.2f}}</sup>, loss %{{y:.3f}}<extra></extra>"
            shared = {"showlegend": False, "hovertemplate": text, **cell(panel)}
            x, y = (chained(f(run[c]) for run in runs) for f, c in ((log2, NORM), (rounded, "loss_train")))
            figure.add_scatter(x=x, y=y, mode="lines", line=look | {"width": 1.3}, **shared)
            figure.add_scatter(
                x=log2(dots[NORM]), y=rounded(dots["loss_valid"]), mode="markers", marker=look | {"size": 8}, **shared
            )
    low = min(float(np.min(values.to_numpy())) for values in (data["loss_train"], ends["loss_valid"]) if len(values))
    high = float(np.max(data["loss_train"].to_numpy()))
    figure.update_yaxes(range=[low - 0.03 * (high - low), low + 0.5 * (high - low)])
    colours.bar(figure, "learning rate")
    powers(figure, x=True)
    x_titles(figure, "output norm", len(batches))
    y_titles(figure, "loss (nats)", len(batches))
    return figure


def norm_against_progress(curves: pl.DataFrame, target: float) -> go.Figure | None:
    """Output norm against steps, tokens and path length, side by side, coloured by batch.

    Args:
        curves: Of one family and model.
        target: log2 of the optimal norm, drawn as a line; NaN for none.
    """
    data = _measured(curves, NORM, "path").filter(pl.col("step") > 0)
    if data.is_empty():
        return None
    batches = _values(data, "batch")
    colours = Colours(math.log2(batches[0]), math.log2(batches[-1]))
    axes = {"step": "steps", "tokens": "tokens", "path": "path length (sum of learning rates)"}
    figure = panels(["", "", ""], height=360)
    for panel, (column, title) in enumerate(axes.items()):
        figure.update_xaxes(title=title, **cell(panel))
        for same in data.partition_by("batch", maintain_order=True):
            octave = math.log2(same["batch"][0])
            runs = same.partition_by("run", maintain_order=True)
            name = f"batch {raised(octave)}"
            figure.add_scatter(
                x=chained(log2(run[column]) for run in runs), y=chained(log2(run[NORM]) for run in runs), mode="lines",
                customdata=chained(log2(run["lr"]) for run in runs), opacity=0.8, **cell(panel),
                line={"color": colours.at(octave), "width": 1.2}, name=name, legendgroup=name, showlegend=panel == 0,
                hovertemplate=f"{name}, lr 2<sup>%{{customdata:.2f}}</sup>"
                "<br>2<sup>%{x:.1f}</sup>: norm 2<sup>%{y:.2f}</sup><extra></extra>",
            )  # fmt: skip
    if math.isfinite(target):
        figure.add_hline(y=target, line={"color": ACCENT, "width": 1.5, "dash": "dash"})
    powers(figure, x=True, y=True)
    y_titles(figure, "output norm", 3)
    return figure


def layer_norms(norms: pl.DataFrame, weight_decay: float = 0.0) -> go.Figure | None:
    """Each layer's assigned norm over the steps of one run, one panel per layer group.

    Args:
        norms: As ``disco.runs.table.layer_norms`` makes it.
        weight_decay: Of the run; 1 over it, the largest norm that steps of norm 1 can hold up, is drawn as a line.
    """
    if norms.is_empty():
        return None
    assigned = pl.col("norm") == pl.col("group").replace_strict(ASSIGNED, default=None)
    data = norms.filter(pl.col("step") > 0, pl.col("value") > 0, assigned)
    groups = [group for group in ASSIGNED if group in _values(data, "group")]
    if not groups:
        return None
    figure = panels([f"{group} ({ASSIGNED[group]})" for group in groups], height=380)
    for panel, group in enumerate(groups):
        layers = data.filter(pl.col("group") == group).partition_by("layer", maintain_order=True)
        colours = Colours(0, max(1, len(layers) - 1))
        for index, layer in enumerate(layers):
            name = layer["layer"][0]
            figure.add_scatter(
                x=log2(layer["step"]), y=log2(layer["value"]), mode="lines", name=name, **cell(panel),
                line={"color": colours.at(index), "width": 1.6}, showlegend=len(layers) > 1,
                hovertemplate=f"{name}<br>2<sup>%{{y:.2f}}</sup><extra></extra>",
            )  # fmt: skip
    if weight_decay > 0:
        figure.add_hline(y=-math.log2(weight_decay), line={"color": ACCENT, "width": 1.5, "dash": "dash"})
    powers(figure, x=True, y=True)
    x_titles(figure, "steps", len(groups))
    y_titles(figure, "norm", len(groups))
    figure.update_layout(legend={"font": {"size": 11}})
    return figure


def _measured(curves: pl.DataFrame, *names: str) -> pl.DataFrame:
    """Rows that have all of the columns; empty when a column was never measured."""
    if not set(names) <= set(curves.columns):
        return curves.clear()
    return curves.drop_nulls(names).sort("batch", "lr", "run", "step")


def _smoothed(data: pl.DataFrame) -> pl.DataFrame:
    """Loss and norm of each run over half octaves of steps, and the loss over three of these: single steps are noisy,
    and near a horizon there are several evaluations side by side."""
    bins = data.filter(pl.col("step") > 0).with_columns((2 * pl.col("step").log(2)).round().alias("bin"))
    means = pl.col("loss_train").mean(), pl.col(NORM).log().mean().exp()
    binned = bins.group_by("run", "batch", "lr", "bin", maintain_order=True).agg(*means)
    return binned.with_columns(pl.col("loss_train").rolling_mean(3, min_samples=1, center=True).over("run"))


def _values(data: pl.DataFrame, column: str) -> list:
    return data[column].unique().sort().to_list()
