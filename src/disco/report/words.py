"""The sentences of a report: the answer first, then what to look for in each figure."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence

from disco.fit import Path, Rule, StudyFit
from disco.guide import Plan
from disco.report.tables import formula, superscript
from disco.runs.reader import Run
from disco.runs.schema import Outcome
from disco.runs.units import power, two_to

LEGEND = (
    "One row per number of tokens, at the best batch of the grid. In brackets: 90% intervals, as exponents of 2. "
    "Learning rate and norm are vertices of a parabola through the runs around the minimum; “paper” is the norm by the "
    "recipe of arXiv:2510.03871. A dash: no minimum can be told, at the edge of the grid or in the noise."
)
LOSS_AGAINST_NORM = (
    "Each line is the training loss of one run, smoothed a little; its dot is the held-out loss at the "
    "end. Early training, where the loss is still high, is cut off. Look at the dots of one batch: they "
    "form a bowl over the norm. Those on its left had a learning rate too low to get far enough, those on its right "
    "one that carried the norm past the bottom."
)
BOWLS = (
    "Each point is a learning rate at this horizon, each curve the parabola fitted around the lowest ones of a batch, "
    "a star its minimum. If the norm transfers over tokens, the star of the lowest bowl sits at the same norm in every "
    "panel. A ring is the lowest run of a batch whose minimum cannot be told. High losses are cut off."
)
RULES = (
    "Least squares in logarithms, with batch and tokens counted in tokens; standard errors in parentheses, in units of "
    "the last digits. “Left out”: cells or horizons whose minimum is at an edge, flat, or rests on too few runs."
)


def scope(runs: Sequence[Run], fit: StudyFit) -> str:
    """What the page is about, in one sentence."""
    counts = {str(outcome): sum(run.outcome == outcome for run in runs) for outcome in Outcome}
    counts["unfinished"] = sum(run.outcome is None for run in runs)
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    tokens = sorted({cell.tokens for cell in fit.cells})
    horizons = f"horizons from {power(tokens[0])} to {power(tokens[-1])}" if len(tokens) > 1 else power(tokens[0])
    models = ", ".join(dict.fromkeys(model for _, model in fit.studies))
    return superscript(f"{len(runs)} runs ({parts}) of {html.escape(models)}; {horizons} tokens.")


def answer(fit: StudyFit, plan: Plan) -> Iterator[str]:
    """The headline: what to use next, what was best so far, and whether the norm is constant."""
    yield superscript(_next(plan))
    last = fit.of(plan.family, plan.model)[1][-1]
    lr = f"learning rate {two_to(last.lr)}" if math.isfinite(last.lr) else "no optimal learning rate inside the grid"
    edge = ", at the edge of the grid of batches" if last.at_edge else ""
    only = "the only batch" if "one-batch" in last.flags else "the best batch"
    yield superscript(
        f"At the largest horizon swept, {power(last.tokens)} tokens, {only} was "
        f"{power(last.batch)} tokens{edge}, with {lr} and a loss of {last.loss:.3f} nats."
    )
    yield superscript(transfer(fit.path(plan.family, plan.model)))


def _next(plan: Plan) -> str:
    what = f"<b>{html.escape(plan.model)}, {power(plan.tokens)} tokens next:</b> "
    batch = f"a batch of {power(plan.batch.value)} ({plan.batch.value:,.0f}) tokens"
    if not math.isfinite(plan.lr.value):
        return what + "no learning rate can be recommended: no cell has its optimum inside the grid of learning rates."
    lr = f"learning rate {power(plan.lr.value)} ({plan.lr.value:.3g}"
    if plan.supported and plan.lr.interval:
        low, high = (power(end, 1) for end in plan.lr.interval)
        how = "" if plan.batch.source == "rule" else "; the batch is carried over, not predicted"
        return f"{what}{lr}, 90% interval {low} to {high}) at {batch}{how}."
    return f"{what}the data do not carry a prediction yet. As a default, not a forecast: {lr}) at {batch}."


def transfer(path: Path) -> str:
    """Whether the optimal norm is the same along a path, with the numbers, in a sentence."""
    found = len(path.norm)
    if found < 2:
        number = "no optimum" if not found else "only one optimum"
        found_so_far = f"{number} whose best batch lies inside its grid; it takes 3."
        return f"Whether the optimal norm transfers over {path.axis} is unknown: {found_so_far}"
    spread = f"it lies between {two_to(min(path.norm))} and {two_to(max(path.norm))} ({path.condition})"
    test = path.transfer
    if test is None or test.interval is None:
        return (
            f"The optimal norm was found at {found} values of {path.axis}: {spread}. It takes 3 to test its transfer."
        )
    slope = (
        f"{test.slope:+.2f} [{test.interval[0]:+.2f}, {test.interval[1]:+.2f}] octaves per doubling of {path.axis}, "
        f"where up to ±{test.margin:.2f} would cost less than 0.01 nats"
    )
    if test.verdict == "transfers":
        return f"<b>The optimal norm transfers over {path.axis}:</b> {spread}, {slope}."
    if test.verdict == "drifts":
        return f"<b>The optimal norm drifts with {path.axis}:</b> {spread}, {slope}."
    seen = "no drift is seen, but one that matters" if test.constant else "it moves, but a drift too small to matter"
    head = f"<b>Whether the optimal norm transfers over {path.axis} cannot be told yet:</b>"
    return f"{head} {seen} is not excluded; {spread}, {slope}."


def norm_over_tokens(fit: StudyFit) -> str:
    """Over the figure of the optimal norm."""
    text = (
        "The optimal norm at the best batch of each horizon with its 90% interval. An open circle: that batch is at "
        "the edge of its grid, and a better one may have another norm. Dotted: the fitted power law. "
    )
    paths = [path for path in fit.paths if path.axis == "tokens"]
    if len(paths) == 1:
        return superscript(text + _plain(transfer(paths[0])))
    verdicts = (path.transfer.verdict if path.transfer else "cannot tell, too few optima" for path in paths)
    names = (", ".join(filter(None, (path.model, path.family))) for path in paths)
    lines = "; ".join(html.escape(f"{name}: {verdict}") for name, verdict in zip(names, verdicts, strict=True))
    return superscript(f"{text}Does it transfer over tokens? {lines}.")


def sizes(paths: Sequence[Path]) -> str:
    """Over the figure of width and depth."""
    lines = " ".join(_plain(transfer(path)) for path in paths)
    return superscript(f"Each bowl is one model at its best batch. Stars at one norm mean transfer over size. {lines}")


def _plain(text: str) -> str:
    return re.sub("</?b>", "", text)


def progress(target: float) -> str:
    """Over the figure of norm against steps, tokens and path length."""
    line = f" The dashed line is the mean optimal norm, {two_to(target)}." if math.isfinite(target) else ""
    return superscript(
        "The same runs against three clocks. Against steps and tokens they fan out by learning rate. Against the path "
        "length, the sum of the learning rates so far, see how far they fall on one curve, and where batches part: up "
        f"to there, the learning rates so far decide the norm.{line}"
    )


def first_hits(fit: StudyFit, family: str, model: str) -> str:
    """Over the figure of first hits."""
    text = (
        "Each point is a learning rate and batch whose norm first reaches the optimal norm after as many tokens as its "
        "colour says. Many pairs reach it after the same tokens, but with different losses: reaching the norm is "
        "necessary, not sufficient. "
    )
    return superscript(text + _fitted(fit.rule(family, model, "first-hit lr(batch, tokens)")))


def rates(fit: StudyFit, family: str, model: str) -> str:
    """Over the figure of optimal learning rates."""
    text = "The optimal learning rate of every batch and horizon, with its 90% interval. "
    star = " The star is the plan for twice the largest horizon, with its 90% prediction interval."
    return superscript(text + _fitted(fit.rule(family, model, "lr(batch, tokens)")) + star)


def _fitted(rule: Rule) -> str:
    if rule.law is None:
        return f"No rule is drawn: {rule.reason}."
    notes = "".join(f" Note: {note}." for note in rule.law.warnings)
    return f"Dotted: {formula(rule.law, 'lr')}.{notes}"


def layer_norms(run: Run) -> str:
    """Over the figure of layer norms."""
    lr, batch = (power(value) for value in (run.config["optimizer"]["lr"], run.config["batch"]))
    return superscript(
        f"Run {html.escape(run.id)} (learning rate {lr}, batch {batch} tokens), the one nearest to the optimum of the "
        "largest horizon. Layers of one group should grow together; one that stalls or runs away shows here first."
    )
