"""A learning rate from one run: what it costs against the best of a full grid, beside other ways to choose.

    python -m benchmarks.one_run FOLDER [--steps study probes grid report] [--seeds N ...] [--batches LOG2 ...]
        [--horizon LOG2]

``one_run_targets.json`` names the targets (batch, tokens), the studies of half the width, the probes and the grid; it
was written before anything of the target's width was trained. Every step trains what is not done yet into FOLDER, as
cohorts, and goes on where it was stopped. "report" writes ``one_run.md`` beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from disco.errors import UserError
from disco.fit import Cell, StudyFit, Surface, fit_table, published, surface
from disco.guide import OneRun, one_run
from disco.guide import plan as make_plan
from disco.guide._course import Course, course
from disco.guide._forecast import planned
from disco.guide._growth_fit import growth
from disco.guide._growth_model import Growth
from disco.guide._one_run import optimal_norm
from disco.guide._target import Size, Target, choose
from disco.runs.reader import Run, outcome_so_far, read_run
from disco.runs.schema import DATA
from disco.runs.table import columns
from disco.sweep.cohorts import largest
from disco.train.config import TrainConfig, from_dict
from disco.train.data import prepare
from disco.train.loop import train_cohort

TARGETS = Path(__file__).with_name("one_run_targets.json")
REPORT = Path(__file__).with_name("one_run.md")
MEMORY = 2**31
OURS, PLAN = "one run, a probe of 1/8", "rule of the study (disco plan)"


def configs(part: Mapping[str, Any], plan: Mapping[str, Any], folder: Path) -> list[TrainConfig]:
    """The runs of a study, the probes or the grid, the best-known batches last."""
    found = []
    for batch in part["batches"]:
        for offset in part["offsets"]:
            for seed in part["seeds"]:
                rate = 2.0 ** (part["centre"] + 0.5 * (batch - 10) + offset)
                made: TrainConfig = from_dict(TrainConfig, {
                    "model": {"width": part["width"], **plan["model"]}, "data": plan["data"],
                    "optimizer": {"lr": rate}, "batch": 2**batch, "horizon": 2 ** part["horizon"], "seed": seed,
                })  # fmt: skip
                found.append(made)
    data = prepare(found[0].data, folder / DATA)
    return [replace(config, data=data) for config in found]


def train(runs: list[TrainConfig], folder: Path) -> None:
    """Trains what is not done yet, one cohort after the other, large batches first."""
    for batch in sorted({config.batch for config in runs}, reverse=True):
        own = [config for config in runs if config.batch == batch]
        left = [config for config in own if outcome_so_far(folder / config.id, config.horizon) is None]
        size = largest(own[0], MEMORY)
        for some in (left[start : start + size] for start in range(0, len(left), size)):
            began = time.monotonic()
            ended = train_cohort(some, folder)
            took = time.monotonic() - began
            name = f"d{some[0].model.width} B {batch} D {some[0].horizon}"
            print(f"{name}: {len(some)} runs, {took:.0f} s, {sorted(map(str, ended.values()))}", flush=True)


def finished(runs: list[TrainConfig], folder: Path) -> list[Run]:
    """Records of those that are done, perhaps with a shorter horizon."""
    found = [read_run(folder / config.id) for config in runs if (folder / config.id).exists()]
    return [run for run in found if run.summary is not None]


@dataclass(frozen=True)
class Study:
    """What a study of smaller runs knows."""

    fit: StudyFit
    growth: Growth
    tokens: int
    parameters: int
    """Of its model."""

    def target(self, tokens: int, width: float) -> Target:
        """A run of another width."""
        return choose(self.fit, tokens, None, None, Size(width, 2.0), lambda _: 0)


def study(runs: list[Run], last: int) -> Study:
    """Fitted to runs up to ``last`` tokens."""
    data = columns(runs)
    fit = fit_table({name: values[data["tokens"] <= last] for name, values in data.items()})
    return Study(fit, growth([course(run).until(last) for run in runs]), last * len(runs), runs[0].parameters or 0)


@dataclass(frozen=True)
class Choice:
    """log2 of a learning rate, with its 90% interval where there is one; NaN where a method gives none."""

    rate: float
    low: float = math.nan
    high: float = math.nan


def by_probe(known: Study, probe: Course, tokens: int, share: float, grown: bool) -> Choice:
    """Our choice."""
    try:
        found: OneRun = one_run(
            known.target(tokens, probe.width), [probe.until(share * tokens)], known.growth if grown else None
        )
    except UserError:
        return Choice(math.nan)
    low, high = found.lr.interval or (math.nan, math.nan)
    return Choice(*map(math.log2, (found.lr.value, low, high)))


def without_probe(known: Study, probe: Course, tokens: int) -> Choice:
    """The rate that ends at the best norm by the study's growth alone."""
    best = optimal_norm(known.target(tokens, probe.width), probe.batch).log2
    like = replace(probe, width=known.growth.centre["width"])
    low, high = -10.0, 3.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        high, low = (middle, low) if planned(like, tokens, known.growth, 2**middle).log2 > best else (high, middle)
    return Choice((low + high) / 2)


def rules(known: Study, tokens: int, batch: int, width: float, parameters: int) -> dict[str, Choice]:
    """What the study's optimum becomes by other rules; it is that of its longest horizon, at its best batch."""
    last = max(cell.tokens for cell in known.fit.cells)
    there = {cell.batch: cell for cell in known.fit.cells if cell.tokens == last and cell.usable}
    best = min(there.values(), key=lambda cell: cell.loss)
    more, longer, wider = (math.log2(x) for x in (batch / best.batch, tokens / last, parameters / known.parameters))
    law = published("step-law").lr
    two_stage = make_plan(known.fit, tokens, batch, width=width, depth=2, stage="two-stage").lr
    interval = two_stage.interval or (math.nan, math.nan)
    return {
        PLAN: Choice(*map(math.log2, (two_stage.value, *interval))),
        "unchanged": Choice(best.lr.x),
        "unchanged, that of the batch": Choice(there[batch].lr.x if batch in there else math.nan),
        "sqrt(B)": Choice(best.lr.x + 0.5 * more),
        "linear in B": Choice(best.lr.x + more),
        "paper: B^0.62 D^-0.56": Choice(best.lr.x + 0.62 * more - 0.56 * longer),
        "Step Law": Choice(math.log2(law(parameters=parameters, tokens=tokens))),
        "Step Law from the study's optimum": Choice(best.lr.x - 0.713 * wider + 0.307 * longer),
    }


@dataclass(frozen=True)
class Reference:
    """The target's full grid."""

    surface: Surface
    fit: StudyFit
    tokens: int
    parameters: int

    def losses(
        self, values: tuple[float, ...], rates: Sequence[float], where: Sequence[tuple[int, int]]
    ) -> NDArray[Any]:
        """Relative excess of loss at log2 rates, by one draw of the surface."""
        there = dataclasses.replace(self.surface, values=values, draws=())
        found = []
        for rate, (batch, tokens) in zip(rates, where, strict=True):
            best = 2 ** there.optimum(tokens, batch).lr
            found.append(float(there.loss(2**rate, batch, tokens) / there.loss(best, batch, tokens)) - 1)
        return np.array(found)

    def row(self, choices: list[Choice], where: list[tuple[int, int]]) -> dict[str, str]:
        """A method's line of the table, over the targets for which it gives a rate."""
        some = [(choice, each) for choice, each in zip(choices, where, strict=True) if math.isfinite(choice.rate)]
        if not some:
            return {"targets": "0"}
        chosen, targets = zip(*some, strict=True)
        rates = [choice.rate for choice in chosen]
        regret = 100 * self.losses(self.surface.values, rates, targets)
        draws = 100 * np.array([self.losses(draw, rates, targets) for draw in self.surface.draws])
        best = np.array([self.surface.optimum(tokens, batch).lr for batch, tokens in targets])
        off = np.array(rates) - best
        cells = [(rate, self.cell(*each)) for rate, each in zip(rates, targets, strict=True)]
        own = [100 * cell.lr.curvature * (rate - cell.lr.x) ** 2 / cell.lr.y for rate, cell in cells if cell]
        inside = [choice.low <= at <= choice.high for choice, at in zip(chosen, best, strict=True)]
        bounded = all(math.isfinite(choice.low) for choice in chosen)
        return {
            "targets": f"{len(some)}",
            "median": f"{np.median(regret):.3f}",
            "standard error": f"{np.std(np.median(draws, axis=1), ddof=1):.3f}",
            "mean": f"{regret.mean():.3f}",
            "worst": f"{regret.max():.3f}",
            "median by cells": f"{np.median(own):.3f} ({len(own)})" if own else "",
            "octaves off": f"{np.median(np.abs(off)):.2f}",
            "mean octaves": f"{off.mean():+.2f}",
            "in 90%": f"{sum(inside)} of {len(inside)}" if bounded else "",
        }

    def cell(self, batch: int, tokens: int) -> Cell | None:
        """The target's own curve, where it has an optimum."""
        (study,) = self.fit.studies
        cell = self.fit.cell(*study, batch, tokens)
        return cell if cell is not None and cell.usable else None


def reference(runs: list[Run]) -> Reference:
    """Fitted to the full grid."""
    data = columns(runs)
    loss = np.where(data["diverged"], math.nan, data["loss"])
    whole = surface(data["lr"], data["batch"], data["tokens"], loss, run=data["run"], bootstraps=200)
    trained = int(sum(int(data["tokens"][data["run"] == run].max()) for run in set(data["run"])))
    return Reference(whole, fit_table(data), trained, runs[0].parameters or 0)


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([row.get(key, "") for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ways(
    known: Study, probes: Mapping[int, Course], plan: Mapping[str, Any], where: list[tuple[int, int]], parameters: int
) -> dict[str, list[Choice]]:
    """Every way to choose, with its choice for each target (batch, tokens)."""
    found = {
        f"{OURS.rpartition('/')[0]}/{1 / share:.0f}": [by_probe(known, probes[b], d, share, True) for b, d in where]
        for share in plan["fractions"]
    }
    found["one run of 1/8, by its own slope"] = [by_probe(known, probes[b], d, 1 / 8, False) for b, d in where]
    found["best norm and growth of the study, no probe"] = [without_probe(known, probes[b], d) for b, d in where]
    others = [rules(known, d, b, plan["grid"]["width"], parameters) for b, d in where]
    return found | {key: [each[key] for each in others] for key in others[0]}


def report(plan: Mapping[str, Any], folder: Path) -> str:
    """Tables of the ways to choose, and of the targets."""
    grid = finished(configs(plan["grid"], plan, folder), folder)
    whole = reference(grid)
    wanted = [(2**b, 2**d) for b, d in plan["targets"]]
    instead = [(2**b, 2**d) for b, d in plan["instead of 2^20"]]
    reached = {
        b: max(run.tokens for run in grid if run.config["batch"] == b) for b in {r.config["batch"] for r in grid}
    }
    complete = all(tokens <= reached.get(batch, 0) for batch, tokens in wanted)
    where = [each for each in (wanted if complete else instead + wanted) if each[1] <= reached.get(each[0], 0)]
    probes = {run.config["batch"]: course(run) for run in finished(configs(plan["probes"], plan, folder), folder)}
    seeds = len({run.config["seed"] for run in grid})
    head = (
        f"Written by `python -m benchmarks.one_run`. {len(where)} targets of width {plan['grid']['width']}: batches of "
        f"{_span(b for b, _ in where)} tokens by {_span(d for _, d in where)} tokens. Reference: a surface fitted to "
        f"the full grid, {len(grid)} runs, {seeds} seeds, {whole.tokens / 2**20:.1f} Mi tokens; it misses them by "
        f"{whole.surface.residual:.4f} nats. Regret in % of the least loss at the target's batch and tokens; standard "
        "errors from resamples of whole runs."
    )
    parts = ["# A learning rate from one run", head]
    for name, part in plan["studies"].items():
        known = study(finished(configs(part, plan, folder), folder), 2 ** part["horizon"])
        choices = ways(known, probes, plan, where, whole.parameters)
        title = f"## Study {name}{' (primary)' if name == plan['primary'] else ''}"
        spent = sum(max(d for b, d in where if b == batch) / 8 for batch in {b for b, _ in where})
        rows = [{"way": key, **whole.row(chosen, where)} for key, chosen in choices.items()]
        parts += [title, _spent(known, part["width"], whole, spent), markdown(rows)]
        if name == plan["primary"]:
            pairs = zip(where, choices[OURS], choices[PLAN], strict=True)
            parts.append(markdown([_target(whole, *pair) for pair in pairs]))
    return "\n\n".join(parts) + "\n"


def _span(values: Iterable[int]) -> str:
    logs = sorted({round(math.log2(value)) for value in values})
    return f"2^{logs[0]} to 2^{logs[-1]}"


def _spent(known: Study, width: int, whole: Reference, spent: float) -> str:
    size = known.parameters / whole.parameters
    tokens, compute = (spent + share * known.tokens for share in (1.0, size))
    return (
        f"Width {width}, {known.tokens / 2**20:.1f} Mi tokens; probes {spent / 2**20:.2f} Mi. Of the grid's tokens: "
        f"probes {100 * spent / whole.tokens:.1f}%, with the study {100 * tokens / whole.tokens:.1f}%; of its compute "
        f"(parameters x tokens): {100 * compute / whole.tokens:.1f}%. Growth: runs left out are forecast "
        f"{known.growth.scatter:.3f} octaves off from 5% of their tokens, {known.growth.own_scatter:.3f} by their own."
    )


def _target(whole: Reference, where: tuple[int, int], choice: Choice, rule: Choice) -> dict[str, str]:
    best = whole.surface.optimum(where[1], where[0])
    low, high = best.lr_interval or (math.nan, math.nan)
    cell = whole.cell(*where)
    return {
        "batch": f"2^{math.log2(where[0]):g}", "tokens": f"2^{math.log2(where[1]):g}",
        "best by the surface": f"2^{best.lr:.2f} [{low:.2f}, {high:.2f}]",
        "by the cell": f"2^{cell.lr.x:.2f}" if cell else "none",
        "one run": f"2^{choice.rate:.2f} [{choice.low:.2f}, {choice.high:.2f}]",
        "regret %": f"{100 * whole.losses(whole.surface.values, [choice.rate], [where])[0]:.3f}",
        "disco plan": f"2^{rule.rate:.2f} [{rule.low:.2f}, {rule.high:.2f}]",
    }  # fmt: skip


def main() -> None:
    """Runs the steps that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", nargs="+", default=["study", "probes", "grid", "report"])
    parser.add_argument("--seeds", nargs="+", type=int, help="of the grid, to train some first")
    parser.add_argument("--batches", nargs="+", type=int, help="of the grid, log2, likewise")
    parser.add_argument("--horizon", type=int, help="of the grid, log2; a later call goes on from there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = json.loads(TARGETS.read_text(encoding="utf-8"))
    args.folder.mkdir(parents=True, exist_ok=True)
    parts = {"study": list(plan["studies"].values()), "probes": [plan["probes"]], "grid": [plan["grid"]]}
    plan["grid"]["seeds"] = args.seeds or plan["grid"]["seeds"]
    plan["grid"]["batches"] = args.batches or plan["grid"]["batches"]
    plan["grid"]["horizon"] = args.horizon or plan["grid"]["horizon"]
    for step in args.steps:
        for part in parts.get(step, ()):
            train(configs(part, plan, args.folder), args.folder)
    if "report" in args.steps:
        REPORT.write_text(report(json.loads(TARGETS.read_text(encoding="utf-8")), args.folder), encoding="utf-8")
        print(REPORT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
