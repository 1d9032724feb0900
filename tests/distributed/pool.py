"""Gloo workers that live as long as the test session: one process per rank, one thread each, rendezvous by file."""

import datetime
import importlib
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT = 30
"""Seconds after which a collective that not all ranks join fails."""

GRACE = 5
"""Seconds that the other ranks get to answer after one has failed."""


class WorkerError(AssertionError):
    """What went wrong in a worker, with its rank and traceback."""


class World:
    """``size`` processes with a default process group, started on first use and remade after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """``function(rank, size, *args, **kwargs)``, a module-level function of a test, on every rank; by rank."""
        try:
            if not all(process.is_alive() for process, _ in self._workers):
                self.stop()
            if not self._workers:
                self._start()
            for _, pipe in self._workers:
                pipe.send((function.__module__, function.__qualname__, args, kwargs))
            results, errors = self._answers(timeout)
        except BaseException:  # also of Ctrl-C: workers whose answers nobody has read are of no more use
            self.stop()
            raise
        if errors:
            self.stop()
            raise WorkerError("\n".join(f"rank {rank} of {self.size}: {errors[rank]}" for rank in sorted(errors)))
        return [results[rank] for rank in range(self.size)]

    def _answers(self, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Results and errors by rank. Once one rank has failed the others, which may wait for it, get little time."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                word = "waits for a rank that failed" if errors else f"hangs: no answer in {timeout} s"
                errors |= dict.fromkeys(waiting.values(), word)
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except (EOFError, OSError):
                    process = self._workers[rank][0]
                    process.join(1)
                    ok, value = False, f"the worker died (exit code {process.exitcode})"
                (results if ok else errors)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results, errors

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self._folder.name) / "rendezvous"
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, str(rendezvous), theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def stop(self) -> None:
        """Ends the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _work(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send((True, function(rank, size, *args, **kwargs)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
