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
from disco.sweep.engines._queue import FullError, JobState, Phase, QueueError
from disco.sweep.engines.task import perform
from disco.train.calibrate import environment


class FakeQueue:
    """Keeps what it was asked, and forgets or refuses on request."""

    engine = "fake"

    def __init__(
        self,
        config: JobConfig,
        refuse: int = 0,
        may_requeue: bool = True,
        broken: bool = False,
        room: int = 100,
        lose: str = "",
        deaf: int = 0,
    ) -> None:
        """
        Args:
            refuse: submissions that are refused, as if for good.
            may_requeue: else every requeue is refused.
            broken: jobs die before they train.
            room: jobs at the same time; the queue is full beyond.
            lose: of the first submission, "answer": it is taken, but seems to fail; "all": it fails without a reason.
            deaf: questions after that which are not answered.
        """
        self.config = config
        self.refuse, self.may_requeue, self.broken = refuse, may_requeue, broken
        self.room, self.lose, self.deaf = room, lose, deaf
        self.orders: dict[str, Path] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.requeues: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.submitted: list[list[str]] = []
        self.most = 0
        """Jobs at the same time."""

    def submit(self, name: str, orders: Sequence[Path]) -> None:
        if self.refuse > 0:
            self.refuse -= 1
            raise QueueError("no such partition")
        if self._running() + len(orders) > self.room:
            raise FullError("the queue is full")
        lose, self.lose = self.lose, ""
        if lose != "all":
            self.submitted.append([order.stem for order in orders])
            for order in orders:
                self._start(order)
            self.most = max(self.most, self._running())
        if lose:
            raise QueueError("no answer")

    def _running(self) -> int:
        """Jobs that have not come to their end, by themselves or otherwise."""
        return sum(process.poll() is None and not self._done(key) for key, process in self.processes.items())

    def _done(self, key: str) -> bool:
        said = self.orders[key].with_suffix(".jsonl")
        return said.exists() and b'"done"' in said.read_bytes()

    def _start(self, order: Path) -> None:
        command = [sys.executable, __file__, *(["broken"] if self.broken else []), str(order)]
        self.processes[order.stem] = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        self.orders[order.stem] = order
        self.requeues.setdefault(order.stem, 0)

    def requeue(self, key: str, order: Path) -> None:
        if not self.may_requeue:
            raise QueueError("may not be requeued")
        self.requeues[key] += 1
        self._start(order)

    def states(self, keys: Collection[str]) -> Mapping[str, JobState]:
        if self.submitted or self.lose == "":
            self.deaf -= 1
            if self.deaf >= 0:
                raise QueueError("no answer either")
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
