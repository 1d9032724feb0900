"""Trains the runs of a study on this machine: one process with one thread per core, each taking a cohort at a time.

The state of a sweep is in its run records alone, so that it can be killed anywhere and started again. No torch here:
only the workers import it, once each.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from disco.errors import UserError
from disco.runs.lock import LOCK, locked
from disco.runs.schema import DATA
from disco.sweep.cohorts import memory_to_use
from disco.sweep.engines._course import DEATHS, STARTS, Course, Result, signals
from disco.sweep.engines._jobs import Job
from disco.sweep.progress import Display, display
from disco.sweep.record import LOG, refuse_other_jobs, write_plan
from disco.sweep.study import Study, check_data
from disco.train.calibrate import environment

WORKER = (sys.executable, "-m", "disco.sweep.worker")
STOP_SECONDS = 60.0
"""How long workers may take to leave their runs after Ctrl-C."""


def run_study(
    study: Study,
    out: Path,
    *,
    workers: int | None = None,
    show: Display | None = None,
    command: Sequence[str] = WORKER,
) -> Result:
    """Trains all runs of a study that are not done yet.

    Args:
        study: the plan; its data are prepared in ``out / "data"``.
        out: folder of the run records; made if needed.
        workers: processes; by default one per core that this process may use.
        show: where progress goes.
        command: the worker's command line; see ``disco.sweep.worker`` for what it has to speak.

    Raises:
        UserError: the data do not last for a run, another sweep runs in ``out``, it cannot be written (a NoSpaceError
            if the disk is full: the runs can be continued), or workers do not start.
    """
    check_data(study, out / DATA)
    with locked(out / LOCK, wait=1.0):  # `disco sweep status` tries the lock for an instant
        refuse_other_jobs(out, "local")
        write_plan(study, out)
        with signals() as received, show or display() as shown:
            workers = workers or len(os.sched_getaffinity(0))
            return _Sweep(study, out, workers, shown, tuple(command)).run(received)


class _Worker:
    """A worker process, the job that it is at, and what it said."""

    def __init__(self, command: tuple[str, ...], log: IO[bytes]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(), bufsize=0
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.inbox, self.outbox = self.process.stdin, self.process.stdout
        self.job: Job | None = None
        self.ready = False
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Sends a message; a dead worker is noticed when its output ends."""
        with suppress(BrokenPipeError):
            self.inbox.write(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None once the process has died."""
        data = os.read(self.outbox.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self, patience: float = 0.0) -> int:
        """Waits ``patience`` seconds for the process to end, ends it if it has not, and returns its exit code."""
        self.inbox.close()
        self.outbox.close()
        try:
            return self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class _Sweep(Course):
    def __init__(self, study: Study, out: Path, workers: int, shown: Display, command: tuple[str, ...]) -> None:
        super().__init__(study, out, workers, memory_to_use(), shown)
        self.most, self.command = workers, command
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.stopping = False

    def run(self, received: list[int]) -> Result:
        """Keeps all workers busy until every run has ended or a signal is received."""
        with (self.out / LOG).open("ab") as log:
            try:
                while not received and not self.full and self.unfinished():
                    self.give_up_branches()
                    self._assign(log)
                    self._listen()
                    self.show(len(self.workers))
                if received or self.full:
                    self._stop(received)
            finally:
                for worker in self.workers:
                    worker.close()
                self.selector.close()
        self.show(len(self.workers))
        return self.result(received)

    def _assign(self, log: IO[bytes]) -> None:
        """Starts as many workers as there is work for, and gives the idle ones their next job."""
        ready = self.ready()
        busy = sum(worker.job is not None for worker in self.workers)
        while len(self.workers) < min(self.most, busy + len(ready)):
            worker = _Worker(self.command, log)
            self.workers.append(worker)
            self.selector.register(worker.outbox, selectors.EVENT_READ, worker)
        idle = [worker for worker in self.workers if worker.ready and worker.job is None]
        for worker, job in zip(idle, ready, strict=False):
            worker.job = job
            job.start()
            worker.send(**job.order(self.out))

    def _listen(self) -> None:
        for key, _ in self.selector.select(timeout=0.25):
            worker: _Worker = key.data
            messages = worker.receive()
            if messages is None:
                self._bury(worker)
            for message in messages or ():
                self._heed(worker, message)

    def _heed(self, worker: _Worker, message: dict[str, Any]) -> None:
        job = worker.job
        if message["event"] == "ready":
            worker.ready, self.failed_starts = True, 0
        elif job is not None:
            self.heed(job, message)
            if not job.running:
                worker.job = None

    def _bury(self, worker: _Worker) -> None:
        """A worker died: its job goes back to the others, unless it has killed too many."""
        self.selector.unregister(worker.outbox)
        self.workers.remove(worker)
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
        for worker in self.workers:
            worker.send(stop=True)
        deadline = time.monotonic() + STOP_SECONDS
        while any(worker.job for worker in self.workers) and len(received) < 2 and time.monotonic() < deadline:
            self._listen()
