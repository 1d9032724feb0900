"""The main job from beginning to end: sweep, fit, plan, page, on the embedded text."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import tomllib
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from disco.fit import BOOTSTRAPS, StudyFit, fit_table
from disco.guide import Plan, for_plans, plan
from disco.report import render_fit, render_plan, write_report
from disco.report.text import terminal_width
from disco.runs.reader import read_runs
from disco.runs.schema import DATA
from disco.runs.table import columns
from disco.runs.units import counted, duration
from disco.runs.writer import write_json
from disco.sweep.adaptive.rounds import Entry, run_rounds, scans
from disco.sweep.engines._pool import Pool
from disco.sweep.engines.local import Result, run_study
from disco.sweep.forecast import Forecast, forecast_study
from disco.sweep.places import places_for
from disco.sweep.progress import display
from disco.sweep.record import read_plan
from disco.sweep.study import Study, build_study, check_data, rows
from disco.train.data import prepare


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
        The exit code: 0, 1 if runs failed, 2 if records are damaged, 128 + signal after an interruption.

    Raises:
        UserError: see ``run_study``.
    """
    started = time.monotonic()
    study = load(quick, seed, data, out)
    check_data(study, out / DATA)
    expected = forecast_study(study, out, out / DATA, places_for(study.runs, workers))
    if as_json:
        _event("plan", **dataclasses.asdict(expected) | {"runs": len(study.runs), "left": expected.runs})
    else:
        _announce(study, expected, out)

    def tell(entry: Entry) -> None:
        if as_json:
            _event("round", **dataclasses.asdict(entry))
        else:
            print(entry, flush=True)

    with Pool() as pool:

        def train(plan: Study) -> Result:
            return run_study(plan, out, workers=workers, show=display(as_json), pool=pool)

        result = run_rounds(study, out, train, tell) if study.adaptive else train(study)
    if result.signal is not None:
        if as_json:
            _event("result", out=str(out), **dataclasses.asdict(result))
        else:
            print(f"stopped with {result.waiting} runs left; the same command continues")
        return 128 + result.signal
    records = read_runs(*(out / config.id for config in read_plan(out).runs))  # other records may lie beside these
    fit = fit_table(columns(records.runs), bootstraps=BOOTSTRAPS)
    page = write_report(records, fit, out / "report.html")
    write_json(out / "fit.json", fit.to_dict() | for_plans(records.runs))
    next_plan = plan(fit, 2 * max(item.tokens for item in fit.horizons))
    if as_json:
        files = {"fit": str(out / "fit.json"), "page": str(page), "problems": records.problems}
        _event("result", out=str(out), **dataclasses.asdict(result), plan=next_plan.to_dict(), **files)
    else:
        _show(fit, next_plan)
        print(f"{_outcomes(result)} in {duration(time.monotonic() - started)}. The page: {page.resolve()}")
    for note in (*records.problems, *(() if as_json else (*fit.warnings, *next_plan.warnings))):
        print(f"disco: warning: {note}", file=sys.stderr)
    return 1 if result.failed else 2 if records.problems else 0


def _event(name: str, **fields: Any) -> None:
    print(json.dumps({"event": name, **fields}), flush=True)


def _announce(study: Study, expected: Forecast, out: Path) -> None:
    print("Which learning rate and batch size? A sweep of tiny models on English text.\n")
    if study.adaptive:
        for scan in scans(study):
            print(f"  {scan}")
        what = f"each round of runs follows from those before; at most {counted(expected.tokens)} tokens"
    else:
        for row in rows(study):
            print("  {model}, batch {batch}, learning rates {learning rates}, to {horizon} tokens".format(**row))
        done = len(study.runs) - expected.runs
        runs = f"{len(study.runs)} runs{f' ({done} already done)' if done else ''}"
        what = f"{runs} in {expected.cohorts} cohorts, {counted(study.tokens)} tokens"
    print(f"\n  {what}, {expected.workers} processes; expected: {duration(expected.seconds)}")
    print(f"  records in {out}; stop with Ctrl-C, the same command continues\n", flush=True)


def load(quick: bool, seed: int, data: Sequence[str], out: Path) -> Study:
    """The demo's study with its data prepared in ``out``."""
    text = resources.files("disco.studies").joinpath("quick.toml" if quick else "demo.toml").read_text()
    table = tomllib.loads(text)
    table["base"]["seed"] = seed
    return build_study(table, partial(prepare, cache=out / DATA, source=data))


def _show(fit: StudyFit, next_plan: Plan) -> None:
    """As ``disco fit`` and ``disco plan`` do."""
    width = terminal_width()
    print(f"\n{render_fit(fit, width)}")
    print(f"\n\nFor a run of twice the tokens:\n\n{render_plan(next_plan, width)}\n", flush=True)


def _outcomes(result: Result) -> str:
    counts = {"finished": result.finished, "diverged": result.diverged, "pruned": result.pruned}
    counts |= {"failed": len(result.failed)}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "finished")
