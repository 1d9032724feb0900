"""One self-contained HTML page: an answer in words, tables, and figures that say what to see in them. No network."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.offline import get_plotlyjs

from disco.files import replacing
from disco.fit import LayerGroups, StudyFit
from disco.guide import Plan, plan
from disco.report import figures, tables, words
from disco.report._select import focus, through_parents
from disco.report.tables import Sheet
from disco.runs import table
from disco.runs.reader import Run, Runs
from disco.runs.units import counted

OPEN = 3
"""Studies shown unfolded; further ones are folded, and drawn when opened."""
NOTES = 8
"""Warnings shown unfolded."""


@dataclass
class Page:
    """Pieces of the page in order, with a running number for figures."""

    parts: list[str] = field(default_factory=list)
    count: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        self.parts += parts

    def figure(self, title: str, what: str, figure: go.Figure | None, missing: str) -> None:
        """A titled figure with its explanation and the paper's figures that it corresponds to; what is not there is
        named by ``not_drawn``."""
        if figure is None:
            self.missing.append((title, missing))
            return
        self.add(f"<h3>{html.escape(title)}</h3>")
        self.count += 1
        name = f"figure-{self.count}"
        height = figure.layout.height
        self.add(
            f"<p>{what}{words.of_the_paper(title.partition(': ')[0])}</p>",
            f'<div class="figure" id="{name}" style="height:{height}px"></div>',
            f'<script type="application/json" id="{name}-data">{figure.to_json()}</script>',
        )

    def not_drawn(self) -> None:
        """The figures that the data do not carry, a line each."""
        lines = (f"<li>{html.escape(title)}: {html.escape(why)}</li>" for title, why in self.missing)
        if self.missing:
            self.add(f'<p class="missing">Not drawn:</p><ul class="missing">{"".join(lines)}</ul>')
        self.missing.clear()


def write_report(runs: Runs | Sequence[Run], fit: StudyFit, path: Path) -> Path:
    """Writes the page of a study, whole or not at all.

    Args:
        runs: Records; of what ``disco.runs.reader.read_runs`` returns, the problems are listed on the page too.
        fit: Of the same runs.
        path: The HTML file to write or replace.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    read = runs if isinstance(runs, Runs) else Runs(tuple(runs), ())
    page = _document(read.runs, fit, read.problems)
    with replacing(path) as file:
        file.write(page.encode())
    return path


def _document(runs: Sequence[Run], whole: StudyFit, problems: Sequence[str]) -> str:
    fit = focus(whole)
    curves = through_parents(table.curves(runs), runs)
    columns = table.columns(runs)
    page = Page()
    chosen = plan(fit, 2 * max(cell.tokens for cell in fit.cells))
    page.add("<h1>Learning rate and batch size</h1>", f"<p>{words.scope(runs, whole)}</p>")
    page.add('<section class="answer">', *(f"<p>{text}</p>" for text in words.answer(fit, chosen)), "</section>")
    page.add("<h2>What was found</h2>", _table(tables.optima(fit)), f"<p>{words.LEGEND}</p>")
    if len(fit.studies) < len(whole.studies):
        page.add(f"<p>{words.other_ratios(whole, fit)}</p>", _folded("Optima of all ratios", tables.optima(whole)))
    _plans(page, fit, chosen)
    others = tuple(f"{_name(*study)}:" for study in whole.studies if study != (chosen.family, chosen.model))
    notes = sorted(whole.warnings, key=lambda note: note.startswith(others))
    page.add("<h2>Before you rely on it</h2>", f"<p>Trust in the plan: <b>{chosen.trust}</b>.</p>")
    page.add(_list([*chosen.warnings, *notes, *problems]))
    _across(page, fit, columns)
    _layers(page, columns, fit.layers)
    for index, (family, model) in enumerate(fit.studies):
        name = html.escape(_name(family, model))
        page.add(f"<details {'open' if index < OPEN else ''}><summary><h2>{name}</h2></summary>")
        own = curves.filter(pl.col("family") == family, pl.col("model") == model) if len(curves) else curves
        _study(page, fit, family, model, own, runs)
        page.add("</details>")
    return shell("Disco report", page.parts)


def _folded(title: str, sheet: Sheet) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{_table(sheet)}</details>"


def _name(family: str, model: str) -> str:
    """As in the warnings of a fit."""
    return ", ".join(filter(None, (model, family)))


def _plans(page: Page, fit: StudyFit, chosen: Plan) -> None:
    """The plan of the chosen study in full, and those of the others in one table."""
    page.add(f"<h2>{tables.superscript(f'The next horizon: {counted(chosen.tokens)} tokens')}</h2>")
    page.add(_table(tables.recommendation(chosen)))
    others = [study for study in fit.studies if study != (chosen.family, chosen.model)]
    if others:
        plans = [plan(fit, chosen.tokens, model=model, family=family) for family, model in others]
        page.add("<p>The same for the other models of the study:</p>", _table(tables.plans(plans)))


def _list(notes: Sequence[str]) -> str:
    """The first notes as a list, the rest folded."""
    items = [f"<li>{tables.superscript(html.escape(note))}</li>" for note in notes]
    first, rest = items[:NOTES], items[NOTES:]
    more = f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    return f"<ul>{''.join(first)}</ul>{more}" if items else "<p>Nothing to warn of.</p>"


def _across(page: Page, fit: StudyFit, columns: Mapping[str, np.ndarray]) -> None:
    """Figures that compare models and families."""
    page.add("<h2>Is the optimal norm the same everywhere?</h2>")
    page.figure(
        "Optimal norm over tokens",
        words.norm_over_tokens(fit),
        figures.norm_over_tokens(fit),
        "no horizon has an optimal norm inside its grid; add learning rates on the side where the loss still falls.",
    )
    sizes = [path for path in fit.paths if path.axis != "tokens"]
    page.figure(
        "Loss against norm over width and depth",
        words.sizes(sizes, fit),
        figures.size_bowls(fit, sizes),
        "there is no axis of width or depth with optima at two values or more at the same number of tokens.",
    )
    found = figures.norm_optima(fit)
    page.figure(
        "Which norm transfers",
        words.norms_compared(fit),
        figures.norms_compared(found, fit.studies),
        "fewer than two norms have an optimum at a best batch inside its grid.",
    )
    page.figure(
        "Best batch over tokens",
        words.BEST_BATCH,
        figures.best_batch(fit),
        "no model was swept over several batches.",
    )
    models = tuple(dict.fromkeys(model for _, model in fit.studies))
    for model in models:
        several = sum(name == model for _, name in fit.studies) > 1
        if several:
            page.figure(
                f"Families side by side{f': {model}' if len(models) > 1 else ''}",
                words.VARIANTS,
                figures.variants(fit, model),
                "they have no number of tokens in common.",
            )
    page.figure(
        "What a rule would have cost",
        words.regrets(fit),
        figures.regrets(fit),
        "it takes a fit with resamples and a model with four horizons or more.",
    )
    page.not_drawn()


def _layers(page: Page, columns: Mapping[str, np.ndarray], found: LayerGroups | None) -> None:
    """Layer groups, if their ratios were swept."""
    if found is None:
        page.missing.append(("Layer groups", "the runs have one set of layer-group ratios; see docs/figures.md."))
        return page.not_drawn()
    page.add("<h2>Learning rates of layer groups</h2>")
    for family, model in found.studies:
        several = f": {_name(family, model)}" if len(found.studies) > 1 else ""
        page.add(*(f"<p>{text}</p>" for text in words.layer_groups(found, family, model)))
        page.figure(
            f"Best ratios over tokens{several}",
            words.BEST_RATIOS,
            figures.best_ratios(found, family, model),
            "no ratio has its optimum inside those tried.",
        )
        page.figure(
            f"All runs as parallel coordinates{several}",
            words.PARALLEL,
            figures.parallel_coordinates(columns, found, family, model),
            "there are no losses.",
        )
        page.add(_folded(f"Layer groups, all numbers{several}", tables.layer_groups(found, family, model)))
    return page.not_drawn()


def _study(page: Page, fit: StudyFit, family: str, model: str, curves: pl.DataFrame, runs: Sequence[Run]) -> None:
    """Tables and figures of one family and model."""
    path = fit.path(family, model)
    next_plan = plan(fit, 2 * fit.of(family, model)[1][-1].tokens, model=model, family=family)
    target = sum(path.norm) / len(path.norm) if path.norm else math.nan
    page.figure(
        "Loss against output norm during training",
        words.LOSS_AGAINST_NORM,
        figures.loss_against_norm(curves),
        "no run has a training loss and the output norm on the same line.",
    )
    page.figure(
        "Output norm against steps, tokens and path length",
        words.progress(target),
        figures.norm_against_progress(curves, target),
        "no run has the output norm and the path length.",
    )
    page.figure(
        "How far runs part at the same path",
        words.NORM_COLLAPSE,
        figures.norm_collapse(curves),
        "fewer than three runs have the output norm and the path length.",
    )
    page.figure(
        "How fast the norm grows",
        words.NORM_GROWTH,
        figures.norm_growth(curves),
        "no run has the output norm at enough steps.",
    )
    page.figure(
        "Loss against norm at each horizon",
        words.BOWLS,
        figures.loss_bowls(fit, family, model),
        "the output norm was not measured at any horizon.",
    )
    page.figure(
        "What the recipe of the fit changes",
        words.RECIPES,
        figures.recipes(fit, family, model),
        "no best batch has an optimal norm by any recipe.",
    )
    page.figure(
        "Loss over learning rate and batch",
        words.surfaces(fit, family, model),
        figures.loss_surfaces(fit, family, model),
        "one batch only.",
    )
    page.figure(
        "One model of the loss for all runs",
        words.one_stage(fit, family),
        figures.one_stage(fit, family, model, next_plan),
        words.no_one_stage(fit, family),
    )
    page.figure(
        "Which runs first reach the optimal norm",
        words.first_hits(fit, family, model),
        figures.first_hits(fit, family, model),
        "no run crosses the optimal norm between two horizons, or there is none to cross.",
    )
    page.figure(
        "Optimal learning rate against batch",
        words.rates(fit, family, model),
        figures.rate_against_batch(fit, next_plan),
        "no cell has an optimal learning rate inside its grid.",
    )
    run = _near_optimum(fit, family, model, curves, runs)
    page.figure(
        "Layer norms over training",
        words.layer_norms(run) if run else "",
        figures.layer_norms(_layer_norms(run, runs), words.weight_decay(run)) if run else None,
        "no run has layer norms.",
    )
    page.not_drawn()
    page.add("<h3>Scaling rules</h3>", f"<p>{words.RULES}</p>", _table(tables.rules(fit, family, model)))
    page.add(*(f"<p>{text}</p>" for text in words.composites(fit, family, model)))
    page.add(_folded("All cells", tables.cells(fit, family, model)))


def _layer_norms(run: Run, runs: Sequence[Run]) -> pl.DataFrame:
    """Of a run, and before it of those that it branched from."""
    own = table.layer_norms(run)
    parent = next((other for other in runs if other.id == run.config.get("parent")), None)
    if parent is None or own.is_empty():
        return own
    before = _layer_norms(parent, runs)
    return pl.concat([before.filter(pl.col("tokens") < own["tokens"].min()), own])


def _near_optimum(fit: StudyFit, family: str, model: str, curves: pl.DataFrame, runs: Sequence[Run]) -> Run | None:
    """The run of the largest horizon that is nearest to its optimum."""
    last = fit.of(family, model)[1][-1]
    cell = fit.cell(family, model, last.batch, last.tokens)
    if cell is None or curves.is_empty():
        return None
    wanted = cell.rate() if cell.usable else cell.lowest.lr
    near = (
        curves.filter(pl.col("batch") == last.batch)
        .group_by("run", "lr")
        .agg(pl.col("tokens").max())
        .filter(pl.col("tokens") >= last.tokens)
        .sort((pl.col("lr").log(2) - wanted).abs(), "run")
    )
    return next((run for run in runs if len(near) and run.id == near["run"][0]), None)


def _table(sheet: Sheet) -> str:
    def kind(index: int, header: str) -> str:
        return "wrap" if header in tables.WRAPPED else "left" if index < sheet.left else ""

    def row(tag: str, values: Sequence[str]) -> str:
        kinds = (kind(index, header) for index, header in enumerate(sheet.headers))
        texts = (tables.superscript(html.escape(value)) for value in values)
        cells = (f'<{tag} class="{name}">{text}</{tag}>' for name, text in zip(kinds, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{row('th', sheet.headers)}{''.join(row('td', values) for values in sheet.rows)}</table>"


def shell(title: str, parts: Sequence[str]) -> str:
    """A page of HTML that needs no network, from its pieces."""
    files = resources.files("disco.report")
    body = "\n".join(parts)
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{style}</style>\n<script>{get_plotlyjs()}</script></head>\n"
        f"<body><main>\n{body}\n</main><script>{script}</script></body></html>\n"
    )
