"""Trains the runs of a study as jobs of a scheduler: one job for each cohort.

This process submits, watches and requeues; it may be killed and started again, or on another machine that shares the
files. The state of a sweep is in its run records, and in what the scheduler knows. No torch.
"""

from __future__ import annotations

import json
import secrets
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disco.errors import UserError
from disco.runs.lock import LOCK, holder, locked
from disco.runs.schema import DATA, Outcome
from disco.runs.writer import write_json
from disco.sweep.engines._course import DEATHS, STARTS, Course, Result, signals
from disco.sweep.engines._jobs import Job
from disco.sweep.engines._queue import FullError, JobState, Phase, Queue, QueueError
from disco.sweep.progress import Display, display
from disco.sweep.record import CANCEL, JOBS, Queued, outcome, read_queued, refuse_other_jobs, write_plan, write_queued
from disco.sweep.study import Study, check_data
from disco.train.config import to_dict

POLL_SECONDS = 5.0
"""Between two questions to the scheduler."""
LISTEN_SECONDS = 0.25
"""Between two looks at what the jobs say."""
FORGOTTEN = 3
"""Answers in a row without a job after which it is gone."""
RETRY_SECONDS = 30.0
"""After a submission that was refused, for example because the queue is full."""
CANCEL_SECONDS = 180.0
"""How long jobs may take to save and leave, and a process that watches them to notice: sbatch tries for two minutes."""


def run_study(
    study: Study, out: Path, queue: Queue, *, workers: int | None = None, show: Display | None = None
) -> Result:
    """Trains all runs of a study that are not done yet, and watches over those that are in the queue already.

    Args:
        study: the plan; its data are prepared in ``out / "data"``.
        out: folder of the run records, which all machines of the cluster see under the same name.
        queue: the scheduler.
        workers: jobs at the same time; as in the queue's settings if not given.
        show: where progress goes.

    Raises:
        UserError: the data do not last for a run, another process watches the sweep, another engine has jobs of it, the
            scheduler refuses the first submission for good, jobs die one after the other before they train, or the disk
            is full.
    """
    out = out.resolve()
    check_data(study, out / DATA)
    with locked(out / LOCK, wait=1.0):
        refuse_other_jobs(out, queue.engine)
        (out / CANCEL).unlink(missing_ok=True)
        write_plan(study, out)
        with signals() as received, show or display() as shown:
            return _Cluster(study, out, queue, workers or queue.config.jobs, shown).run(received)


def cancel(out: Path, queue: Queue) -> int:
    """Cancels the jobs of the sweep in ``out``; each saves a checkpoint first. Returns how many there were.

    A process that watches the sweep does it, so that it submits no more, and ends.

    Raises:
        UserError: it does not answer, or the jobs do not end.
    """
    out = out.resolve()
    queued = read_queued(out)
    if queued is None:
        return 0
    (out / CANCEL).touch()
    deadline = time.monotonic() + CANCEL_SECONDS
    while process := holder(out / LOCK):
        if time.monotonic() > deadline:
            raise UserError(f"process {process}, which watches the sweep, does not answer; stop it, then cancel again")
        time.sleep(LISTEN_SECONDS)
    with locked(out / LOCK, wait=1.0):
        left = read_queued(out)
        if left is not None:
            _cancel(queue, set(left.jobs))
            write_queued(out, Queued(queue.engine, {}, {}))
        (out / CANCEL).unlink(missing_ok=True)
    return len(queued.jobs)


def _cancel(queue: Queue, keys: set[str]) -> None:
    """Cancels jobs and waits for their end."""
    queue.cancel(keys)
    deadline = time.monotonic() + CANCEL_SECONDS
    while live := [state for state in queue.states(keys).values() if state.live]:
        if time.monotonic() > deadline:
            raise UserError(f"job {live[0].id} was cancelled but is {live[0]} after {CANCEL_SECONDS:g} seconds")
        time.sleep(LISTEN_SECONDS)


@dataclass(eq=False)
class _Ticket:
    """A job in the scheduler's hands."""

    key: str
    runs: tuple[str, ...]
    job: Job | None
    """None: it was submitted for an earlier form of the study, and trains some of the runs still."""
    file: Path
    """What it says."""
    read: int = 0
    """Bytes of it so far."""
    trains: bool = False
    """Whether it has begun to, since it was submitted or requeued."""
    stopped: bool = False
    """Whether it has left its runs by itself since then, with checkpoints."""
    state: JobState | None = None
    missed: int = 0
    """Answers in a row without it."""
    sure: bool = True
    """Whether the scheduler has confirmed it; its answer to the submission may have been lost."""

    def messages(self) -> list[dict[str, Any]]:
        """What it has said since; a line that a kill has cut is left out."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.read)
                new = file.read()
        except FileNotFoundError:
            return []
        *lines, rest = new.split(b"\n")
        self.read += len(new) - len(rest)
        found = []
        for line in lines:
            with suppress(ValueError):
                found.append(json.loads(line))
        return found


class _Cluster(Course):
    def __init__(self, study: Study, out: Path, queue: Queue, workers: int, shown: Display) -> None:
        super().__init__(study, out, workers, workers * queue.config.memory_bytes, shown)
        self.queue, self.most = queue, workers
        self.tickets: dict[str, _Ticket] = {}
        self.accepted = False
        """Whether the scheduler has taken a job of this sweep."""
        self.trouble = ""
        """Why it could not be asked last time."""
        self.asked = self.refused = float("-inf")
        self.refusal = ""
        """Why the scheduler took no jobs last time."""
        self.at_once = workers
        """Jobs to submit at once: fewer where the scheduler had no room for so many."""
        (out / JOBS).mkdir(exist_ok=True)
        self._adopt()

    def run(self, received: list[int]) -> Result:
        """Keeps jobs in the queue until every run has ended, a signal is received, or the sweep is cancelled."""
        while not received and not self.full and self.unfinished():
            self.give_up_branches()
            self._submit()
            self._listen()
            self._ask()
            self.show(sum(ticket.trains for ticket in self.tickets.values()))
            if (self.out / CANCEL).exists():
                self._stop()
                received.append(signal.SIGTERM)
            elif self.unfinished():
                time.sleep(LISTEN_SECONDS)
        if (received or self.full) and self.tickets:
            self.shown.say(
                f"{len(self.tickets)} jobs stay with {self.queue.engine}; the same command watches them again, "
                f"and this ends them: disco sweep cancel {self.out}"
            )
        else:
            self.tickets = {}
        self._write_queued()
        self.show(0)
        return self.result(received)

    def _adopt(self) -> None:
        """Watches the jobs that an earlier process submitted."""
        queued = read_queued(self.out)
        states = self.queue.states(queued.jobs) if queued else {}
        for key, runs in queued.jobs.items() if queued else ():
            state = states.get(key)
            if state is None or not state.live:
                continue
            self.accepted = True
            file = self.out / JOBS / f"{key}.jsonl"
            read = file.stat().st_size if file.exists() else 0  # what is behind is in the records
            job = self._ordered(key)
            self.tickets[key] = _Ticket(key, runs, job, file, read, trains=state.phase == Phase.RUNNING, state=state)
            if job is not None:
                job.start()
        self._write_queued()

    def _ordered(self, key: str) -> Job | None:
        """The job that ``key`` was submitted for; None if its runs have been grouped or continued otherwise since."""
        try:
            configs = json.loads((self.out / JOBS / f"{key}.json").read_bytes())["configs"]
        except (OSError, ValueError, KeyError):
            return None
        for job in self.jobs:
            if job.left and not job.running and all(to_dict(run.config) in configs for run in job.left):
                return job
        return None

    def _write_queued(self) -> None:
        jobs = {key: ticket.runs for key, ticket in self.tickets.items()}
        write_queued(self.out, Queued(self.queue.engine, asdict(self.queue.config), jobs))

    def _order(self, key: str, job: Job) -> Path:
        path = self.out / JOBS / f"{key}.json"
        write_json(path, job.order(self.out) | {"threads": self.queue.config.cpus})
        return path

    def _submit(self) -> None:
        """Submits the jobs that could start, as far as there is room."""
        taken = {run for ticket in self.tickets.values() if ticket.job is None for run in ticket.runs}
        ready = [job for job in self.ready() if taken.isdisjoint(run.config.id for run in job.left)]
        ready = ready[: max(0, min(self.most - len(self.tickets), self.at_once))]
        if not ready or time.monotonic() < self.refused + RETRY_SECONDS:
            return
        name = f"disco-{secrets.token_hex(4)}"
        new = {f"{name}.{index}": job for index, job in enumerate(ready)}
        orders = [self._order(key, job) for key, job in new.items()]
        for (key, job), path in zip(new.items(), orders, strict=True):
            runs = tuple(run.config.id for run in job.left)
            self.tickets[key] = _Ticket(key, runs, job, path.with_suffix(".jsonl"))
        self._write_queued()  # before: whatever becomes of this process, its jobs are known by name
        try:
            self.queue.submit(name, orders)
        except QueueError as error:
            self._refused(error, new)
            return
        self.accepted, self.refusal, self.at_once = True, "", min(self.most, 2 * self.at_once)
        for job in ready:
            job.start()

    def _refused(self, error: QueueError, new: Mapping[str, Job]) -> None:
        """After a submission that failed: waits for room, or gives up. Jobs that are there nevertheless are watched."""
        try:
            there, sure = set(self.queue.states(list(new))), True
        except QueueError:
            there, sure = set(new), False
        for key, job in new.items():
            if key in there:
                self.tickets[key].sure = sure
                job.start()
            else:
                del self.tickets[key]
        self._write_queued()
        if there and sure:
            self.accepted = True
        elif isinstance(error, FullError) and len(new) > 1:
            self.at_once = len(new) // 2
        elif isinstance(error, FullError) or self.accepted:
            self.refused = time.monotonic()
            if str(error) != self.refusal:
                self.shown.say(f"{error}; trying again every {RETRY_SECONDS:g} seconds")
            self.refusal = str(error)
        else:
            raise error

    def _listen(self) -> None:
        for ticket in list(self.tickets.values()):
            self._read(ticket)

    def _read(self, ticket: _Ticket) -> None:
        """Takes note of what a job has said."""
        for message in ticket.messages() if ticket.job else ():
            run = message.get("run")
            if message["event"] == "ready":
                ticket.trains, ticket.stopped, self.failed_starts = True, False, 0
            elif message["event"] == "stopped":
                ticket.stopped = True
            elif run is None or (run in self.runs and self.runs[run].outcome is None):
                assert ticket.job is not None
                self.heed(ticket.job, message)
                if not ticket.job.running:
                    self._drop(ticket)
                    self._look_up(ticket.job)
                    return

    def _look_up(self, job: Job) -> None:
        """What a job's end means for its runs is in their records, whatever of it was heard."""
        for run in job.left:
            ended = outcome(run.config, self.out)
            if ended:
                self.end(run, ended)

    def _drop(self, ticket: _Ticket) -> None:
        del self.tickets[ticket.key]
        self._write_queued()

    def _ask(self) -> None:
        """Asks the scheduler how its jobs are."""
        if not self.tickets or time.monotonic() < self.asked + POLL_SECONDS:
            return
        self.asked = time.monotonic()
        try:
            states = self.queue.states(list(self.tickets))
        except QueueError as error:  # it may be restarted: the jobs go on, and so does their record
            if str(error) != self.trouble:
                self.shown.say(f"{error}; asking again")
            self.trouble = str(error)
            return
        self.trouble = ""
        for ticket in list(self.tickets.values()):
            self._note(ticket, states.get(ticket.key))

    def _note(self, ticket: _Ticket, state: JobState | None) -> None:
        ticket.missed = ticket.missed + 1 if state is None else 0
        if state is not None:
            if state.requeues > (ticket.state.requeues if ticket.state else 0):
                self.shown.say(f"job {state.id} was requeued, {state.requeues} times so far; it is {state}")
            ticket.state, ticket.sure = state, True
        if ticket.missed >= FORGOTTEN or (state is not None and not state.live):
            self._read(ticket)
            if ticket.key in self.tickets:
                self._ended(ticket)

    def _ended(self, ticket: _Ticket) -> None:
        """A job came to an end without saying so: it is requeued, unless it was cancelled or has died too often."""
        job, state = ticket.job, ticket.state
        self._drop(ticket)
        if job is None:
            return
        job.running = False
        self._look_up(job)
        if not job.left or not ticket.sure:
            return
        name, how = (state.id, str(state)) if state else (ticket.key, "unknown to the scheduler")
        if state is not None and state.phase == Phase.CANCELLED:
            for run in job.left:
                self.give_up(run, Outcome.FAILED, f"its job {name} was cancelled: {how}")
            return
        if not ticket.stopped:
            job.deaths = 1 if job.heard[1] > job.furthest else job.deaths + 1
            job.furthest = max(job.furthest, job.heard[1])
        if not ticket.trains:
            self.failed_starts += 1
            if self.failed_starts >= STARTS:
                raise UserError(f"jobs die before they train, the last one by {how}; see {self.out / JOBS}")
        if job.deaths >= DEATHS:
            self.take_apart(job, f"its job died {DEATHS} times, last by {how}; see {JOBS}/{ticket.key}.log")
            return
        self.shown.say(f"job {name} of {job} {'stopped' if ticket.stopped else 'died'}: {how}; it is requeued")
        self._requeue(ticket, job)

    def _requeue(self, ticket: _Ticket, job: Job) -> None:
        order = self._order(ticket.key, job)
        self.tickets[ticket.key] = ticket
        self._write_queued()
        ticket.trains, ticket.stopped, ticket.missed = False, False, 0
        try:
            self.queue.requeue(ticket.key, order)
            job.start()
        except QueueError:  # forgotten, or it may not be requeued: it will be submitted anew
            self._drop(ticket)

    def _stop(self) -> None:
        """Cancels all jobs, for ``disco sweep cancel``."""
        self.shown.say("cancelled: the jobs write checkpoints")
        _cancel(self.queue, set(self.tickets))
        self._listen()
        self.tickets = {}
        self._write_queued()
        (self.out / CANCEL).unlink(missing_ok=True)
