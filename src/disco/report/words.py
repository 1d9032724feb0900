"""The sentences of a report: the answer first, then what to look for in each figure."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence

from disco.fit import Path, Rule, StudyFit
from disco.fit._layer_groups import GroupRatio, LayerGroups
from disco.guide import Plan
from disco.report import _select as select
from disco.report._transfer_words import transfer
from disco.report.tables import FLAGS, formula, superscript
from disco.runs.reader import Run
from disco.runs.schema import Outcome
from disco.runs.units import counted, error_digits, power, two_to

PAPER = {
    "Optimal norm over tokens": "2a",
    "Loss against norm over width and depth": "2b",
    "Which norm transfers": "10",
    "Best batch over tokens": "7b",
    "Families side by side": "9",
    "Best ratios over tokens": "4b",
    "All runs as parallel coordinates": "4a and 11",
    "Loss against output norm during training": "1a",
    "Output norm against steps, tokens and path length": "1b and 5",
    "How fast the norm grows": "5",
    "Loss against norm at each horizon": "2a, 12 and 13",
    "What the recipe of the fit changes": "6",
    "Which runs first reach the optimal norm": "3a",
    "Optimal learning rate against batch": "3b and 7a",
    "Layer norms over training": "8",
}
"""Figures of arXiv:2510.03871 (v1) that those of the page correspond to, by title."""
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
NORM_GROWTH = (
    "Slope of log norm over log steps, over an octave of steps on either side. At 1 the norm grows like the path "
    "length; where the slope falls, updates cancel. See at which norm the curves of a batch bend down, and whether "
    "batches part there."
)
NORM_COLLAPSE = (
    "If the norm is one function of the path, all runs lie near 0 whatever their batch and rate: a final norm can then "
    "be told from the path that a schedule will walk (docs/choosing.md). Runs that leave at high rates are turbulent."
)
RECIPES = (
    "The same cells, three ways to say where their minimum is: the local fit that this page uses, the seven-point fit "
    "of arXiv:2510.03871 with the loss at step 0 as a fixed constant, and the lowest run itself. Where they disagree "
    "by more than their intervals, the number rests on the recipe."
)
BEST_BATCH = (
    "The best batch at each number of tokens, from a parabola over the batches' optima, with its 90% interval. An open "
    "circle: the best batch is the smallest or largest of its grid. Dotted: the fitted power law."
)
VARIANTS = (
    "Families of one model at the largest number of tokens that all of them reached, each relative to its own best "
    "loss. A flatter curve on the left forgives a wrong norm, on the right a wrong batch; curves apart on the left "
    "mean that the optimal norm belongs to the recipe, not to the model."
)
BEST_RATIOS = (
    "Left: the best ratio of each group's learning rate to the reference's, with its 90% interval; a group whose best "
    "ratio is flat or outside those tried is not drawn. Right: what it costs to have a group's rate, all others at "
    "their best, one octave off."
)
PARALLEL = (
    "Each line is a run: the rates of the layer groups (learning rate times ratio), the batch and the loss. In colour "
    "the best tenth, the best one bold and dark; the bars count how many of them took each value. A narrow histogram: "
    "the group is sensitive. Counts follow the grid too: a value tried more often is found more often."
)


def scope(runs: Sequence[Run], fit: StudyFit) -> str:
    """What the page is about, in one sentence."""
    counts = {str(outcome): sum(run.outcome == outcome for run in runs) for outcome in Outcome}
    counts["unfinished"] = sum(run.outcome is None for run in runs)
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    tokens = sorted({cell.tokens for cell in fit.cells})
    horizons = f"horizons from {counted(tokens[0])} to {counted(tokens[-1])}" if len(tokens) > 1 else counted(tokens[0])
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
        f"At the largest horizon swept, {counted(last.tokens)} tokens, {only} was "
        f"{counted(last.batch)} tokens{edge}, with {lr} and a loss of {last.loss:.3f} nats."
    )
    yield superscript(transfer(fit.path(plan.family, plan.model), fit))


def _next(plan: Plan) -> str:
    what = f"<b>{html.escape(plan.model)}, {counted(plan.tokens)} tokens next:</b> "
    batch = f"a batch of {power(plan.batch.value)} ({plan.batch.value:,.0f}) tokens"
    if not math.isfinite(plan.lr.value):
        return what + "no learning rate can be recommended: no cell has its optimum inside the grid of learning rates."
    lr = f"learning rate {power(plan.lr.value)} ({plan.lr.value:.3g}"
    if plan.supported and plan.lr.interval:
        low, high = (power(end, 1) for end in plan.lr.interval)
        how = "" if plan.batch.source == "rule" else "; the batch is carried over, not predicted"
        return f"{what}{lr}, 90% interval {low} to {high}) at {batch}{how}."
    return f"{what}the data do not carry a prediction yet. As a default, not a forecast: {lr}) at {batch}."


def norm_over_tokens(fit: StudyFit) -> str:
    """Over the figure of the optimal norm."""
    text = (
        "The optimal norm at the best batch of each horizon with its 90% interval. An open circle: that batch is at "
        "the edge of its grid, and a better one may have another norm. Dotted: the fitted power law. "
    )
    paths = [path for path in fit.paths if path.axis == "tokens"]
    if len(paths) == 1:
        return superscript(text + _plain(transfer(paths[0], fit)))
    verdicts = (path.transfer.verdict if path.transfer else "cannot tell, too few optima" for path in paths)
    names = (", ".join(filter(None, (path.model, path.family))) for path in paths)
    lines = "; ".join(html.escape(f"{name}: {verdict}") for name, verdict in zip(names, verdicts, strict=True))
    return superscript(f"{text}Does it transfer over tokens? {lines}.")


def sizes(paths: Sequence[Path], fit: StudyFit) -> str:
    """Over the figure of width and depth."""
    lines = " ".join(_plain(transfer(path, fit)) for path in paths)
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


def of_the_paper(title: str) -> str:
    """Figures of arXiv:2510.03871 that the one of this title corresponds to, as the end of its explanation."""
    found = PAPER.get(title)
    return f" <em>As Fig. {found} of arXiv:2510.03871.</em>" if found else ""


def weight_decay(run: Run) -> float:
    """0 where it is not known."""
    return float(run.config["optimizer"].get("weight_decay") or 0.0)


def layer_norms(run: Run) -> str:
    """Over the figure of layer norms."""
    lr, batch = power(run.config["optimizer"]["lr"]), counted(run.config["batch"])
    decay = weight_decay(run)
    cap = f" Dashed: 1 over the weight decay, {power(1 / decay)}, the most that it lets stand." if decay > 0 else ""
    return superscript(
        f"Run {html.escape(run.id)} (learning rate {lr}, batch {batch} tokens), the one nearest to the optimum of the "
        "largest horizon. Layers of one group should grow together; one that stalls or runs away shows here first."
    ) + superscript(cap)


def other_ratios(whole: StudyFit, shown: StudyFit) -> str:
    """Why not every family has its figures."""
    left = len(whole.studies) - len(shown.studies)
    names = "; ".join(dict.fromkeys(family for family, _ in shown.studies))
    return superscript(
        f"The study sweeps ratios of layer groups. Rows and figures are of the set of them with the most cells "
        f"({html.escape(names)}); {left} other {'set is' if left == 1 else 'sets are'} in the table below and in the "
        "section on layer groups."
    )


def surfaces(fit: StudyFit, family: str, model: str) -> str:
    """Over the figure of loss surfaces: the largest horizon's near-optimal set in words."""
    text = (
        "Every run at its batch and learning rate, dark where the loss is low. The line encloses what is as good as "
        "the joint optimum, as far as one run can show; the dotted ridge is the best rate at each batch. "
    )
    own = [item for item in fit.bottoms if (item.family, item.model) == (family, model)]
    if not own:
        return text + "There is no joint fit over batch and rate: it takes three batches."
    last = own[-1]
    if not last.optimum.usable:
        why = ", ".join(FLAGS.get(flag, flag.replace("-", " ")) for flag in last.optimum.flags)
        return superscript(f"{text}At {counted(last.tokens)} tokens there is no joint optimum to report: {why}.")
    near = last.near
    end = "" if near.bounded else ", the largest one measured"
    sure = f", surely up to {power(near.largest_sure)}" if math.isfinite(near.largest_sure) else ""
    return superscript(
        f"{text}At {counted(last.tokens)} tokens the optimum is a batch of {two_to(last.optimum.batch)} at a learning "
        f"rate of {two_to(last.optimum.lr)}; along the ridge the rate goes as the batch to the power "
        f"{error_digits(last.optimum.ridge, last.optimum.ridge_error)}. Within {near.tolerance:.3f} nats of it lie "
        f"batches from {power(near.smallest)} to {power(near.largest)}{end}{sure}."
    )


def one_stage(fit: StudyFit, family: str) -> str:
    """Over the figure of the one-stage model: its form and its exponents."""
    surface, _ = select.one_stage(fit, family)
    if surface is None:
        return ""
    told = {"batch(tokens)": "the best batch goes as tokens to the power", "lr(batch)": "the best rate as the batch to",
            "lr(tokens)": "and, at one batch, as tokens to"}  # fmt: skip
    said = ", ".join(f"{text} {_value(*surface.exponent(name))}" for name, text in told.items())
    return superscript(
        "Contours of one formula for the loss over steps, batch and rate, E + A N^-a + C K^-b + F B^-c and a lopsided "
        f"valley, fitted to all {surface.runs} runs at once. Each run is a dot in the colour of its own loss: where "
        f"dots stand out from what is around them, the formula misses. By it {said}. The star is its optimum, the "
        "diamond that of the two-stage fits; where they are apart by more than the bars, the answer rests on the form."
    )


def _value(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else f"{value:+.2f}"


def no_one_stage(fit: StudyFit, family: str) -> str:
    """Why there is no such figure."""
    return f"{select.one_stage(fit, family)[1] or 'the size of this model is not known'}."


def norms_compared(fit: StudyFit) -> str:
    """Over the figure of all norms: the test of the largest model."""
    text = "The optimum of every logged norm at the best batch, found as the output norm's is."
    family, model = fit.studies[-1]
    told = {name: test for name, test in fit.path(family, model).others.items() if test.interval}
    if not told:
        return f"{text} It takes three horizons to test their transfer."
    said = "; ".join(
        f"{' '.join(name.split('/')[1:])}: {test.verdict}, {test.slope:+.2f} [{test.interval[0]:+.2f}, "
        f"{test.interval[1]:+.2f}] octaves per doubling of tokens, ±{test.margin:.2f} would not matter"
        for name, test in told.items() if test.interval
    )  # fmt: skip
    several = f" ({model}, {family})" if len(fit.studies) > 1 else ""
    return superscript(html.escape(f"{text} The one that transfers best first{several}: {said}."))


def regrets(fit: StudyFit) -> str:
    """Over the figure of rolling origin."""
    best = fit.rolling.best if fit.rolling else ""
    chosen = f" The plan rests on {best}." if best else ""
    return (
        "The largest horizon of each model, left out and predicted from the smaller ones: what the choice of learning "
        "rate and batch loses there against the best run of the grid. Bold: the ways that a plan can rest on; grey: "
        f"published rules.{chosen}"
    )


def composites(fit: StudyFit, family: str, model: str) -> Iterator[str]:
    """Under the rules: the exponent of the tokens in eta* at the best batch, two ways."""
    for item in fit.composites:
        if (item.family, item.model) != (family, model):
            continue
        apart = item.difference_interval
        said = ""
        if apart:
            gap = item.composite - item.direct
            agree = "they agree" if apart[0] <= 0 <= apart[1] else f"they differ by {gap:+.2f}"
            said = f"; {agree}, their difference lies in [{apart[0]:+.2f}, {apart[1]:+.2f}]"
        where = (
            f" [{item.composite_interval[0]:+.2f}, {item.composite_interval[1]:+.2f}]"
            if item.composite_interval
            else ""
        )
        yield (
            f"Exponent of the tokens in the learning rate at the best batch: {item.composite:+.2f}{where} from the two "
            f"rules combined, {item.direct:+.2f} fitted directly{said}."
        )


def layer_groups(found: LayerGroups, family: str, model: str) -> Iterator[str]:
    """The section on layer groups in words: the largest horizon."""
    last = found.of(family, model)[-1]
    name = ", ".join(filter(None, (model, family)))
    head = f"<b>{html.escape(name)}, {counted(last.tokens)} tokens:</b> "
    lead = next(group for group in last.groups if group.reference)
    reference = " and ".join((lead.group, *lead.together))
    told = [group for group in last.groups if group.usable]
    others = [group for group in last.groups if not group.usable and not group.reference]
    parts = [f"{g.group} {_ratio(g)}" for g in told]
    best = f"best learning rates relative to {reference}: {', '.join(parts)}. " if parts else ""
    best += " ".join(f"No best ratio of {g.group}: {_reasons(g)}." for g in others)
    if last.flags:
        best += f" The fit as a whole: {', '.join(FLAGS.get(flag, flag.replace('-', ' ')) for flag in last.flags)}."
    yield superscript(head + best)
    costs = [(last.group(group), last.group(group).curvature) for group in last.ranking]
    if costs:
        text = "; ".join(f"{group.group} {value:.4f}{_range(group.curvature_interval)}" for group, value in costs)
        yield superscript(f"A group's rate one octave off, all else at its best, costs in nats: {text}.")
    if math.isfinite(last.gain):
        yield (
            f"The best ratios save {last.gain:.4f}{_range(last.gain_interval)} nats "
            f"({last.gain / last.loss:.1%} of the loss) against equal rates at their own best learning rate."
        )
    for group in told:
        verdict = {"yes": "moves the best batch", "no": "leaves the best batch where it is"}.get(group.moves_batch)
        shift = ""
        if group.batch_shift_interval:
            low, high = group.batch_shift_interval
            shift = f": {group.batch_shift:+.2f} [{low:+.2f}, {high:+.2f}] octaves of batch per octave of ratio"
        margin = f", where ±{group.margin:.2f} would not matter" if math.isfinite(group.margin) else ""
        if verdict:
            yield f"The {group.group} ratio {verdict}{shift}{margin}."
        else:
            yield f"Whether the {group.group} ratio moves the best batch cannot be told{shift}{margin}."


def _ratio(group: GroupRatio) -> str:
    interval = f" [{group.interval[0]:.1f}, {group.interval[1]:.1f}]" if group.interval else ""
    return f"{two_to(group.ratio)}{interval}"


def _range(interval: tuple[float, float] | None) -> str:
    return f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""


def _reasons(group: GroupRatio) -> str:
    tried = f"{two_to(group.swept[0])} to {two_to(group.swept[-1])} were tried" if group.swept else ""
    text = {
        "edge-low": f"it lies below those tried ({tried})",
        "edge-high": f"it lies above those tried ({tried})",
        "flat": f"the loss hardly depends on it ({tried})",
        "no-minimum": f"the loss has no minimum in it ({tried})",
        "few-points": "it takes three ratios",
        "beside-edge": "that of another group lies beyond those tried, and this one may move with it",
    }
    return ", ".join(text.get(flag, flag) for flag in group.flags) or "no fit"
