"""The main job from beginning to end: sweep, fit, plan, page, on the embedded text."""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path

from disco.fit import StudyFit, fit_table
from disco.guide import Plan, plan
from disco.report import render_optima, render_plan, render_rules, write_report
from disco.runs.reader import read_runs
from disco.runs.schema import DATA
from disco.runs.table import cells
from disco.runs.units import duration, short
from disco.runs.writer import write_json
from disco.sweep.engines.local import Result, run_study
from disco.sweep.progress import display
from disco.sweep.study import Study, build_study, new_tokens, rows
from disco.train.calibrate import tokens_per_second
from disco.train.data import prepare

EVALUATION = 1.15
"""Time with evaluations over time without (measured, docs/log.md)."""

START_SECONDS = 6.0
"""Start of the workers, fit and page."""


def run(
    *,
    quick: bool = False,
    seed: int = 0,
    data: Sequence[str] = (),
    out: Path = Path("demo-runs"),
    workers: int | None = None,
    as_json: bool = False,
) -> int:
    """Trains the demo's study in ``out``, or continues it, and prints what it says.

    Args:
        quick: the study of one minute instead of the one of ten.
        seed: of weights and order of the data.
        data: files and folders of text in place of the embedded one.
        out: folder for records, fit and page.
        workers: processes; one per core if not given.
        as_json: lines of JSON instead of text: a plan, progress, and the result.

    Returns:
        The exit code: 0, 1 if runs failed, 128 + signal after an interruption.

    Raises:
        UserError: see ``run_study``.
    """
    started = time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    study = load(quick, seed, data, out)
    seconds = expected_seconds(study, out, workers)
    if as_json:
        print(json.dumps({"event": "plan", "runs": len(study.runs), "tokens": study.tokens, "seconds": seconds}))
    else:
        _announce(study, out, workers, seconds)
    result = run_study(study, out, workers=workers, show=display(as_json))
    if result.signal is not None:
        print(f"stopped with {result.waiting} runs left; the same command continues")
        return 128 + result.signal
    records = read_runs(out)
    table = cells(records.runs)
    fit = fit_table({name: table[name].to_numpy() for name in table.columns})
    page = write_report(records, fit, out / "report.html")
    write_json(out / "fit.json", fit.to_dict())
    next_plan = plan(fit, 2 * max(item.tokens for item in fit.horizons))
    if as_json:
        print(
            json.dumps(
                {"event": "result", "plan": next_plan.to_dict(), "fit": str(out / "fit.json"), "page": str(page)}
            )
        )
    else:
        _show(fit, next_plan)
        print(f"{_outcomes(result)} in {duration(time.monotonic() - started)}. The page: {page.resolve()}")
    return 1 if result.failed else 0


def _announce(study: Study, out: Path, workers: int, seconds: float) -> None:
    print("Which learning rate and batch size? A sweep of tiny models on English text.\n")
    for row in rows(study):
        print("  {model}, batch {batch}, learning rates {learning rates}, to {horizon} tokens".format(**row))
    print(
        f"\n  {len(study.runs)} runs, {short(study.tokens)} tokens, {workers} processes; expected: {duration(seconds)}"
    )
    print(f"  records in {out}; stop with Ctrl-C, the same command continues\n", flush=True)


def load(quick: bool, seed: int, data: Sequence[str], out: Path) -> Study:
    """The demo's study with its data prepared in ``out``."""
    text = resources.files("disco.studies").joinpath("quick.toml" if quick else "demo.toml").read_text()
    table = tomllib.loads(text)
    table["base"]["seed"] = seed
    return build_study(table, partial(prepare, cache=out / DATA, source=data))


def expected_seconds(study: Study, out: Path, workers: int) -> float:
    """Time that the whole study takes, from a few steps of each kind of run."""
    kinds = {(config.model, config.batch): config for config in study.runs}
    speeds = tokens_per_second(list(kinds.values()), out / DATA, workers)
    speed = dict(zip(kinds, speeds, strict=True))
    work = sum(new_tokens(config) / speed[config.model, config.batch] for config in study.runs)
    return START_SECONDS + EVALUATION * work / workers


def _show(fit: StudyFit, next_plan: Plan) -> None:
    print("\nThe optimum for each number of tokens:\n")
    print(render_optima(fit))
    print(render_rules(fit, next_plan.family, next_plan.model))
    print("\nFor a run of twice the tokens:\n")
    print(render_plan(next_plan))


def _outcomes(result: Result) -> str:
    counts = {"finished": result.finished, "diverged": result.diverged, "failed": len(result.failed)}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "finished")
