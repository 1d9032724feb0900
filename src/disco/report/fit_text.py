"""A fit as text: optima with their intervals, joint optima, exponents of the rules, layer groups, norm transfer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from disco.fit import Bottom, Horizon, Rule, StudyFit, Transfer
from disco.guide import STAGES
from disco.guide._estimates import NORMAL
from disco.report._select import focus, one_stage
from disco.report._transfer_words import verdict
from disco.report.tables import names
from disco.report.text import Row, grid, wrapped
from disco.runs.units import UNKNOWN, counted, power, power_range, two_to

Interval = tuple[float, float] | None


def render_fit(fit: StudyFit, width: int | None = None) -> str:
    """The numbers of a fit. Of sweeps over layer-group ratios one set of them, and the layer groups.

    Args:
        fit: Of ``disco.fit.fit_table``.
        width: As for ``text.grid``.
    """
    shown = focus(fit)
    optima = [_optimum(shown, item) for item in shown.horizons]
    parts = [grid(optima, "Optima at the best batch of each horizon (in brackets: 90% intervals)", width)]
    if len(shown.studies) < len(fit.studies):
        left = len(fit.studies) - len(shown.studies)
        parts.append(wrapped(f"These are of the set of ratios with the most cells; {left} more are in the fit."))
    if shown.bottoms:
        parts.append(grid([_bottom(shown, item) for item in shown.bottoms], "Over batch and rate together", width))
    parts += _layers(shown, width)
    rules = [*_rules(shown), *_one_stage(shown)]
    if rules:
        title = "Exponents of the scaling rules (held out: error in octaves at a horizon that is left out)"
        parts.append(grid(rules, title, width))
    parts += ["\n".join(lines) for lines in map(list, (_bends(shown), _missing(shown), _rolling(shown))) if lines]
    parts += _transfers(shown, width)
    return "\n\n".join(parts)


def _optimum(fit: StudyFit, item: Horizon) -> Row:
    cell = fit.cell(item.family, item.model, item.batch, item.tokens)
    assert cell is not None
    edges = [flag for flag in item.flags if flag.startswith("edge")]
    flags = [f"{what}: {', '.join(of)}" for what, of in (("batch", edges), ("rate", cell.lr.flags)) if of]
    flags += [flag for flag in item.flags if flag not in edges]
    over = item.over_batch
    norm = cell.norm
    return names(fit, item.family, item.model) | {
        "tokens": counted(item.tokens),
        "batch": counted(item.batch),
        "lr": power_range(cell.lr.x, cell.lr.interval) if cell.usable else UNKNOWN,
        "norm": power_range(norm.x, norm.interval) if norm and norm.usable else UNKNOWN,
        "loss": f"{item.loss:.4f}" if math.isfinite(item.loss) else UNKNOWN,
        "best by a curve": power_range(item.smooth_batch, over.interval) if over and over.usable else "",
        "flags": "; ".join(flags),
    }


def _bottom(fit: StudyFit, item: Bottom) -> Row:
    best, near = item.optimum, item.near
    row = names(fit, item.family, item.model) | {"tokens": counted(item.tokens)}
    told = {"batch": "", "lr": "", "ridge: lr ~ batch^": "", "as good, within the noise": ""}
    if best.usable:
        half = NORMAL * best.ridge_error
        near_by = f"{power(near.smallest)} .. {power(near.largest)}{'' if near.bounded else ' at least'}"
        told = {
            "batch": power_range(best.batch, best.batch_interval),
            "lr": power_range(best.lr, best.lr_interval),
            "ridge: lr ~ batch^": _between(best.ridge, (best.ridge - half, best.ridge + half)),
            "as good, within the noise": f"{near_by} ({near.tolerance:.3f} nats)",
        }
    return row | told | {"flags": ", ".join(best.flags)}


def _layers(fit: StudyFit, width: int | None) -> Iterator[str]:
    """Best ratios of layer groups at the largest horizon of each model, where they were swept."""
    if fit.layers is None:
        return
    for family, model in fit.layers.studies:
        last = fit.layers.of(family, model)[-1]
        rows = [
            {
                "group": " and ".join((group.group, *group.together)),
                "best ratio": "1 (reference)" if group.reference else two_to(group.ratio),
                "90%": " .. ".join(map(two_to, group.interval)) if group.interval else "",
                "nats, 1 octave off": f"{group.curvature:.4f}" if math.isfinite(group.curvature) else UNKNOWN,
                "moves the best batch": "" if group.reference else group.moves_batch,
                "flags": ", ".join(group.flags),
            }
            for group in last.groups
        ]
        where = ", ".join((*filter(None, (model, family)), f"{counted(last.tokens)} tokens"))
        yield grid(rows, f"Layer groups: {where}", width)


def _rules(fit: StudyFit) -> Iterator[Row]:
    """Those of single models and of families, from the optima of cells and from joint ones; the page has the others."""
    for rule in _own(fit):
        if rule.law is None:
            continue
        errors = [out.error for out in rule.held_out if math.isfinite(out.error)]
        exponents = {name: _between(value, rule.law.interval(name)) for name, value in rule.law.exponents.items()}
        yield (
            names(fit, rule.family, rule.model or "all")
            | {"rule": rule.name, "from": f"{rule.n} {'cells' if rule.recipe == 'quadratic' else 'joint optima'}"}
            | _exponents(exponents)
            | {"held out": f"{math.sqrt(sum(e**2 for e in errors) / len(errors)):.2f}" if errors else ""}
        )


def _own(fit: StudyFit) -> list[Rule]:
    return [r for r in fit.rules if r.recipe in ("quadratic", "joint") and not r.name.startswith("first-hit")]


def _exponents(of: dict[str, str]) -> dict[str, str]:
    """Columns of them, those of sizes together."""
    sizes = ", ".join(f"{name} {text}" for name, text in of.items() if name not in ("batch", "tokens"))
    return {"batch": of.get("batch", ""), "tokens": of.get("tokens", ""), "size": sizes}


def _one_stage(fit: StudyFit) -> Iterator[Row]:
    for family in dict.fromkeys(family for family, _ in fit.studies):
        surface, _ = one_stage(fit, family)
        if surface is None:
            continue
        models = [model for name, model in fit.studies if name == family]
        sizes = ("parameters",) if "lr parameters" in surface.names else ()
        for what, axes in (("batch", ("tokens",)), ("lr", ("batch", "tokens", *sizes))):
            found = {axis: "batch(tokens)" if what == "batch" else f"lr({axis})" for axis in axes}
            yield (
                names(fit, family, models[0] if len(models) == 1 else "all")
                | {"rule": f"{what}({', '.join(axes)})", "from": f"{surface.runs} runs, one stage"}
                | _exponents({axis: _between(*surface.exponent(name)) for axis, name in found.items()})
                | {"held out": ""}
            )


def _bends(fit: StudyFit) -> Iterator[str]:
    """Whether the rules in batch and tokens are planes."""
    for rule in _own(fit):
        if rule.interaction and rule.recipe == "quadratic":
            where = ", ".join(names(fit, rule.family, rule.model).values())
            change = _between(rule.interaction.value, rule.interaction.interval, "+.2f")
            text = f"in {rule.name} the exponent of the batch changes by {change} per doubling of tokens."
            yield wrapped(f"{where}: {text}" if where else f"{text[0].upper()}{text[1:]}")


def _missing(fit: StudyFit) -> Iterator[str]:
    """Which rules there are not, by reason."""
    joint = {(item.family, item.model) for item in fit.bottoms}
    normed = _normed(fit)
    reasons: dict[tuple[str, str], list[str]] = {}
    for rule in _own(fit):
        nothing = (rule.name.startswith("norm") and not normed) or (
            rule.recipe == "joint" and (rule.family, rule.model) not in joint
        )
        if rule.law is None and rule.model and not nothing:
            where = ", ".join(names(fit, rule.family, rule.model).values())
            reasons.setdefault((where, rule.reason), []).append(rule.name)
    for (where, reason), rules in reasons.items():
        text = f"no rule {', '.join(dict.fromkeys(rules))}: {reason}."
        yield wrapped(f"{where}: {text}" if where else f"{text[0].upper()}{text[1:]}")
    families = dict.fromkeys(family for family, _ in fit.studies) if fit.surfaces else ()
    for family in families:
        reason = one_stage(fit, family)[1]
        if reason:
            yield wrapped(f"{family}: no one-stage model: {reason}." if family else f"No one-stage model: {reason}.")


def _normed(fit: StudyFit) -> bool:
    """Whether any run tells its norm."""
    return any(math.isfinite(point.norm) for cell in fit.cells for point in cell.points)


def _rolling(fit: StudyFit) -> Iterator[str]:
    rolling = fit.rolling
    if rolling is None:
        return
    means = {name: rolling.mean(name) for name in (*STAGES, "carried over")}
    told = ", ".join(f"{name} {value:+.4f}" for name, value in means.items() if math.isfinite(value))
    if any(math.isfinite(means[name]) for name in STAGES):
        chosen = f" A plan rests on {rolling.best}." if rolling.best else ""
        yield wrapped(f"Nats lost at the largest horizon when it is predicted from the others: {told}.{chosen}")


def _transfers(fit: StudyFit, width: int | None) -> Iterator[str]:
    if not _normed(fit):
        yield f"The runs do not tell {fit.norm}, so nothing is known of norm transfer."
        return
    for path in fit.paths:
        where = " ".join(filter(None, (path.model, path.family)))
        yield wrapped(f"{where}: optimal norm over {path.axis} ({path.condition}): {verdict(path, fit)}")
        if len(path.others) > 1:
            rows = [_norm(name, test) for name, test in path.others.items()]
            yield grid(rows, f"Norms over {path.axis}: {where}", width)


def _norm(name: str, test: Transfer) -> Row:
    return {
        "norm": name.removeprefix("norm/"),
        "octaves per doubling": _between(test.slope, test.interval, "+.2f"),
        "would not matter": f"±{test.margin:.2f}",
        "verdict": test.verdict,
    }


def _between(value: float, interval: Interval, form: str = ".2f") -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return f"{value:{form}}"
    value, low, high = (round(number, 2) + 0.0 for number in (value, *interval))  # + 0.0: no -0
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
