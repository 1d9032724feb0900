"""The sentences of a report: the answer first, then what to see in each figure."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence

from disco.fit import Path, StudyFit
from disco.guide import Plan
from disco.report.tables import formula, power
from disco.runs.reader import Run, Runs
from disco.runs.schema import Outcome

LEGEND = (
    "One row per number of tokens, at the best batch of the grid. In brackets: 90% intervals in octaves. Learning rate "
    "and norm are vertices of a parabola through the runs around the minimum; “norm (paper)” follows the recipe of "
    "arXiv:2510.03871. A dash means that the minimum is not inside the grid, so no number would be an optimum."
)
LOSS_AGAINST_NORM = (
    "Each line is one run, from its first step at the top to its end at the dot. Runs of one batch slide into the same "
    "valley: the dots form a bowl over the norm. Runs whose rate is too low stop on its left, still falling; too high a "
    "rate carries the norm past the bottom, and the loss rises or stays up."
)
BOWLS = (
    "Each point is one run at this horizon, each curve the parabola fitted near the lowest points of one batch, and a "
    "star its minimum. If norm transfer holds, the stars of the lowest bowl sit at the same norm in every panel. A ring "
    "marks the lowest run of a batch whose minimum is not inside the grid. Losses above the upper quartile are cut off."
)
RULES = (
    "Least squares in logarithms, batch and tokens in tokens, standard errors in parentheses. “Left out” counts the "
    "cells or horizons whose minimum is at an edge, flat, or rests on too few runs."
)


def superscript(text: str) -> str:
    """2^-5.5 in a text as HTML."""
    return re.sub(r"\b2\^(-?[\d.]*\d)", lambda match: f"2<sup>{match[1].replace('-', '−')}</sup>", text)


def scope(runs: Runs, fit: StudyFit) -> str:
    """What the page is about, in one sentence."""
    ends = {outcome: sum(run.outcome == outcome for run in runs.runs) for outcome in Outcome}
    open_runs = sum(run.outcome is None for run in runs.runs)
    parts = [f"{count} {outcome}" for outcome, count in ends.items() if count]
    parts += [f"{open_runs} unfinished"] if open_runs else []
    tokens = sorted({cell.tokens for cell in fit.cells})
    models = ", ".join(dict.fromkeys(model for _, model in fit.studies))
    return superscript(
        f"{len(runs.runs)} runs ({', '.join(parts)}) of {html.escape(models)}; horizons from "
        f"{power(math.log2(tokens[0]))} to {power(math.log2(tokens[-1]))} tokens."
    )


def answer(fit: StudyFit, plan: Plan) -> Iterator[str]:
    """The headline: what to use next, what was best so far, and whether the norm is constant."""
    yield superscript(_next(plan))
    last = fit.of(plan.family, plan.model)[1][-1]
    lr = f"learning rate {power(last.lr)}" if math.isfinite(last.lr) else "no optimal learning rate inside the grid"
    edge = ", at the edge of the grid of batches" if last.at_edge else ""
    yield superscript(
        f"At the largest horizon swept, {power(math.log2(last.tokens))} tokens, the best batch was "
        f"{power(math.log2(last.batch))} tokens{edge}, with {lr} and a loss of {last.loss:.3f} nats."
    )
    yield superscript(transfer(fit.path(plan.family, plan.model)))


def _next(plan: Plan) -> str:
    what = f"<b>{html.escape(plan.model)}, {power(math.log2(plan.tokens))} tokens next:</b> "
    batch = f"batch {power(math.log2(plan.batch.value))} ({plan.batch.value:,.0f} tokens)"
    if not math.isfinite(plan.lr.value):
        return what + "no learning rate can be recommended: no cell has its optimum inside the grid of learning rates."
    lr = f"learning rate {power(math.log2(plan.lr.value))} ({plan.lr.value:.3g})"
    if plan.supported and plan.lr.interval:
        low, high = (power(math.log2(end), 1) for end in plan.lr.interval)
        how = "" if plan.batch.source == "rule" else "; the batch is carried over, not predicted"
        return f"{what}{lr} (90% interval {low} to {high}) and {batch}{how}."
    return f"{what}the data do not carry a prediction yet. As a default, not a forecast: {lr} and {batch}."


def transfer(path: Path) -> str:
    """Whether the optimal norm is the same along a path, with the numbers, in a sentence."""
    if len(path.norm) < 2:
        return (
            f"Whether the optimal norm is constant over {path.axis} cannot be told: "
            f"{len(path.norm)} optimum inside the grids ({path.condition}); it takes three."
        )
    spread = f"it lies between {power(min(path.norm))} and {power(max(path.norm))} ({path.condition})"
    test = path.transfer
    if test is None or test.interval is None:
        return (
            f"The optimal norm was found at {len(path.norm)} values of {path.axis}: {spread}. It takes three to test."
        )
    slope = (
        f"slope {test.slope:+.2f} [{test.interval[0]:+.2f}, {test.interval[1]:+.2f}] octaves of norm per doubling of "
        f"{path.axis}, where up to ±{test.margin:.2f} would cost less than 0.01 nats"
    )
    if test.verdict == "transfers":
        return f"<b>The optimal norm is the same over {path.axis}</b>: {spread}; {slope}."
    if test.verdict == "drifts":
        return f"<b>The optimal norm drifts with {path.axis}</b>: {spread}; {slope}."
    seen = "no drift is seen, but one that matters" if test.constant else "it moves, but a drift too small to matter"
    return f"<b>Whether the optimal norm is the same over {path.axis} cannot be told yet</b>: {seen} is not excluded; {spread}; {slope}."


def norm_over_tokens(fit: StudyFit) -> str:
    """Under the figure of the optimal norm."""
    lines = " ".join(f"{html.escape(p.model)}: {_plain(transfer(p))}" for p in fit.paths if p.axis == "tokens")
    return superscript(
        "The optimal norm at the best batch of each horizon, with its 90% interval; open circles: the best batch is at the "
        f"edge of its grid, so a better one may have another norm. Dotted: the fitted power law. {lines}"
    )


def sizes(paths: Sequence[Path]) -> str:
    """Under the figure of width and depth."""
    lines = " ".join(_plain(transfer(path)) for path in paths)
    return superscript(f"Each bowl is one model at its best batch. Stars at one norm mean transfer over size. {lines}")


def _plain(text: str) -> str:
    return re.sub("</?b>", "", text)


def progress(target: float) -> str:
    """Under the figure of norm against steps, tokens and path length."""
    line = f" The dashed line is the mean optimal norm, {power(target)}." if math.isfinite(target) else ""
    return superscript(
        "The same runs against three clocks. Against steps and tokens they fan out by learning rate; against the path "
        "length, the sum of the learning rates so far, they fall nearly on one curve as long as the norm grows freely, and "
        f"part by batch where gradients decorrelate.{line}"
    )


def first_hits(fit: StudyFit, family: str, model: str) -> str:
    """Under the figure of first hits."""
    rule = fit.rule(family, model, "first-hit lr(batch, tokens)")
    fitted = f" Fitted (dotted lines): {formula(rule.law, 'lr')}." if rule.law else f" No rule: {rule.reason}."
    return superscript(
        "Each point is a learning rate and batch whose norm first reaches the optimal norm at the number of tokens its "
        f"colour gives. Many pairs reach it; only one of them per colour is also the best: necessary, not sufficient.{fitted}"
    )


def rates(fit: StudyFit, family: str, model: str) -> str:
    """Under the figure of optimal learning rates."""
    rule = fit.rule(family, model, "lr(batch, tokens)")
    fitted = f"Fitted (dotted lines): {formula(rule.law, 'lr')}." if rule.law else f"No rule is drawn: {rule.reason}."
    notes = "".join(f" Note: {note}." for note in rule.law.warnings) if rule.law else ""
    return superscript(
        "The optimal learning rate of every batch and horizon with its 90% interval. It rises with the batch and falls with "
        f"the tokens. {fitted}{notes} The star is the plan for twice the largest horizon, with its 90% prediction interval."
    )


def layer_norms(run: Run) -> str:
    """Under the figure of layer norms."""
    lr, batch = run.config["optimizer"]["lr"], run.config["batch"]
    return superscript(
        f"Run {html.escape(run.id)} (learning rate {power(math.log2(lr))}, batch {power(math.log2(batch))} tokens), the one "
        "nearest to the optimum of the largest horizon. All layers start at norm 1 except the last projection of each block; "
        "a layer that stalls or runs away from its group shows here first."
    )
