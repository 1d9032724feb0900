"""Worker processes of a local sweep (``disco.sweep.worker``), kept until they are closed. No torch here."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, Any, Self

from disco.sweep.engines._jobs import Job
from disco.train.calibrate import environment

WORKER = (sys.executable, "-m", "disco.sweep.worker")


class Worker:
    """A worker process, the job that it is at, and what it said."""

    def __init__(self, command: tuple[str, ...], log: IO[bytes], gpu: str = "") -> None:
        self.gpu = gpu
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(gpu), bufsize=0
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


class Pool:
    """The living workers. A context manager that ends them."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self.workers: list[Worker] = []
        self._command = tuple(command)
        self._selector = selectors.DefaultSelector()

    def start(self, log: IO[bytes], gpus: Sequence[str] = ()) -> None:
        """Starts one more, on the one of ``gpus`` with the fewest; what it prints goes to ``log``."""
        taken = [worker.gpu for worker in self.workers]
        worker = Worker(self._command, log, min(gpus, key=taken.count, default=""))
        self.workers.append(worker)
        self._selector.register(worker.outbox, selectors.EVENT_READ, worker)

    def heard(self, timeout: float) -> Iterator[tuple[Worker, list[dict[str, Any]] | None]]:
        """Workers that said something within ``timeout`` seconds, with it; None and the last time: it has died."""
        for key, _ in self._selector.select(timeout=timeout):
            worker: Worker = key.data
            messages = worker.receive()
            if messages is None:
                self._selector.unregister(worker.outbox)
                self.workers.remove(worker)
            yield worker, messages

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()
        self.workers.clear()
        self._selector.close()
