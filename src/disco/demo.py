"""The main job from beginning to end: sweep, fit, plan, page, on the embedded text."""

from __future__ import annotations

import os
import time
import tomllib
from functools import partial
from importlib import resources
from pathlib import Path

from disco.errors import UserError
from disco.fit import StudyFit, fit_table
from disco.guide import plan
from disco.report import render_optima, render_plan, render_rules, write_report
from disco.runs.reader import read_runs
from disco.runs.schema import DATA
from disco.runs.table import cells
from disco.runs.units import short
from disco.runs.writer import write_json
from disco.sweep.engines.local import Result, run_study
from disco.sweep.progress import display, duration
from disco.sweep.study import Study, build_study, new_tokens
from disco.train.data import prepare

SHARED_CORES = 1.15
"""How much longer a step takes with all cores busy than in the calibration (measured, docs/log.md)."""

START_SECONDS = 6.0
"""Start of the workers, fit and page."""


def run(*, quick: bool = False, seed: int = 0, out: Path = Path("demo-runs"), workers: int | None = None) -> int:
    """Trains the demo's study in ``out``, or continues it, and prints what it says.

    Args:
        quick: the study of one minute instead of the one of ten.
        seed: of weights and order of the data.
        out: folder for records, fit and page.
        workers: processes; one per core if not given.

    Returns:
        The exit code: 0, 1 if runs failed, 128 + signal after an interruption.

    Raises:
        UserError: see ``run_study``.
    """
    started = time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    study = load(quick, seed, out)
    seconds = expected_seconds(study, out, workers)
    print("Which learning rate and batch size? A sweep on English text (docs: README.md).\n")
    print(f"  {len(study.runs)} runs, {short(study.tokens)} tokens, {workers} processes; expected: {duration(seconds)}")
    print(f"  records in {out}; stop with Ctrl-C, the same command continues\n")
    result = run_study(study, out, workers=workers, show=display(False))
    if result.signal is not None:
        print(f"stopped with {result.waiting} runs left; the same command continues")
        return 128 + result.signal
    fit = _fit(out)
    page = _show(fit, out)
    print(f"{_outcomes(result)} in {duration(time.monotonic() - started)}. The page: {page.resolve()}")
    return 1 if result.failed else 0


def load(quick: bool, seed: int, out: Path) -> Study:
    """The demo's study with its data prepared in ``out``."""
    text = resources.files("disco.studies").joinpath("quick.toml" if quick else "demo.toml").read_text()
    table = tomllib.loads(text)
    table["base"]["seed"] = seed
    return build_study(table, partial(prepare, cache=out / DATA))


def expected_seconds(study: Study, out: Path, workers: int) -> float:
    """Time that the whole study takes, from a few steps of each kind of run."""
    from disco.train.calibrate import tokens_per_second

    kinds = {(config.model, config.batch): config for config in study.runs}
    speed = {kind: tokens_per_second(config, out / DATA) for kind, config in kinds.items()}
    work = sum(new_tokens(config) / speed[config.model, config.batch] for config in study.runs)
    return START_SECONDS + SHARED_CORES * work / workers


def _fit(out: Path) -> StudyFit:
    found = read_runs(out)
    for problem in found.problems:
        print(f"warning: {problem}")
    table = cells(found.runs)
    return fit_table({name: table[name].to_numpy() for name in table.columns})


def _show(fit: StudyFit, out: Path) -> Path:
    """Prints optima, rules and the plan for the next horizon; writes fit.json and the page."""
    page = out / "report.html"
    write_json(out / "fit.json", fit.to_dict())
    write_report(read_runs(out), fit, page)
    print("\nThe optimum for each number of tokens:\n")
    print(render_optima(fit))
    print(render_rules(fit))
    if not fit.horizons:
        raise UserError(f"no horizon of {out} has enough runs to tell an optimum")
    model = fit.horizons[0].model
    tokens = 2 * max(item.tokens for item in fit.horizons if item.model == model)
    print("\nFor a run of twice the tokens:\n")
    print(render_plan(plan(fit, tokens, model=model)))
    return page


def _outcomes(result: Result) -> str:
    counts = {"finished": result.finished, "diverged": result.diverged, "failed": len(result.failed)}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "finished")
