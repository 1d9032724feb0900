"""Trains the runs of a study on this machine: one process with one thread per core, each taking a run at a time.

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
from disco.sweep.progress import Display, Snapshot, display
from disco.sweep.record import LOG, outcome, record_end, tokens_reached, write_plan
from disco.sweep.study import Study, check_data, new_tokens
from disco.train.config import TrainConfig, to_dict

WORKER = (sys.executable, "-m", "disco.sweep.worker")
DEATHS = 3
"""Deaths of workers in the same run after which it is given up."""
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
            sweep = _Sweep(study, out, shown, tuple(command))
            return sweep.run(workers or len(os.sched_getaffinity(0)), received)


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


@dataclass
class _Job:
    """A run and where it stands."""

    config: TrainConfig
    outcome: Outcome | None
    reached: int = 0
    """Tokens at the end of its record, once it has ended."""
    reason: str = ""
    deaths: int = 0
    running: bool = False
    tokens: int = 0
    """Tokens trained on, of those that are the run's own."""

    @property
    def total(self) -> int:
        return new_tokens(self.config)

    @property
    def kind(self) -> tuple[int, int, int]:
        """Runs alike in this take about the same time per token."""
        return self.config.model.width, self.config.model.depth, self.config.batch


class _Worker:
    """A worker process, the run that it is at, and what it said."""

    def __init__(self, command: tuple[str, ...], log: IO[bytes]) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=os.environ | threads, bufsize=0
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.inbox, self.outbox = self.process.stdin, self.process.stdout
        self.job: _Job | None = None
        self.ready = False
        self.heard = (0.0, 0)
        """Time and tokens of the run's last message."""
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
    def __init__(self, study: Study, out: Path, shown: Display, command: tuple[str, ...]) -> None:
        self.out, self.shown, self.command = out, shown, command
        self.jobs = {config.id: _Job(config, outcome(config, out)) for config in study.runs}
        for job in self.jobs.values():
            if job.outcome:
                job.tokens, job.reached = job.total, tokens_reached(job.config, out)
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.failed_starts = 0
        self.stopping = False
        self.pace: dict[tuple[int, int, int], tuple[float, float]] = {}
        """Seconds and tokens of training so far, by kind of run."""

    def run(self, workers: int, received: list[int]) -> Result:
        """Keeps ``workers`` processes busy until every run has ended or a signal is received."""
        with (self.out / LOG).open("ab") as log:
            try:
                while not received and self._unfinished():
                    self._give_up_branches()
                    self._assign(workers, log)
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

    def _unfinished(self) -> list[_Job]:
        return [job for job in self.jobs.values() if job.outcome is None]

    def _ready(self) -> list[_Job]:
        """Runs that could start now, in order."""
        return [job for job in self._unfinished() if not job.running and not self._waits(job)]

    def _waits(self, job: _Job) -> bool:
        """Whether a branch has a parent that has not ended."""
        parent = self.jobs.get(job.config.parent or "")
        return parent is not None and parent.outcome is None

    def _give_up_branches(self) -> None:
        """Ends the branches whose parent ended before their beginning: pruned if it diverged, which is a result."""
        for job in self._unfinished():
            parent = self.jobs.get(job.config.parent or "")
            if parent is not None and parent.outcome and parent.reached < job.config.branch_tokens:
                ended = Outcome.PRUNED if parent.outcome == Outcome.DIVERGED else Outcome.FAILED
                reason = f"parent {job.config.parent} {parent.outcome} before {job.config.branch_tokens} tokens"
                self._give_up(job, ended, reason, parent_outcome=str(parent.outcome))

    def _assign(self, workers: int, log: IO[bytes]) -> None:
        """Starts as many workers as there is work for, and gives the idle ones their next run."""
        ready = self._ready()
        busy = sum(worker.job is not None for worker in self.workers)
        while len(self.workers) < min(workers, busy + len(ready)):
            worker = _Worker(self.command, log)
            self.workers.append(worker)
            self.selector.register(worker.outbox, selectors.EVENT_READ, worker)
        idle = [worker for worker in self.workers if worker.ready and worker.job is None]
        for worker, job in zip(idle, ready, strict=False):
            worker.job, worker.heard, job.running = job, (0.0, 0), True
            worker.send(config=to_dict(job.config), runs=str(self.out))

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
        elif job is not None and event == "progress":
            self._measure(worker, job, message["tokens"])
        elif job is not None and event == "ended":
            if message["outcome"] == Outcome.FINISHED:
                self._measure(worker, job, job.config.horizon)
            worker.job, job.running = None, False
            self._end(job, Outcome(message["outcome"]))
        elif job is not None and event == "failed":
            worker.job, job.running = None, False
            self._give_up(job, Outcome.FAILED, message["reason"])
        elif job is not None and event == "stopped":
            worker.job, job.running = None, False

    def _measure(self, worker: _Worker, job: _Job, tokens: int) -> None:
        now, (then, before) = time.monotonic(), worker.heard
        if then:
            seconds, trained = self.pace.get(job.kind, (0.0, 0.0))
            self.pace[job.kind] = (seconds + now - then, trained + tokens - before)
        worker.heard = (now, tokens)
        job.tokens = min(job.total, max(0, tokens - (job.config.horizon - job.total)))

    def _end(self, job: _Job, ended: Outcome, reason: str = "") -> None:
        job.outcome, job.reason, job.tokens = ended, reason, job.total
        job.reached = tokens_reached(job.config, self.out)
        self.shown.ended(job.config.id, str(ended), reason)

    def _give_up(self, job: _Job, ended: Outcome, reason: str, **fields: Any) -> None:
        record_end(job.config, self.out, ended, reason, **fields)
        self._end(job, ended, reason)

    def _bury(self, worker: _Worker) -> None:
        """A worker died: its run goes back to the others, unless it has killed too many."""
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
        if self.stopping:
            return
        job.deaths += 1
        if job.deaths >= DEATHS:
            self._give_up(job, Outcome.FAILED, f"its worker died {DEATHS} times, last by {how}; see {LOG}")
        else:
            self.shown.say(f"the worker of run {job.config.id} died ({how}); another one resumes it")

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
        jobs = self.jobs.values()
        seconds = sum(s for s, _ in self.pace.values())
        trained = sum(t for _, t in self.pace.values())
        average = seconds / trained if trained else float("nan")
        busy = max(1, len(self.workers))

        def per_token(job: _Job) -> float:
            s, t = self.pace.get(job.kind, (0.0, 0.0))
            return s / t if t else average

        left = sum((job.total - job.tokens) * per_token(job) for job in jobs if job.outcome is None)
        outcomes = [job.outcome for job in jobs]
        return Snapshot(
            runs=len(outcomes),
            ended=sum(o is not None for o in outcomes),
            running=sum(job.running for job in jobs),
            diverged=outcomes.count(Outcome.DIVERGED),
            pruned=outcomes.count(Outcome.PRUNED),
            failed=outcomes.count(Outcome.FAILED),
            tokens=sum(job.total for job in jobs),
            done=sum(job.tokens for job in jobs),
            tokens_per_second=busy / average if trained else float("nan"),
            seconds_left=left / busy,
        )

    def _result(self, received: list[int]) -> Result:
        outcomes = [job.outcome for job in self.jobs.values()]
        return Result(
            finished=outcomes.count(Outcome.FINISHED),
            diverged=outcomes.count(Outcome.DIVERGED),
            pruned=outcomes.count(Outcome.PRUNED),
            failed={run: job.reason for run, job in self.jobs.items() if job.outcome == Outcome.FAILED},
            waiting=outcomes.count(None),
            signal=received[0] if received else None,
        )
