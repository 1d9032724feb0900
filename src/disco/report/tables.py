"""Optima, rules and plans as tables of text, for the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from disco.fit import Cell, PowerLaw, Rule, StudyFit
from disco.fit._layer_groups import LayerGroups
from disco.guide import Estimate, Plan
from disco.runs.units import UNKNOWN, counted, error_digits, power, power_range, two_to

FLAGS = {
    "edge-low": "at lower edge",
    "edge-high": "at upper edge",
    "flat": "flat",
    "few-points": "too few rates",
    "no-minimum": "no minimum",
    "one-batch": "one batch only",
}
"""What a flag means to a reader."""
WRAPPED = {"because", "fit", "notes", "family", "rule"}
"""Columns whose text may break into lines."""


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn: headers and rows of text, the first ``left`` columns aligned left."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def superscript(text: str) -> str:
    """2^-5.5 in a text as HTML."""
    return re.sub(r"\b2\^(-?[\d.]*\d)", lambda match: f"2<sup>{match[1].replace('-', '−')}</sup>", text)


def flags(names: Sequence[str], what: str = "") -> str:
    """Flags in words: "batch at the upper edge, flat"."""
    return ", ".join(f"{what} {FLAGS[name]}".strip() if "edge" in name else FLAGS.get(name, name) for name in names)


def optima(fit: StudyFit) -> Sheet:
    """One row per model and number of tokens: the best batch of the grid and the optimum there."""
    rows = []
    for item in fit.horizons:
        cell = fit.cell(item.family, item.model, item.batch, item.tokens)
        assert cell is not None
        notes = [flags([name for name in item.flags if name != "no-optimum"], "batch"), flags(cell.lr.flags, "rate")]
        named = names(fit, item.family, item.model).values()
        rows.append((*named, *_cell(cell), ", ".join(note for note in notes if note) or "ok"))
    first = tuple(names(fit, "", ""))
    headers = ("tokens", "best batch", "learning rate", "norm", "paper", "loss", "notes")
    return Sheet((*first, *headers), tuple(rows), left=len(first))


def names(fit: StudyFit, family: str, model: str) -> dict[str, str]:
    """Those of model and family in which the studies of a fit differ."""
    families, models = ({study[index] for study in fit.studies} for index in (0, 1))
    return ({"model": model} if len(models) > 1 else {}) | ({"family": family} if len(families) > 1 else {})


def cells(fit: StudyFit, family: str, model: str) -> Sheet:
    """One row per batch and number of tokens of one model."""
    rows = tuple((*_cell(cell), flags(cell.lr.flags, "rate") or "ok") for cell in fit.of(family, model)[0])
    return Sheet(("tokens", "batch", "learning rate", "norm", "paper", "loss", "notes"), rows, left=0)


def _cell(cell: Cell) -> tuple[str, ...]:
    norm, paper = cell.norm, cell.paper
    if cell.usable and cell.lr.y_interval:
        half = (cell.lr.y_interval[1] - cell.lr.y_interval[0]) / 2
        loss = f"{cell.loss:.3f} ±{half:.3f}"
    else:
        loss = f"{cell.loss:.3f}" if math.isfinite(cell.loss) else UNKNOWN
    return (
        counted(cell.tokens),
        counted(cell.batch),
        power_range(cell.lr.x, cell.lr.interval) if cell.usable else UNKNOWN,
        power_range(norm.x, norm.interval) if norm and norm.usable else UNKNOWN,
        two_to(paper.x) if paper and paper.usable else UNKNOWN,
        loss,
    )


def formula(law: PowerLaw, target: str) -> str:
    """log2 lr = 0.619(51) log2 batch - 0.558(45) log2 tokens + 9.75(1.60), R2 0.923."""
    terms = [f"{error_digits(value, law.standard_errors[name])} log2 {name}" for name, value in law.exponents.items()]
    terms.append(error_digits(law.intercept, law.intercept_error))
    text = " + ".join(terms).replace("+ -", "- ")
    return f"log2 {target} = {text}, R2 {law.r2:.3f}"


def rules(fit: StudyFit, family: str, model: str) -> Sheet:
    """One row per rule of one model, then one per reason for which there are none."""
    mine = [rule for rule in fit.rules if (rule.family, rule.model) == (family, model)]
    rows = [(rule.name, rule.recipe, _rule(rule), str(rule.n), str(rule.left_out)) for rule in mine if rule.law]
    missing: dict[str, list[Rule]] = {}
    for rule in mine:
        if rule.law is None:
            missing.setdefault(rule.reason, []).append(rule)
    for reason, group in missing.items():
        recipes = ", ".join(dict.fromkeys(rule.recipe for rule in group))
        rows.append((", ".join(dict.fromkeys(rule.name for rule in group)), recipes, reason, "", ""))
    return Sheet(("rule", "optima by", "fit", "optima", "left out"), tuple(rows), left=3)


def _rule(rule: Rule) -> str:
    if rule.law is None:
        return rule.reason
    target = rule.name.removeprefix("first-hit ").split("(")[0]
    notes = [text for text in (rule.condition, *rule.law.warnings) if text]
    return formula(rule.law, target) + (f" ({'; '.join(notes)})" if notes else "")


def layer_groups(found: LayerGroups, family: str, model: str) -> Sheet:
    """One row per number of tokens and layer group."""
    rows = []
    for item in found.of(family, model):
        for group in item.groups:
            notes = [FLAGS.get(flag, flag.replace("-", " ")) for flag in (*group.flags, *item.flags)]
            if group.reference:
                notes.insert(0, "reference")
            if group.together:
                notes.append(f"with {', '.join(group.together)}")
            ratio = UNKNOWN
            if group.reference or group.usable:
                ratio = power_range(group.ratio, group.interval)
            rows.append(
                (
                    counted(item.tokens), group.group, ratio,
                    _nats(group.curvature, group.curvature_interval), _nats(group.retuned, group.retuned_interval),
                    _change(group.over_batch, group.over_batch_interval),
                    _change(group.batch_shift, group.batch_shift_interval),
                    UNKNOWN if group.reference else group.moves_batch, ", ".join(dict.fromkeys(notes)) or "ok",
                )
            )  # fmt: skip
    headers = (
        "tokens", "group", "best ratio", "nats per octave²", "with the rate retuned", "ratio per octave of batch",
        "batch per octave of ratio", "moves the batch", "notes",
    )  # fmt: skip
    return Sheet(headers, tuple(rows), left=2)


def _nats(value: float, interval: tuple[float, float] | None) -> str:
    return _between(value, interval, ".4f")


def _change(value: float, interval: tuple[float, float] | None) -> str:
    return _between(value, interval, "+.2f")


def _between(value: float, interval: tuple[float, float] | None, form: str) -> str:
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else f"{value:{form}}"


def recommendation(plan: Plan) -> Sheet:
    """A plan as three rows: batch, learning rate, norm."""
    rows = (
        ("batch (tokens)", *_estimate(plan.batch)),
        ("learning rate", *_estimate(plan.lr)),
        ("output norm at the end", *_estimate(plan.norm)),
    )
    return Sheet(("", "value", "90% interval", "from", "because"), rows, left=5)


def plans(each: Sequence[Plan]) -> Sheet:
    """One row per plan."""
    rows = []
    for plan in each:
        values, interval, source, _ = zip(*(_estimate(n) for n in (plan.batch, plan.lr, plan.norm)), strict=True)
        notes = ", ".join(f"{name}: {s}" for name, s in zip(("batch", "rate", "norm"), source, strict=True))
        rows.append((plan.model, plan.family, values[0], values[1], interval[1], values[2], notes))
    headers = ("model", "family", "batch (tokens)", "learning rate", "90% interval", "norm", "notes")
    return Sheet(headers, tuple(rows), left=2)


def _estimate(number: Estimate) -> tuple[str, ...]:
    value = "cannot say"
    if math.isfinite(number.value):
        value = f"{power(number.value)} ({number.value:,.4g})"
        if number.value >= 1000:
            value = f"{power(number.value)} ({number.value:,.0f})"
    interval = UNKNOWN
    if number.interval:
        interval = f"{power(number.interval[0])} to {power(number.interval[1])}"
    return value, interval, number.source, number.why
