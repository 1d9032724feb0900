"""The course of a sweep, whatever trains its runs: what is left, what may start, and what becomes of it. No torch."""

from __future__ import annotations

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disco.errors import NoSpaceError
from disco.runs.schema import Outcome
from disco.sweep.engines._jobs import Job, Pace, Run
from disco.sweep.progress import Display
from disco.sweep.record import grouped, outcome, record_end, tokens_reached, write_cohorts
from disco.sweep.study import Study

DEATHS = 3
"""Deaths in the same job after which it is tried in halves; a single run is then given up."""
STARTS = 10
"""Deaths in a row before anything has started to train; then something is wrong with all jobs."""


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
    """What interrupted it: SIGINT (Ctrl-C), SIGTERM or, the same, `disco sweep cancel`."""


@contextmanager
def signals() -> Iterator[list[int]]:
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


class Course(ABC):
    """The runs of a study in their cohorts, and what is known of each. Engines start jobs and pass on what they say.

    Args:
        study: the plan.
        out: folder of the run records, locked.
        workers: processes that train at the same time.
        memory: bytes that they may use together.
        shown: where progress goes.
    """

    def __init__(self, study: Study, out: Path, workers: int, memory: int, shown: Display) -> None:
        self.out, self.shown = out, shown
        self.runs = {config.id: Run(config, outcome(config, out)) for config in study.runs}
        for run in self.runs.values():
            if run.outcome:
                run.tokens, run.reached = run.total, tokens_reached(run.config, out)
        left = [run.config for run in self.runs.values() if run.outcome is None]
        cohorts = grouped(out, left, workers, memory)
        self.jobs = [Job([self.runs[config.id] for config in each.runs], each.compiled) for each in cohorts]
        self._write_cohorts()
        self.failed_starts = 0
        self.full = ""
        """Why nothing more can be written: the sweep ends, to be continued when there is room."""
        self.pace = Pace()

    @abstractmethod
    def run(self, received: list[int]) -> Result:
        """Trains until every run has ended or a signal is received."""

    def unfinished(self) -> list[Run]:
        """The runs that have not ended."""
        return [run for run in self.runs.values() if run.outcome is None]

    def ready(self) -> list[Job]:
        """Jobs that could start now, in order."""
        return [job for job in self.jobs if job.left and not job.running and not any(map(self._waits, job.left))]

    def _waits(self, run: Run) -> bool:
        """Whether a branch has a parent that has not ended."""
        parent = self.runs.get(run.config.parent or "")
        return parent is not None and parent.outcome is None

    def give_up_branches(self) -> None:
        """Ends the branches whose parent ended before their beginning: pruned if it diverged, which is a result."""
        for run in self.unfinished():
            parent = self.runs.get(run.config.parent or "")
            if parent is not None and parent.outcome and parent.reached < run.config.branch_tokens:
                ended = Outcome.PRUNED if parent.outcome == Outcome.DIVERGED else Outcome.FAILED
                reason = f"parent {run.config.parent} {parent.outcome} before {run.config.branch_tokens} tokens"
                self.give_up(run, ended, reason, parent_outcome=str(parent.outcome))

    def heed(self, job: Job, message: dict[str, Any]) -> None:
        """Takes note of what a job says; ``sweep/worker.py`` has the messages."""
        event = message["event"]
        if event == "progress":
            self._measure(job, message["tokens"])
        elif event == "ended":
            run = self.runs[message["run"]]
            if message["outcome"] == Outcome.FINISHED:
                self._measure(job, run.config.horizon)
            self.end(run, Outcome(message["outcome"]))
        elif event == "failed":
            self.give_up(self.runs[message["run"]], Outcome.FAILED, message["reason"])
        else:  # the whole job: done, stopped, full or broken
            job.running = False
            if event == "full":
                self.full = message["reason"]
            if event == "broken":
                self.take_apart(job, message["reason"])

    def _measure(self, job: Job, tokens: int) -> None:
        now, (then, before) = time.monotonic(), job.heard
        if then and tokens > before:
            self.pace.add(job.kind, now - then, (tokens - before) * len(job.left))
        if tokens > before:
            job.heard = (now, tokens)
        for run in job.left:
            run.tokens = min(run.total, max(0, tokens - (run.config.horizon - run.total)))

    def end(self, run: Run, ended: Outcome, reason: str = "") -> None:
        """Takes note that a run has ended; its record says so."""
        run.outcome, run.reason, run.tokens = ended, reason, run.total
        run.reached = tokens_reached(run.config, self.out)
        self.shown.ended(run.config.id, str(ended), reason)

    def give_up(self, run: Run, ended: Outcome, reason: str, **fields: Any) -> None:
        """Ends a run that does not train, in its record too."""
        record_end(run.config, self.out, ended, reason, **fields)
        self.end(run, ended, reason)

    def take_apart(self, job: Job, reason: str) -> None:
        """Tries the halves of a job that failed as a whole, down to the run that is the reason, which is given up."""
        if len(job.left) == 1:
            self.give_up(job.left[0], Outcome.FAILED, reason)
        elif job.left:
            self.shown.say(f"{job} failed together ({reason}); trying each half")
            self.jobs[self.jobs.index(job)] = Job([run for run in job.runs if run.outcome])
            self.jobs += job.halves()
            self._write_cohorts()

    def _write_cohorts(self) -> None:
        write_cohorts(self.out, [job.cohort() for job in self.jobs if job.runs])

    def show(self, workers: int) -> None:
        """Shows how far the sweep is, with so many processes at work."""
        self.shown.update(self.pace.snapshot(self.runs.values(), self.jobs, max(1, workers)))

    def result(self, received: list[int]) -> Result:
        """How the sweep ended, after the signals received.

        Raises:
            NoSpaceError: the disk is full.
        """
        if self.full:
            raise NoSpaceError(self.full)
        outcomes = [run.outcome for run in self.runs.values()]
        return Result(
            finished=outcomes.count(Outcome.FINISHED),
            diverged=outcomes.count(Outcome.DIVERGED),
            pruned=outcomes.count(Outcome.PRUNED),
            failed={run: state.reason for run, state in self.runs.items() if state.outcome == Outcome.FAILED},
            waiting=outcomes.count(None),
            signal=received[0] if received else None,
        )
