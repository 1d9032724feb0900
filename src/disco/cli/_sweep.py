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
from disco.runs.lock import LOCK, holder
from disco.runs.reader import read_run
from disco.runs.schema import CONFIG, DATA
from disco.runs.units import short
from disco.sweep.engines.local import Result
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
    dry_run: bool,
    as_json: bool,
) -> int:
    """Runs or shows a study; exit code 1 when runs failed, 128 + signal when interrupted."""
    if dry_run:
        with tempfile.TemporaryDirectory() as cache:
            study = load_study(path, partial(prepare, cache=Path(cache), source=data))
            check_data(study, Path(cache))
        _plan(study, as_json)
        return 0
    out = out or Path("runs") / _name(path)
    study = load_study(path, partial(prepare, cache=out / DATA, source=data))
    check_data(study, out / DATA)
    if not as_json:
        _plan(study, as_json)
    run_study = _cluster.engine(engine, path)
    result = run_study(study, out, workers=workers, show=display(as_json))
    again = ["disco", "sweep", "run", str(path), "--out", str(out), *(("--data", *data) if data else ())]
    again += ["--engine", engine] if engine != "local" else []
    return _ended(result, out, shlex.join(again), as_json)


def _name(path: Path) -> str:
    """The study's name, for its folder; whatever is wrong with the file is reported when it is loaded."""
    try:
        name = tomllib.loads(path.read_text(encoding="utf-8")).get("name")
    except (OSError, ValueError):
        name = None
    return name if isinstance(name, str) and name else path.stem


def _plan(study: Study, as_json: bool) -> None:
    if as_json:
        runs = [{"id": config.id, "config": to_dict(config)} for config in study.runs]
        _show.document({"name": study.name, "tokens": study.tokens, "notes": study.notes, "runs": runs})
        return
    _show.table(rows(study), f"study {study.name}: {len(study.runs)} runs, {short(study.tokens)} tokens")
    for note in study.notes:
        print(f"note: {note}")


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
    if as_json:
        _show.document({"name": study.name, "process": running, "runs": states})
        return 0
    counts = {state: sum(s["state"] == state for s in states) for state in dict.fromkeys(s["state"] for s in states)}
    done = sum(state["tokens"] for state in states)
    print(f"study {study.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    print(f"{short(done)} of {short(study.tokens)} tokens; " + (f"process {running}" if running else "not running"))
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
