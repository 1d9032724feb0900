"""Does ``disco watch`` tell a wrong learning rate, where a full grid says what is wrong?

    python -m benchmarks.flags FOLDER

FOLDER is that of ``benchmarks.one_run``, trained. The plans come from its study of width 32, the runs are its grid of
width 64, and the truth is the optimum of a surface fitted to that whole grid (3 seeds). Each run is looked at early, as
a run to each of the targets' horizons. Then the same runs again with logs that lie: whatever rate a run really had, its
record says the planned one, as after a mistake in a schedule or a ratio. Writes ``flags.md`` beside this file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from benchmarks.one_run import TARGETS, configs, finished, markdown, reference

from disco.fit import BOOTSTRAPS, StudyFit, fit_table
from disco.guide import Check, Plan, check
from disco.guide import plan as make_plan
from disco.guide._course import Course, course
from disco.runs.reader import Run
from disco.runs.table import columns, families

RESULTS = Path(__file__).with_name("flags.md")
FRACTIONS = (0.02, 0.05, 0.2)
RIGHT, WRONG = 0.5, 1.0
"""Octaves from the optimum."""


@dataclass(frozen=True)
class Look:
    """One look at one run as one to a horizon."""

    study: str
    lies: bool
    fraction: float
    truth: float
    """Octaves of the run's rate from the grid's optimum, or with lying logs from the planned rate, which they say."""
    check: Check

    @property
    def off(self) -> float:
        """The product's estimate of ``truth``."""
        return self.check.octaves.octaves if self.check.octaves else math.nan


def plans(
    runs: Sequence[Run], last: int, targets: Iterable[tuple[int, int]], width: float
) -> dict[tuple[int, int], Plan]:
    """``disco plan`` for each target (batch, tokens), from the study's runs up to ``last`` tokens."""
    data = columns(runs)
    fit: StudyFit = fit_table(
        {name: values[data["tokens"] <= last] for name, values in data.items()}, bootstraps=BOOTSTRAPS
    )
    pairs = zip(runs, families(runs), strict=True)
    known = [course(run, family).until(last) for run, family in pairs]
    return {(b, d): make_plan(fit, d, b, width=width, depth=2, courses=known) for b, d in targets}


def lying(run: Course, rate: float) -> Course:
    """The same norms, with the record of a run at ``rate``."""
    scale = rate / run.rate
    return replace(run, rate=rate, lr=run.lr * scale, path=run.path * scale)


def looks(study: str, of: Plan, run: Course, best: float) -> Iterable[Look]:
    """All looks at a run as one to the plan's horizon; ``best`` is log2 of the grid's best rate."""
    run = replace(run, horizon=float(of.tokens)).until(of.tokens)
    for lies in (False, True):
        seen = lying(run, of.lr.value) if lies else run
        truth = math.log2(run.rate / of.lr.value) if lies else math.log2(run.rate) - best
        for fraction in FRACTIONS:
            yield Look(study, lies, fraction, truth, check(seen.until(fraction * of.tokens), of))


def row(found: Sequence[Look]) -> dict[str, str]:
    """What was said of runs that are wrong, right, and between."""
    cells = {}
    groups = {
        "an octave or more off": [look for look in found if abs(look.truth) >= WRONG],
        "within half an octave": [look for look in found if abs(look.truth) <= RIGHT],
        "between": [look for look in found if RIGHT < abs(look.truth) < WRONG],
    }
    for name, group in groups.items():
        right = [look.check.verdict == "off course" and look.off * look.truth > 0 for look in group]
        unknown = [look.check.verdict == "cannot tell" for look in group]
        shares = [f"{np.mean(each):.0%}" for each in (right, unknown)] if group else []
        cells[name] = f"{len(group)}"
        cells[f"{name}: flagged / cannot tell"] = " / ".join(shares)
    errors = [abs(look.off - look.truth) for look in found if math.isfinite(look.off)]
    cells["distance: error, median octaves"] = f"{np.median(errors):.2f}" if errors else ""
    return cells


def flat(look: Look) -> dict[str, object]:
    """For other questions to the same looks."""
    found, ahead = look.check, look.check.forecast
    return {
        "study": look.study, "lies": look.lies, "from": look.fraction, "truth": look.truth, "off": look.off,
        "verdict": found.verdict, "reasons": found.reasons, "source": ahead.source if ahead else "",
        "norm": [ahead.low, ahead.log2, ahead.high] if ahead else None,
        "target": [found.target.low, found.target.log2, found.target.high] if found.target else None,
        "octaves": [found.octaves.low, found.octaves.octaves, found.octaves.high] if found.octaves else None,
    }  # fmt: skip


def main(folder: Path) -> None:
    """Looks at every run and writes the table."""
    plan = json.loads(TARGETS.read_text(encoding="utf-8"))
    grid = finished(configs(plan["grid"], plan, folder), folder)
    whole = reference(grid)
    reached: dict[int, int] = {}
    for run in grid:
        reached[run.config["batch"]] = min(run.tokens, reached.get(run.config["batch"], run.tokens))
    every = {(2**b, 2**d) for b, d in plan["targets"] + plan["instead of 2^20"]}
    targets = sorted((b, d) for b, d in every if d <= reached[b])
    found = []
    for name, part in plan["studies"].items():
        runs = finished(configs(part, plan, folder), folder)
        for (batch, tokens), of in plans(runs, 2 ** part["horizon"], targets, plan["grid"]["width"]).items():
            best = whole.surface.optimum(tokens, batch).lr
            print(
                f"{name}: B {batch} D {tokens}: planned 2^{math.log2(of.lr.value):.2f}, best 2^{best:.2f}", flush=True
            )
            own = [course(run) for run in grid if run.config["batch"] == batch]
            found += [look for run in own for look in looks(name, of, run, best)]
    (folder / "flags.json").write_text(json.dumps([flat(look) for look in found]))
    rows = [
        {"study": study, "record": "says the planned rate" if lies else "true", "from": f"{fraction:.0%}",
         **row([look for look in found if (look.study, look.lies, look.fraction) == (study, lies, fraction)])}
        for study in plan["studies"] for lies in (False, True) for fraction in FRACTIONS
    ]  # fmt: skip
    about = (
        f"Written by `python -m benchmarks.flags`. {len(grid)} runs of width {plan['grid']['width']} as runs to "
        f"{len(targets)} targets, against plans from studies of half the width. With a true record, octaves are from "
        "the optimum of the surface over the whole grid; with one that says the planned rate, from that."
    )
    RESULTS.write_text("\n\n".join(["# Wrong learning rates, flagged early", about, markdown(rows)]) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
