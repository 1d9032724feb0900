"""A plan as text: the recommendation, what it costs to be wrong, and what stands beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from disco.guide import Advice, Answer, Estimate, Plan
from disco.report.text import grid, wrapped
from disco.runs.units import UNKNOWN, counted, power, two_to


def render_plan(plan: Plan, width: int | None = None) -> str:
    """All that a plan says but its warnings, of which it has the gravest.

    Args:
        plan: Of ``disco.guide.plan``.
        width: As for ``text.grid``.
    """
    return "\n\n".join(
        part
        for part in (
            "\n".join(_head(plan)),
            "\n".join(_numbers(plan)),
            "\n".join((*_rests(plan), *_costs(plan), *_largest(plan))),
            "\n".join(_published(plan)),
            _answers(plan, width),
            "\n".join(_silent(plan)),
            _way(plan, width),
            _advice(plan, width),
        )
        if part
    )


def _head(plan: Plan) -> Iterator[str]:
    short, full = counted(plan.tokens), f"{plan.tokens:,}"
    tokens = f"{short} tokens" if short == full else f"{short} tokens ({full})"
    yield f"{tokens} with {' '.join(filter(None, (plan.model, plan.family)))}"
    level = "DO NOT TRUST THIS" if plan.trust == "do not trust" else f"trust: {plan.trust}"
    yield wrapped(level if plan.trust == "ok" else f"{level}: {plan.warnings[0]}")


def _numbers(plan: Plan) -> Iterator[str]:
    for name, value in (("batch (tokens)", plan.batch), ("learning rate", plan.lr), ("output norm, end", plan.norm)):
        yield _number(name, value)
        if value.why != value.source:
            yield wrapped(value.why, "      ")


def _number(name: str, value: Estimate) -> str:
    interval = f"90%: {power(value.interval[0])} .. {power(value.interval[1])}" if value.interval else ""
    plain = "" if math.isnan(value.value) else f"{value.value:,.0f}" if value.value >= 1000 else f"{value.value:.4g}"
    return f"  {name:18}{power(value.value):>9}  {plain:>12}  {interval:26}{value.source}"


def _rests(plan: Plan) -> Iterator[str]:
    size = ", ".join(f"{name} {getattr(plan, name):,.6g}" for name in ("width", "depth") if getattr(plan, name))
    seen = f"{_many(plan.cells, 'cell')} with an optimum at {_many(plan.horizons, 'horizon')}"
    span = f" that span {plan.span:.1f} doublings" if plan.horizons > 1 else ""
    yield wrapped(f"Rests on {seen}{span}{f' ({size})' if size else ''}; {_reach(plan)}. Stage: {plan.stage}.")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _reach(plan: Plan) -> str:
    octaves = plan.octaves
    if octaves > 0:
        return f"extrapolated {octaves:.1f} doublings of tokens"
    if octaves < -plan.span:
        return f"extrapolated to a run {-octaves - plan.span:.1f} doublings shorter than the shortest horizon"
    return (
        f"inside the sweep, {-octaves:.1f} doublings below its largest horizon" if octaves < 0 else "not extrapolated"
    )


def _costs(plan: Plan) -> Iterator[str]:
    cost = plan.cost
    if cost.expected is None or cost.lr_ends is None:
        yield "What it costs if it is wrong cannot be told."
        return
    parts = [f"{_both(cost.lr_ends)} if the best learning rate is at the low / high end of its interval"]
    if cost.batch_ends:
        parts.append(f"{_both(cost.batch_ends)} if the best batch is")
    unknown = "" if cost.of_batch is not None else " for the rate; what the batch costs cannot be told"
    yield wrapped(f"Cost of being wrong: {'; '.join(parts)}; expected in all: {_nats(cost.expected)}{unknown}.")
    if cost.of_batch is not None and cost.of_batch_interval and plan.batch.source in ("given", "capped"):
        low, high = cost.of_batch_interval
        what = "The batch that is given" if plan.batch.source == "given" else "The cap on the batch"
        yield wrapped(
            f"{what} costs {_nats(cost.of_batch)} against the best one (90%: {low:.2g} to {_nats(high)}), with the "
            "best learning rate for each."
        )


def _both(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.2g} / {_nats(ends[1])}"


def _nats(value: float) -> str:
    return f"{value:.2g} nats"


def _largest(plan: Plan) -> Iterator[str]:
    most = plan.largest
    if most is None:
        return
    sure = f", {power(most.sure)} to be sure" if most.sure else ""
    at = f" with learning rate {power(most.lr)}" if most.lr else ""
    what = f"{power(most.batch)} tokens{at}{sure}"
    yield wrapped(f"Largest batch that costs at most {_nats(most.tolerance)}: {what} ({most.why}).")


def _published(plan: Plan) -> Iterator[str]:
    told = [each for each in plan.answers if each.conditions and each.lr is not None]
    if told:
        yield "Published rules, found for other conditions:"
    for each in told:
        yield wrapped(f"{each.name}: {each.conditions}{f' [{each.note}]' if each.note else ''}", "  ")


def _answers(plan: Plan, width: int | None) -> str:
    told = [each for each in plan.answers if each.lr is not None]
    columns = []
    if any(each.cost is not None for each in told):
        columns.append("nats: cost by this plan's estimate")
    if any(each.regret is not None for each in told):
        columns.append("held out: lost on the largest horizon")
    title = f"Other ways to answer ({'; '.join(columns)})" if columns else "Other ways to answer"
    return grid([_answer(each) for each in told], title, width) if told else ""


def _silent(plan: Plan) -> Iterator[str]:
    """Which ways say nothing, by reason."""
    reasons: dict[str, list[str]] = {}
    for each in plan.answers:
        if each.lr is None:
            reasons.setdefault(each.note, []).append(each.name)
    for reason, names in reasons.items():
        yield wrapped(f"No answer by {', '.join(names)}: {reason}")


def _answer(answer: Answer) -> dict[str, str]:
    return {
        "": answer.name,
        "lr": power(answer.lr),
        "lr 90%": _interval(answer.lr_interval),
        "batch": power(answer.batch),
        "batch 90%": _interval(answer.batch_interval),
        "nats": UNKNOWN if answer.cost is None else f"{answer.cost:.4f}",
        "held out": "" if answer.regret is None else f"{answer.regret:+.4f}",
    }


def _interval(interval: tuple[float, float] | None) -> str:
    return " .. ".join(two_to(math.log2(end), 1) for end in interval) if interval else ""


def _way(plan: Plan, width: int | None) -> str:
    rows = [
        {
            "tokens": counted(mark.tokens),
            "norm": power(mark.norm),
            "90% (one run)": " .. ".join(map(power, mark.interval)),
            "": "beyond what was measured" if mark.extrapolated else "",
        }
        for mark in plan.norms
    ]
    return grid(rows, "Output norm along the way, at a constant learning rate", width) if rows else ""


def _advice(plan: Plan, width: int | None) -> str:
    if not plan.advice:
        return ""
    now = {
        "runs": "", "what": "now", "tokens": "", "lr 90%": _half(plan.lr_half), "batch 90%": _half(plan.batch_half),
        "saves nats": "",
    }  # fmt: skip
    known = plan.lr_half is not None or plan.batch_half is not None
    rows = [*([now] if known else ()), *map(_advised, plan.advice)]
    table = grid(rows, "Runs that would narrow this most per token (if the law holds)", width)
    open_ = [name for name, half in (("rate", plan.lr_half), ("batch", plan.batch_half)) if half is None]
    if not open_:
        return table
    why = f"There is no interval of the best {' or '.join(open_)} yet, so what these runs do to it is not known"
    return f"{table}\n{wrapped(f'{why}, nor what they save.')}"


def _advised(each: Advice) -> dict[str, str]:
    return {
        "runs": str(each.runs),
        "what": each.what,
        "tokens": counted(each.tokens),
        "lr 90%": _half(each.lr_half),
        "batch 90%": _half(each.batch_half),
        "saves nats": f"{each.saved:.1g}" if math.isfinite(each.saved) else UNKNOWN,
    }


def _half(octaves: float | None) -> str:
    return UNKNOWN if octaves is None or math.isnan(octaves) else f"±{octaves:.2f}"
