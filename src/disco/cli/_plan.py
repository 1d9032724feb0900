"""``disco plan``."""

from __future__ import annotations

import json
import math
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disco.cli import _show
from disco.errors import UserError
from disco.fit import StudyFit
from disco.guide import Answer, Estimate, Plan, flat_settings
from disco.guide import plan as make_plan
from disco.runs.units import UNKNOWN, power, short, two_to
from disco.train.config import number

WIDTH = 96
"""Columns of the text."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The run to plan; see ``disco plan --help``."""

    tokens: int
    batch: int | None
    max_batch: int | None
    width: float | None
    depth: float | None
    parameters: float | None
    tolerance: float | None
    stage: str | None
    model: str | None
    family: str | None
    like: Path | None
    settings: Mapping[str, Any]
    """By dotted name; they win over ``like``."""


def plan(path: Path, wanted: Wanted, as_json: bool) -> int:
    """Shows the recommended batch and learning rate, with what they rest on."""
    fit, sweep = read_fit(path)
    run = (read_settings(wanted.like) if wanted.like else {}) | dict(wanted.settings)
    result = make_plan(
        fit, wanted.tokens, wanted.batch, wanted.model, wanted.family,
        width=_or(wanted.width, run, "model.width"), depth=_or(wanted.depth, run, "model.depth"),
        parameters=wanted.parameters, max_batch=wanted.max_batch, tolerance=wanted.tolerance, stage=wanted.stage,
        run=run, sweep=sweep,
    )  # fmt: skip
    if as_json:
        _show.document(result.to_dict())
        return 0
    for line in text(result):
        print(line)
    for title, rows in tables(result):
        print(f"\n{title}")
        _show.table(rows)
    if run and not sweep:
        _show.warn([f"{path} does not tell the sweep's settings, so they are not compared; fit the records again"])
    _show.warn(result.warnings)
    return 0


def read_fit(path: Path) -> tuple[StudyFit, dict[str, Any]]:
    """What ``disco fit`` wrote: the fit, and the settings of the sweep by family as far as they are there.

    Raises:
        UserError: the file cannot be read or is something else.
    """
    try:
        content = json.loads(path.read_bytes())
        return StudyFit.from_dict(content), dict(content.get("settings") or {})
    except OSError as error:
        raise UserError(f"cannot read the fit {path}: {error.strerror}; make it with: disco fit RUNS") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what disco fit writes: {error}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by dotted name from a configuration in TOML, or from the record of a run (its folder).

    Raises:
        UserError: there is no such file, or it is something else.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        content = file.read_text(encoding="utf-8")
        table = json.loads(content)["config"] if file.suffix == ".json" else tomllib.loads(content)
        if not isinstance(table, dict):
            raise TypeError("no table of settings")
    except OSError as error:
        raise UserError(f"--like: cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--like: {file} is neither a configuration nor the record of a run: {error}") from None
    return flat_settings(table)


def schedule(text: str) -> dict[str, Any]:
    """Settings of a schedule: "constant", the fraction of the run over which the rate decays, or another word."""
    if text == "constant":
        return {"schedule.decay": 0.0}
    if text[:1].isdigit() or text[:1] == ".":
        return {"schedule.decay": number(text, "--schedule")}
    return {"schedule.shape": text}


def _or(value: float | None, run: Mapping[str, Any], name: str) -> float | None:
    return value if value is not None or run.get(name) is None else number(run[name], name)


def text(plan: Plan) -> Iterator[str]:
    """The recommendation, in lines."""
    size = ", ".join(f"{name} {getattr(plan, name):,.6g}" for name in ("width", "depth") if getattr(plan, name))
    yield f"{short(plan.tokens)} tokens ({power(plan.tokens)}) with {' '.join(filter(None, (plan.model, plan.family)))}"
    if plan.trust == "do not trust":
        yield from _wrapped(f"DO NOT TRUST THIS: {plan.warnings[0]}")
    else:
        yield f"trust: {plan.trust}"
    yield ""
    for name, value in (("batch (tokens)", plan.batch), ("learning rate", plan.lr), ("output norm, end", plan.norm)):
        yield from _number(name, value)
    yield ""
    yield from _wrapped(
        f"Rests on {plan.cells} cells with an optimum at {plan.horizons} horizons that span {plan.span:.1f} doublings"
        f"{f' ({size})' if size else ''}; {_beyond(plan.octaves)}. Stage: {plan.stage}."
    )
    yield from _costs(plan)
    if plan.largest is not None:
        most = plan.largest
        sure = f", {power(most.sure)} to be sure" if most.sure else ""
        at = f" with learning rate {power(most.lr)}" if most.lr else ""
        what = f"{power(most.batch)} tokens{at}{sure}"
        yield from _wrapped(f"Largest batch that costs at most {_nats(most.tolerance)}: {what} ({most.why}).")
    yield ""
    yield "Published rules, found for other conditions:"
    for each in plan.answers:
        if each.conditions:
            yield from _wrapped(f"{each.name}: {each.conditions}{f' [{each.note}]' if each.note else ''}", "  ")
    silent = [each for each in plan.answers if each.lr is None and not each.conditions]
    for each in silent:
        yield from _wrapped(f"No answer by {each.name}: {each.note}")


def _number(name: str, value: Estimate) -> Iterator[str]:
    interval = f"{power(value.interval[0])} .. {power(value.interval[1])}" if value.interval else ""
    plain = "" if math.isnan(value.value) else f"{value.value:,.0f}" if value.value >= 1000 else f"{value.value:.4g}"
    yield f"  {name:18}{power(value.value):>9}  {plain:>12}  {f'90%: {interval}' if interval else '':26}{value.source}"
    yield from _wrapped(value.why, "      ")


def _beyond(octaves: float) -> str:
    if octaves > 0:
        return f"extrapolated {octaves:.1f} doublings of tokens"
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
    yield from _wrapped(f"Cost of being wrong: {'; '.join(parts)}; expected in all: {_nats(cost.expected)}.")
    if cost.of_batch_interval and plan.batch.source in ("given", "capped"):
        low, high = cost.of_batch_interval
        what = "The batch that is given" if plan.batch.source == "given" else "The cap on the batch"
        yield from _wrapped(f"{what} costs {_nats(low)} to {_nats(high)} against the best one (90%).")


def _both(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.2g} / {_nats(ends[1])}"


def _nats(value: float) -> str:
    return f"{value:.2g} nats"


def _wrapped(line: str, indent: str = "") -> list[str]:
    return textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ")


def tables(plan: Plan) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Title and rows of what stands beside the recommendation."""
    yield (
        "Other ways to answer (nats: cost by this plan's estimate; held out: lost on the largest horizon)",
        [_answer(each) for each in plan.answers],
    )
    if plan.norms:
        yield (
            "Output norm along the way, at a constant learning rate",
            [
                {
                    "tokens": power(mark.tokens),
                    "norm": power(mark.norm),
                    "90% (one run)": " .. ".join(map(power, mark.interval)),
                    "": "beyond what was measured" if mark.extrapolated else "",
                }
                for mark in plan.norms
            ],
        )
    if plan.advice:
        yield (
            "Runs that would narrow this most per token (if the law holds)",
            [
                {
                    "runs": str(each.runs),
                    "what": each.what,
                    "tokens": short(each.tokens),
                    "lr 90%": f"±{each.lr_half:.2f}",
                    "batch 90%": f"±{each.batch_half:.2f}" if math.isfinite(each.batch_half) else UNKNOWN,
                    "saves nats": f"{each.saved:.1g}",
                }
                for each in plan.advice
            ],
        )


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
