"""What ``disco sweep`` does with schedulers: choose one, show its jobs, and ``disco sweep cancel``."""

from __future__ import annotations

import os
import signal
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from disco.cli import _show
from disco.errors import UserError
from disco.runs.lock import LOCK, holder
from disco.runs.schema import Outcome
from disco.sweep.engines import cluster, local
from disco.sweep.engines._pool import Pool
from disco.sweep.engines._queue import JobState
from disco.sweep.engines.queues import queue_of
from disco.sweep.record import outcome, read_plan, read_queued

STOP_SECONDS = local.STOP_SECONDS + 10
OVER = {str(ended) for ended in Outcome} - {str(Outcome.FAILED)}


@contextmanager
def engine(name: str, study: Path) -> Iterator[Callable[..., local.Result]]:
    """``run_study`` of an engine, with the settings in the study file; local workers live as long as the context."""
    if name == "local":
        with Pool() as pool:
            yield partial(local.run_study, pool=pool)
    else:
        table = tomllib.loads(study.read_text(encoding="utf-8"))
        yield partial(cluster.run_study, queue=queue_of(name, table.get(name, {})))


def with_jobs(states: Sequence[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Runs as they stand, and what the scheduler says of the job that each is in."""
    queued = read_queued(out)
    if queued is None:
        return list(states)
    try:
        jobs = queue_of(queued.engine, queued.settings).states(queued.jobs)
    except UserError as error:
        _show.warn([f"{error}; the states of {len(queued.jobs)} jobs are unknown"])
        return list(states)
    by_run = {run: jobs[key] for key, runs in queued.jobs.items() if key in jobs for run in runs}
    return [state | _job(state, by_run.get(state["run"])) for state in states]


def _job(state: dict[str, Any], job: JobState | None) -> dict[str, Any]:
    if job is None or state["state"] in OVER:
        return {"job": "", "scheduler": "", "requeues": ""}
    known = {"job": job.id, "scheduler": job.word, "requeues": job.requeues}
    return known | ({"state": str(job.phase), "reason": job.reason} if job.live else {})


def cancel(out: Path, as_json: bool) -> int:
    """Stops a sweep: its jobs, and the process that trains it or watches them."""
    study = read_plan(out)
    queued = read_queued(out)
    if queued is None:
        jobs, stopped = 0, _stop(out)
    else:
        jobs, stopped = cluster.cancel(out, queue_of(queued.engine, queued.settings)), True
    left = sum(outcome(config, out) is None for config in study.runs)
    if as_json:
        _show.document({"name": study.name, "stopped": stopped, "jobs": jobs, "left": left})
    else:
        what = f"{jobs} jobs cancelled" if jobs else "stopped" if stopped else "nothing to stop"
        print(f"study {study.name}: {what}, {left} runs left")
    return 0


def _stop(out: Path) -> bool:
    """Has the process that trains the sweep leave it with checkpoints; False if there is none."""
    process = holder(out / LOCK)
    if process is None:
        return False
    if not _holds(process, out / LOCK):
        raise UserError(f"process {process} on another machine trains the sweep in {out}; cancel it there")
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while holder(out / LOCK) is not None:
        if time.monotonic() > deadline:
            raise UserError(f"process {process} has not stopped within {STOP_SECONDS:g} seconds")
        time.sleep(0.1)
    return True


def _holds(process: int, lock: Path) -> bool:
    """Whether a process of this machine has the lock file open: the number may be that of another machine's."""
    try:
        return any(descriptor.resolve() == lock.resolve() for descriptor in Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False
