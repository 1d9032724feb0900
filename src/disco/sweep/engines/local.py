"""Trains the runs of a study on this machine: one process with one thread per core, each taking a cohort at a time.

The state of a sweep is in its run records alone, so that it can be killed anywhere and started again. No torch here:
only the workers import it, once each.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from disco.errors import UserError
from disco.runs.lock import LOCK, locked
from disco.runs.schema import DATA, Outcome
from disco.sweep.cohorts import group, memory_to_use
from disco.sweep.engines._jobs import Job, Pace, Run
from disco.sweep.progress import Display, Snapshot, display
from disco.sweep.record import (
    LOG,
    outcome,
    read_cohorts,
    record_end,
    tokens_reached,
    write_cohorts,
    write_plan,
)
from disco.sweep.study import Study, check_data
from disco.train.calibrate import environment
from disco.train.config import to_dict

WORKER = (sys.executable, "-m", "disco.sweep.worker")
DEATHS = 3
"""Deaths of workers in the same job after which it is tried in halves; a single run is then given up."""
STARTS = 10
"""Workers in a row that may die before they are ready; then something is wrong with all of them."""
STOP_SECONDS = 60.0
"""How long workers may take to leave their runs after Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a sweep ended."""

    finished: int
    diverged: int
    pruned: int = 0
    """Decay branches that were not trained because their parent diverged before."""
    failed: dict[str, str] = field(default_factory=dict)
    """Reasons by run id."""
    waiting: int = 0
    """Runs that are left to do, after an interruption."""
    signal: int | None = None
    """What interrupted it: SIGINT (Ctrl-C) or SIGTERM."""


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
        UserError: the data do not last for a run, another sweep runs in ``out``, it cannot be written, or workers do
            not start.
    """
    check_data(study, out / DATA)
    with locked(out / LOCK, wait=1.0):  # `disco sweep status` tries the lock for an instant
        write_plan(study, out)
        with _signals() as received, show or display() as shown:
            workers = workers or len(os.sched_getaffinity(0))
            return _Sweep(study, out, workers, shown, tuple(command)).run(received)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of raising in the middle of something."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda n, _: received.append(n))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        self.heard = (0.0, 0)
        """Time of the job's last message, and how far its runs were."""
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


class _Sweep:
    def __init__(self, study: Study, out: Path, workers: int, shown: Display, command: tuple[str, ...]) -> None:
        self.out, self.most, self.shown, self.command = out, workers, shown, command
        self.runs = {config.id: Run(config, outcome(config, out)) for config in study.runs}
        for run in self.runs.values():
            if run.outcome:
                run.tokens, run.reached = run.total, tokens_reached(run.config, out)
        left = [run.config for run in self.runs.values() if run.outcome is None]
        cohorts = group(
            left, lambda config: tokens_reached(config, out), read_cohorts(out, left), workers, memory_to_use()
        )
        self.jobs = [Job([self.runs[config.id] for config in each.runs], each.compiled) for each in cohorts]
        self._write_cohorts()
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.failed_starts = 0
        self.stopping = False
        self.pace = Pace()

    def run(self, received: list[int]) -> Result:
        """Keeps all workers busy until every run has ended or a signal is received."""
        with (self.out / LOG).open("ab") as log:
            try:
                while not received and self._unfinished():
                    self._give_up_branches()
                    self._assign(log)
                    self._listen()
                    self.shown.update(self._snapshot())
                if received:
                    self._stop(received)
            finally:
                for worker in self.workers:
                    worker.close()
                self.selector.close()
        self.shown.update(self._snapshot())
        return self._result(received)

    def _unfinished(self) -> list[Run]:
        return [run for run in self.runs.values() if run.outcome is None]

    def _ready(self) -> list[Job]:
        """Jobs that could start now, in order."""
        return [job for job in self.jobs if job.left and not job.running and not any(map(self._waits, job.left))]

    def _waits(self, run: Run) -> bool:
        """Whether a branch has a parent that has not ended."""
        parent = self.runs.get(run.config.parent or "")
        return parent is not None and parent.outcome is None

    def _give_up_branches(self) -> None:
        """Ends the branches whose parent ended before their beginning: pruned if it diverged, which is a result."""
        for run in self._unfinished():
            parent = self.runs.get(run.config.parent or "")
            if parent is not None and parent.outcome and parent.reached < run.config.branch_tokens:
                ended = Outcome.PRUNED if parent.outcome == Outcome.DIVERGED else Outcome.FAILED
                reason = f"parent {run.config.parent} {parent.outcome} before {run.config.branch_tokens} tokens"
                self._give_up(run, ended, reason, parent_outcome=str(parent.outcome))

    def _assign(self, log: IO[bytes]) -> None:
        """Starts as many workers as there is work for, and gives the idle ones their next job."""
        ready = self._ready()
        busy = sum(worker.job is not None for worker in self.workers)
        while len(self.workers) < min(self.most, busy + len(ready)):
            worker = _Worker(self.command, log)
            self.workers.append(worker)
            self.selector.register(worker.outbox, selectors.EVENT_READ, worker)
        idle = [worker for worker in self.workers if worker.ready and worker.job is None]
        for worker, job in zip(idle, ready, strict=False):
            worker.job, worker.heard, job.running = job, (0.0, 0), True
            configs = [to_dict(run.config) for run in job.left]
            worker.send(configs=configs, runs=str(self.out), compiled=job.compiled)

    def _listen(self) -> None:
        for key, _ in self.selector.select(timeout=0.25):
            worker: _Worker = key.data
            messages = worker.receive()
            if messages is None:
                self._bury(worker)
            for message in messages or ():
                self._heed(worker, message)

    def _heed(self, worker: _Worker, message: dict[str, Any]) -> None:
        job, event = worker.job, message["event"]
        if event == "ready":
            worker.ready, self.failed_starts = True, 0
        elif job is None:
            return
        elif event == "progress":
            self._measure(worker, job, message["tokens"])
        elif event == "ended":
            run = self.runs[message["run"]]
            if message["outcome"] == Outcome.FINISHED:
                self._measure(worker, job, run.config.horizon)
            self._end(run, Outcome(message["outcome"]))
        elif event == "failed":
            self._give_up(self.runs[message["run"]], Outcome.FAILED, message["reason"])
        else:  # the whole job: done, stopped or broken
            worker.job, job.running = None, False
            if event == "broken":
                self._take_apart(job, message["reason"])

    def _measure(self, worker: _Worker, job: Job, tokens: int) -> None:
        now, (then, before) = time.monotonic(), worker.heard
        if then and tokens > before:
            self.pace.add(job.kind, now - then, (tokens - before) * len(job.left))
        if tokens > before:
            worker.heard = (now, tokens)
        for run in job.left:
            run.tokens = min(run.total, max(0, tokens - (run.config.horizon - run.total)))

    def _end(self, run: Run, ended: Outcome, reason: str = "") -> None:
        run.outcome, run.reason, run.tokens = ended, reason, run.total
        run.reached = tokens_reached(run.config, self.out)
        self.shown.ended(run.config.id, str(ended), reason)

    def _give_up(self, run: Run, ended: Outcome, reason: str, **fields: Any) -> None:
        record_end(run.config, self.out, ended, reason, **fields)
        self._end(run, ended, reason)

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
            self._take_apart(job, f"its worker died {DEATHS} times, last by {how}; see {LOG}")
        else:
            self.shown.say(f"the worker of {_named(job)} died ({how}); another one resumes it")

    def _take_apart(self, job: Job, reason: str) -> None:
        """Tries the halves of a job that failed as a whole, down to the run that is the reason, which is given up."""
        if len(job.left) == 1:
            self._give_up(job.left[0], Outcome.FAILED, reason)
        elif job.left:
            self.shown.say(f"{_named(job)} failed together ({reason}); trying each half")
            self.jobs[self.jobs.index(job)] = Job([run for run in job.runs if run.outcome])
            self.jobs += job.halves()
            self._write_cohorts()

    def _write_cohorts(self) -> None:
        write_cohorts(self.out, [job.cohort() for job in self.jobs if job.runs])

    def _stop(self, received: list[int]) -> None:
        """Has the workers leave their runs with a checkpoint; at once on a second signal."""
        self.stopping = True
        self.shown.say("stopping: the workers write checkpoints (again Ctrl-C: at once)")
        for worker in self.workers:
            worker.send(stop=True)
        deadline = time.monotonic() + STOP_SECONDS
        while any(worker.job for worker in self.workers) and len(received) < 2 and time.monotonic() < deadline:
            self._listen()

    def _snapshot(self) -> Snapshot:
        return self.pace.snapshot(self.runs.values(), self.jobs, max(1, len(self.workers)))

    def _result(self, received: list[int]) -> Result:
        outcomes = [run.outcome for run in self.runs.values()]
        return Result(
            finished=outcomes.count(Outcome.FINISHED),
            diverged=outcomes.count(Outcome.DIVERGED),
            pruned=outcomes.count(Outcome.PRUNED),
            failed={run: state.reason for run, state in self.runs.items() if state.outcome == Outcome.FAILED},
            waiting=outcomes.count(None),
            signal=received[0] if received else None,
        )


def _named(job: Job) -> str:
    runs = [run.config.id for run in job.left]
    return f"run {runs[0]}" if len(runs) == 1 else f"runs {runs[0]} and {len(runs) - 1} more"
