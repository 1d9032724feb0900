"""Trains the runs of a study on this machine: a process on each GPU or core, each taking a cohort at a time.

The state of a sweep is in its run records alone, so that it can be killed anywhere and started again. No torch here:
only the workers import it, once each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from disco.errors import UserError
from disco.runs.lock import LOCK, locked
from disco.runs.schema import DATA
from disco.sweep.engines._course import DEATHS, STARTS, Course, Result, signals
from disco.sweep.engines._pool import WORKER, Pool, Worker
from disco.sweep.places import Places, places_for
from disco.sweep.progress import Display, display
from disco.sweep.record import LOG, refuse_other_jobs, write_plan
from disco.sweep.study import Study, check_data

STOP_SECONDS = 60.0
"""How long workers may take to leave their runs after Ctrl-C."""


def run_study(
    study: Study,
    out: Path,
    *,
    workers: int | None = None,
    show: Display | None = None,
    command: Sequence[str] = WORKER,
    pool: Pool | None = None,
) -> Result:
    """Trains all runs of a study that are not done yet.

    Args:
        study: the plan; its data are prepared in ``out / "data"``.
        out: folder of the run records; made if needed.
        workers: processes; by default one per GPU, or one per core, that this process may use (``sweep.places``).
        show: where progress goes.
        command: the worker's command line; see ``disco.sweep.worker`` for what it has to speak.
        pool: keeps the workers for the next call, as rounds of an adaptive study want; ``command`` is then the pool's.

    Raises:
        UserError: the data do not last for a run, another sweep runs in ``out``, it cannot be written (a NoSpaceError
            if the disk is full: the runs can be continued), or workers do not start.
    """
    check_data(study, out / DATA)
    with locked(out / LOCK, wait=1.0):  # `disco sweep status` tries the lock for an instant
        refuse_other_jobs(out, "local")
        write_plan(study, out)
        with signals() as received, show or display() as shown:
            places = places_for(study.runs, workers)
            with nullcontext(pool) if pool else Pool(command) as crew:
                return _Sweep(study, out, places, shown, crew).run(received)


class _Sweep(Course):
    def __init__(self, study: Study, out: Path, places: Places, shown: Display, pool: Pool) -> None:
        super().__init__(study, out, places.workers, places.memory, shown)
        self.places, self.pool = places, pool
        self.stopping = False

    def run(self, received: list[int]) -> Result:
        """Keeps all workers busy until every run has ended or a signal is received."""
        with (self.out / LOG).open("ab") as log:
            while not received and not self.full and self.unfinished():
                self.give_up_branches()
                self._assign(log)
                self._listen()
                self.show(len(self.pool.workers))
            if received or self.full:
                self._stop(received)
        self.show(len(self.pool.workers))
        return self.result(received)

    def _assign(self, log: IO[bytes]) -> None:
        """Starts as many workers as there is work for, and gives the idle ones their next job."""
        ready = self.ready()
        busy = sum(worker.job is not None for worker in self.pool.workers)
        while len(self.pool.workers) < min(self.places.workers, busy + len(ready)):
            self.pool.start(log, self.places.gpus)
        idle = [worker for worker in self.pool.workers if worker.ready and worker.job is None]
        for worker, job in zip(idle, ready, strict=False):
            worker.job = job
            job.start()
            worker.send(**job.order(self.out))

    def _listen(self) -> None:
        for worker, messages in self.pool.heard(timeout=0.25):
            if messages is None:
                self._bury(worker)
            for message in messages or ():
                self._heed(worker, message)

    def _heed(self, worker: Worker, message: dict[str, Any]) -> None:
        job = worker.job
        if message["event"] == "ready":
            worker.ready, self.failed_starts = True, 0
        elif job is not None:
            self.heed(job, message)
            if not job.running:
                worker.job = None

    def _bury(self, worker: Worker) -> None:
        """A worker died: its job goes back to the others, unless it has killed too many."""
        code = worker.close(patience=5.0)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= STARTS:
                raise UserError(f"workers die when they start ({how}); the reason is in {self.out / LOG}")
        job = worker.job
        if job is None:
            return
        job.running = False
        if self.stopping or not job.left:
            return
        job.deaths += 1
        if job.deaths >= DEATHS:
            self.take_apart(job, f"its worker died {DEATHS} times, last by {how}; see {LOG}")
        else:
            self.shown.say(f"the worker of {job} died ({how}); another one resumes it")

    def _stop(self, received: list[int]) -> None:
        """Has the workers leave their runs with a checkpoint; at once on a second signal."""
        self.stopping = True
        self.shown.say("stopping: the workers write checkpoints (again Ctrl-C: at once)")
        for worker in self.pool.workers:
            worker.send(stop=True)
        deadline = time.monotonic() + STOP_SECONDS
        while any(worker.job for worker in self.pool.workers) and len(received) < 2 and time.monotonic() < deadline:
            self._listen()
