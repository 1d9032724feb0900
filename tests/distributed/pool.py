"""Gloo workers that live as long as the test session: one process per rank, one thread each, rendezvous by file."""

import datetime
import importlib
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 30
"""Seconds after which a collective that not all ranks join fails."""


class WorkerError(AssertionError):
    """What went wrong in a worker, with its rank and traceback."""


class World:
    """``size`` processes with a default process group, started on first use and remade after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """``function(rank, size, *args, **kwargs)``, a module-level function of a test, on every rank; by rank."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function.__module__, function.__qualname__, args, kwargs))
        results, errors = [], []
        for rank, (process, pipe) in enumerate(self._workers):
            try:
                if not pipe.poll(timeout):
                    raise EOFError(f"no answer in {timeout} s")
                ok, value = pipe.recv()
            except (EOFError, OSError) as error:
                ok, value = False, f"the worker died or hangs: {error} (exit code {process.exitcode})"
            results.append(value)
            if not ok:
                errors.append(f"rank {rank} of {self.size}: {value}")
        if errors:
            self.stop()
            raise WorkerError("\n".join(errors))
        return results

    def _start(self) -> None:
        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
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
        self._workers = []


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
