"""``disco sweep run`` and ``disco sweep status``; ``_cluster`` has what concerns schedulers."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from disco.cli import _cluster, _show
from disco.integrations.follow import following
from disco.runs.lock import LOCK, holder
from disco.runs.reader import read_run
from disco.runs.schema import CONFIG, DATA
from disco.runs.units import counted, duration
from disco.sweep.adaptive.rounds import Entry, read_rounds, run_rounds, scans
from disco.sweep.engines.local import Result
from disco.sweep.folder import check_folder
from disco.sweep.forecast import Forecast, forecast_study
from disco.sweep.places import places_for
from disco.sweep.progress import display
from disco.sweep.record import outcome, read_plan
from disco.sweep.study import Study, check_data, load_study, new_tokens, rows
from disco.train.config import TrainConfig, to_dict
from disco.train.data import prepare


def run(
    path: Path,
    data: Sequence[str],
    out: Path | None,
    engine: str,
    workers: int | None,
    track: str,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Runs or shows a study; exit code 1 when runs failed, 128 + signal when interrupted."""
    out = out or Path("runs") / _name(path)
    if dry_run:
        with tempfile.TemporaryDirectory() as cache:
            study = load_study(path, partial(prepare, cache=Path(cache), source=data), engine)
            check_data(study, Path(cache))
            local = engine == "local"
            expected = forecast_study(study, out, Path(cache), places_for(study.runs, workers)) if local else None
        _plan(study, as_json, expected)
        return 0
    study = load_study(path, partial(prepare, cache=out / DATA, source=data), engine)
    study = dataclasses.replace(study, notes=(*study.notes, *check_folder(study, out)))
    check_data(study, out / DATA)
    if not as_json:
        _plan(study, as_json)
    with following(out, track), _cluster.engine(engine, path) as run_study:

        def train(plan: Study) -> Result:
            return run_study(plan, out, workers=workers, show=display(as_json))

        result = run_rounds(study, out, train, partial(_round, as_json=as_json)) if study.adaptive else train(study)
    again = ["disco", "sweep", "run", str(path), "--out", str(out), *(("--data", *data) if data else ())]
    again += ["--engine", engine] if engine != "local" else []
    again += ["--track", track] if track else []
    return _ended(result, out, shlex.join(again), as_json)


def _name(path: Path) -> str:
    """The study's name, for its folder; whatever is wrong with the file is reported when it is loaded."""
    try:
        name = tomllib.loads(path.read_text(encoding="utf-8")).get("name")
    except (OSError, ValueError):
        name = None
    return name if isinstance(name, str) and name else path.stem


def _plan(study: Study, as_json: bool, expected: Forecast | None = None) -> None:
    more = {"forecast": dataclasses.asdict(expected)} if expected else {}
    if study.adaptive:
        _adaptive_plan(study, as_json, more)
    elif as_json:
        runs = [{"id": config.id, "config": to_dict(config)} for config in study.runs]
        _show.document({"name": study.name, "tokens": study.tokens, "notes": study.notes, "runs": runs} | more)
    else:
        _show.table(rows(study), f"study {study.name}: {len(study.runs)} runs, {counted(study.tokens)} tokens")
    for note in study.notes if not as_json else ():
        print(f"note: {note}")
    if expected and not as_json:
        what = "for the budget" if study.adaptive else f"{expected.runs} runs in {expected.cohorts} cohorts"
        print(f"left to do: {what}, {counted(expected.tokens)} tokens")
        memory = f"{expected.memory / 2**30:.1f} GB of memory at most"
        where = f" on {expected.gpus} GPUs" if expected.gpus else ""
        print(f"expected: {duration(expected.seconds)} with {expected.workers} processes{where}, {memory}")


def _adaptive_plan(study: Study, as_json: bool, more: dict[str, Any]) -> None:
    """What an adaptive study may do; which runs it will need is not known beforehand."""
    settings, every = study.adaptive, scans(study)
    assert settings is not None
    budget = sum(scan.space.budget for scan in every)
    if as_json:
        spaces = {scan.name: dataclasses.asdict(scan.space) for scan in every}
        _show.document({"name": study.name, "tokens": budget, "notes": study.notes, "adaptive": spaces} | more)
        return
    wanted = {"eta": "the best learning rate", "norm": "the best norm", "plan": "the plan"}[settings.quantity]
    aim = f"until {wanted} is known to {settings.width:g} octaves"
    print(f"study {study.name}: adaptive, at most {counted(budget)} tokens, {aim}")
    for scan in every:
        print(scan)


def _round(entry: Entry, as_json: bool) -> None:
    if as_json:
        _show.event("round", **dataclasses.asdict(entry))
    else:
        print(entry, flush=True)


def _ended(result: Result, out: Path, again: str, as_json: bool) -> int:
    if as_json:
        _show.event("result", out=out, **dataclasses.asdict(result))
    elif result.signal is not None:
        print(f"stopped with {result.waiting} runs left; to continue: {again}")
    else:
        pruned = f"{result.pruned} pruned, " if result.pruned else ""
        print(f"{result.finished} finished, {result.diverged} diverged, {pruned}{len(result.failed)} failed: {out}")
    for run, reason in result.failed.items() if not as_json else ():
        print(f"failed {run}: {reason}")
    if result.signal is not None:
        return 128 + result.signal
    return 1 if result.failed else 0


def status(out: Path, as_json: bool) -> int:
    """Shows how far each run of a sweep is."""
    study = read_plan(out)
    states = _cluster.with_jobs([_state(config, out) for config in study.runs], out)
    running = holder(out / LOCK)
    rounds = read_rounds(out)
    if as_json:
        also = {"rounds": [dataclasses.asdict(entry) for entry in rounds]} if rounds else {}
        _show.document({"name": study.name, "process": running, "runs": states} | also)
        return 0
    for entry in rounds:
        _round(entry, as_json=False)
    counts = {state: sum(s["state"] == state for s in states) for state in dict.fromkeys(s["state"] for s in states)}
    done = sum(state["tokens"] for state in states)
    print(f"study {study.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    print(f"{counted(done)} of {counted(study.tokens)} tokens; " + (f"process {running}" if running else "not running"))
    _show.table([{key: str(value) for key, value in s.items()} for s in states if s["state"] != "finished"])
    return 0


def _state(config: TrainConfig, out: Path) -> dict[str, Any]:
    ended = outcome(config, out)
    folder = out / config.id
    known = read_run(folder) if (folder / CONFIG).exists() else None
    state = str(ended) if ended else "waiting"
    if ended is None and known is not None:
        state = "running" if holder(folder / LOCK) else str(known.outcome or "interrupted")
        state = "to continue" if state == "finished" else state
    before = config.horizon - new_tokens(config)
    tokens = new_tokens(config) if ended == "finished" else max(0, known.tokens - before) if known else 0
    reason = known.summary.get("reason", "") if known and known.summary and state != "finished" else ""
    return {"run": config.id, "state": state, "tokens": tokens, "of": new_tokens(config), "reason": reason}
