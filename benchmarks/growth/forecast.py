"""How well the growth of the fitted runs forecasts the held-out ones: ``python -m benchmarks.growth.forecast FOLDER``.

Writes benchmarks/growth/results.md. A forecast from x% of the tokens knows the points logged up to there, half an
octave apart: on average it stands at 0.84 x%. The fit takes a minute.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from benchmarks.growth.split import GOAL, SPLIT

from disco.fit import BOOTSTRAPS, fit_table
from disco.guide import Check, Plan, check, plan
from disco.guide._course import Course, course
from disco.guide._forecast import distance, forecast, slope_of
from disco.guide._growth_fit import growth
from disco.guide._growth_model import Growth
from disco.guide._watch import LINE
from disco.runs.reader import Run, read_run
from disco.runs.table import columns

RESULTS = Path(__file__).with_name("results.md")
FRACTIONS = (0.02, 0.05, 0.2)
CLOSE = 0.1
"""Octaves of norm."""


@dataclass(frozen=True)
class Score:
    """One forecast of one held-out run; octaves of the output norm."""

    kind: str
    fraction: float
    error: float
    half: float
    """Half the 90% interval."""
    own: float
    """Error of the run's own course carried on, as ``disco.guide`` does where it has no growth."""
    slope: float
    """Error of the slope of log norm over log path carried on from the last two octaves."""
    source: str

    @property
    def covered(self) -> bool:
        return abs(self.error) <= self.half


@dataclass(frozen=True)
class Alarm:
    """One run against the plan, in octaves of learning rate."""

    fraction: float
    truth: float
    check: Check
    """Against the norm that a run at the planned rate ends with."""
    by_norm: float
    """Against the optimal norm of the plan."""


def scores(kind: str, run: Course, fitted: Growth) -> Iterable[Score]:
    """Of one held-out run, of the growth's layer group."""
    layer = fitted.layer
    truth = math.log2(run.group_norm(layer)[-1])
    for fraction in FRACTIONS:
        early = run.until(fraction * run.last)
        found = forecast(early, run.last, fitted, layer)
        yield Score(
            kind, fraction, found.log2 - truth, (found.high - found.low) / 2,
            forecast(early, run.last, None, layer).log2 - truth, _slope(early, run.last, layer) - truth, found.source,
        )  # fmt: skip


def _slope(early: Course, tokens: float, layer: str) -> float:
    """The plain slope carried on from the last point; in proportion to the path where there is no slope yet."""
    x, y = np.log2(early.path[early.path > 0]), np.log2(early.group_norm(layer)[early.path > 0])
    near = x >= x[-1] - 2
    slope = float(np.polyfit(x[near], y[near], 1)[0]) if near.sum() > 1 else 1.0
    return float(y[-1]) + slope * math.log2(early.path_at(tokens) / early.path[-1])


def alarms(run: Course, fitted: Growth, of: Plan) -> Iterable[Alarm]:
    """Of one held-out run against the plan for its batch and horizon."""
    truth = math.log2(run.rate / of.lr.value)
    for fraction in FRACTIONS:
        early = run.until(fraction * run.last)
        found, slope = forecast(early, run.last, fitted), slope_of(early, run.last, fitted)
        by_norm = distance(found, math.log2(of.norm.value), 0.0, slope).octaves
        yield Alarm(fraction, truth, check(early, replace(of, growth=fitted)), by_norm)


def main(folder: Path) -> None:
    """Fits, scores and writes."""
    lines = json.loads(SPLIT.read_text(encoding="utf-8"))
    runs = {line["id"]: read_run(folder / "runs" / line["id"]) for line in lines if _trained(folder, line["id"])}
    missing = [line["id"] for line in lines if line["id"] not in runs]
    kinds = {line["id"]: line["kind"] for line in lines}
    diverged = [run.id for run in runs.values() if run.outcome != "finished"]
    fitting = [runs[line["id"]] for line in lines if line["part"] == "fit" and line["id"] in runs]
    horizons = {line["id"]: line["tokens"] for line in lines}
    testing = [runs[line["id"]] for line in lines if line["part"] == "test" and line["id"] in runs]
    whole = {name: cut(run, horizons[name]) for name, run in runs.items() if name not in diverged}
    fitted = growth([whole[run.id] for run in fitting if run.id in whole])
    rows = columns([run for run in fitting if kinds[run.id] == "plain"])
    within = rows["tokens"] <= np.array([horizons[name] for name in rows["run"]])
    study = fit_table({name: values[within] for name, values in rows.items()}, bootstraps=BOOTSTRAPS)
    testing = [run for run in testing if run.id in whole]
    found = [score for run in testing for score in scores(kinds[run.id], whole[run.id], fitted)]
    groups: list[str] = []
    for layer in ("hidden", "input"):
        of_layer = growth([whole[run.id] for run in fitting if run.id in whole], layer)
        tests = [run for run in testing if kinds[run.id] in GOAL]
        other = [score for run in tests for score in scores(kinds[run.id], whole[run.id], of_layer)]
        groups += ["", f"The {layer} layers' own norm, largest of the group, runs of the goal's kinds:", ""]
        groups += table(other)[: 2 + len(FRACTIONS)]
    told = [
        alarm for run in testing if kinds[run.id] in GOAL
        for alarm in alarms(whole[run.id], fitted, plan(study, horizons[run.id], run.config["batch"]))
    ]  # fmt: skip
    goal = sum(kinds[run.id] in GOAL for run in testing)
    about = (
        f"Fitted to {fitted.runs} runs of {fitted.conditions} conditions; {len(testing)} held-out runs, {goal} of the "
        f"kinds that the goal names; {len(diverged)} diverged and are left out; {len(missing)} of the split are "
        "missing. Made by `python -m benchmarks.growth.forecast`."
    )
    deviation = ", ".join(f"{name} {value:.4f}" for name, value in vars(fitted.deviation).items())
    below = (
        f"Deviation of runs: {deviation}; scale of intervals {fitted.scale:.2f} and, with another momentum, "
        f"{fitted.scale_apart:.2f}. Runs of left-out conditions of the fitted part: {fitted.scatter:.3f} octaves off "
        f"(median, from 5%), their own courses {fitted.own_scatter:.3f}."
    )
    title = "# Forecasts of the final output norm of held-out runs"
    text = "\n".join([title, "", about, "", *table(found), "", *alarm_table(told), *groups, "", below, ""])
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


def cut(run: Run, tokens: int) -> Course:
    """A run up to the horizon of the split: some were trained further."""
    return replace(course(run), horizon=float(tokens)).until(tokens)


def _trained(folder: Path, name: str) -> bool:
    return (folder / "runs" / name / "summary.json").exists()


def table(found: Sequence[Score]) -> list[str]:
    """Errors and coverage: all of the goal, then by kind."""
    names = [
        "runs", "from", "n", "within 0.1", "own course", "plain slope", "median error", "own course", "plain slope",
        "90% of errors below", "covered", "median half interval", "by growth",
    ]  # fmt: skip
    rows = [names, ["---"] * len(names)]
    for kind in ["goal", *dict.fromkeys(score.kind for score in found)]:
        kinds = GOAL if kind == "goal" else (kind,)
        for fraction in FRACTIONS:
            own = [score for score in found if score.fraction == fraction and score.kind in kinds]
            if not own:
                continue
            errors = [np.abs([getattr(score, name) for score in own]) for name in ("error", "own", "slope")]
            rows.append([
                kind, f"{fraction:.0%}", f"{len(own)}", *(f"{np.mean(each <= CLOSE):.0%}" for each in errors),
                *(f"{np.nanmedian(each):.3f}" for each in errors),
                f"{np.quantile(errors[0], 0.9):.3f}", f"{np.mean([score.covered for score in own]):.0%}",
                f"{np.median([score.half for score in own]):.3f}",
                f"{np.mean([score.source == 'growth' for score in own]):.0%}",
            ])  # fmt: skip
    return [_line(row) for row in rows]


def alarm_table(told: Sequence[Alarm]) -> list[str]:
    """Flags by how wrong the rate is."""
    names = [
        "from", "wrong by an octave or more: n", "flagged", "by optimal norm", "within half an octave: n", "flagged",
        "by optimal norm", "error of the distance, median", "by optimal norm",
    ]  # fmt: skip
    rows = [names, ["---"] * len(names)]
    for fraction in FRACTIONS:
        own = [alarm for alarm in told if alarm.fraction == fraction]
        cells = [f"{fraction:.0%}"]
        for group in ([a for a in own if abs(a.truth) >= 1], [a for a in own if abs(a.truth) <= 0.5]):
            verdicts = [alarm.check.verdict == "off course" for alarm in group]
            far = [verdicts, [abs(alarm.by_norm) > LINE for alarm in group]]
            cells += [f"{len(group)}", *(f"{np.mean(each):.0%}" if each else "" for each in far)]
        off = [
            [abs(alarm.check.octaves.octaves - alarm.truth) for alarm in own if alarm.check.octaves],
            [abs(alarm.by_norm - alarm.truth) for alarm in own],
        ]
        rows.append([*cells, *(f"{np.median(each):.2f}" for each in off)])
    said = (
        "Flagged: called off course by `disco watch` against the norm of a run at the planned rate; and more than "
        f"{LINE} octaves of learning rate from the plan by its optimal norm."
    )
    return [said, "", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
