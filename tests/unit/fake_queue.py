"""A scheduler of this process: every job is a process at once, of ``fake_worker``'s training.

Run as a script it is such a job.
"""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fake_worker import train

from disco.sweep.clusters import JobConfig
from disco.sweep.engines._queue import JobState, Phase, QueueError
from disco.sweep.engines.task import perform
from disco.train.calibrate import environment


class FakeQueue:
    """Keeps what it was asked, and forgets or refuses on request."""

    engine = "fake"

    def __init__(self, config: JobConfig, refuse: int = 0, may_requeue: bool = True, broken: bool = False) -> None:
        self.config = config
        self.refuse, self.may_requeue, self.broken = refuse, may_requeue, broken
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.requeues: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.submitted: list[list[str]] = []
        self.most = 0
        """Jobs at the same time."""

    def submit(self, name: str, orders: Sequence[Path]) -> None:
        if self.refuse > 0:
            self.refuse -= 1
            raise QueueError("the queue is full")
        self.submitted.append([order.stem for order in orders])
        for order in orders:
            self._start(order)
        self.most = max(self.most, sum(process.poll() is None for process in self.processes.values()))

    def _start(self, order: Path) -> None:
        command = [sys.executable, __file__, *(["broken"] if self.broken else []), str(order)]
        self.processes[order.stem] = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        self.requeues.setdefault(order.stem, 0)

    def requeue(self, key: str, order: Path) -> None:
        if not self.may_requeue:
            raise QueueError("may not be requeued")
        self.requeues[key] += 1
        self._start(order)

    def states(self, keys: Collection[str]) -> Mapping[str, JobState]:
        return {key: self._state(key) for key in keys if key in self.processes}

    def _state(self, key: str) -> JobState:
        if key in self.cancelled:
            return JobState(id=key, phase=Phase.CANCELLED, word="CANCELLED", requeues=self.requeues[key])
        code = self.processes[key].poll()
        phase = Phase.RUNNING if code is None else Phase.ENDED
        return JobState(id=key, phase=phase, word=f"CODE {code}", requeues=self.requeues[key])

    def cancel(self, keys: Collection[str]) -> None:
        for key in keys:
            self.cancelled.add(key)
            self.processes[key].terminate()
            self.processes[key].wait(timeout=20)


if __name__ == "__main__":
    if "broken" in sys.argv:
        os._exit(5)
    perform(Path(sys.argv[-1]), train)
