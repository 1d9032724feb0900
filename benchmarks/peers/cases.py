"""The processes of one optimizer, layout and number of ranks, seen from outside."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent


ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
MEASURING = {"TORCHDYNAMO_DISABLE": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""Environment of processes whose memory is measured: what is freed leaves the process."""


class Failed(Exception):  # noqa: N818 - it is a result, shown in the table
    """What a rank said before it ended."""


@dataclass
class Case:
    """An optimizer in one layout: one process for each rank, idle but when told something.

    ``seconds`` collects, for each round, the largest CPU and wall time of any rank.
    """

    name: str
    layout: str
    ranks: int
    failure: str | None = None
    log: str = ""
    """Standard error of all ranks, after a failure."""
    costs: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"cpu": [], "wall": []})
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _timeout: float = 0.0

    def measure(self, config: Mapping[str, Any]) -> None:
        """Fills ``costs`` and ``errors``, in processes that end with it."""
        self._start(config, MEASURING)
        errors, ranks = self._tell("errors"), self._tell("costs")
        if errors and ranks:
            self.errors = errors[0]
            sent = [sum(rank["sent"].values()) for rank in ranks]
            self.costs = {key: max(rank[key] for rank in ranks) for key in ranks[0] if key.endswith("_bytes")} | {
                "extra": max(rank["extra_bytes"] / rank["parameter_bytes"] for rank in ranks),
                "sent": max(sent),
                "sent_by_rank": sent,
                "sent_by_operation": ranks[0]["sent"],
                "collectives": ranks[0]["collectives"],
            }
        self.stop()

    def build(self, config: Mapping[str, Any], steps: int) -> None:
        """Starts the processes that ``step`` speaks to; ``steps`` are taken to warm up."""
        self._start(config, {"TORCHDYNAMO_DISABLE": "0" if config["compile"] else "1"})
        self._tell("build", steps)

    def step(self, seed: int) -> None:
        """One step with the gradients of ``seed``."""
        ranks = self._tell("step", seed)
        if ranks:
            for kind, values in self.seconds.items():
                values.append(max(rank[kind] for rank in ranks))

    def _start(self, config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        if self.failure is not None:
            return
        self._timeout = config["timeout"]
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(BENCHMARKS)} | environment
        self._folder = tempfile.TemporaryDirectory()
        own = {"name": self.name, "layout": self.layout, "ranks": self.ranks}
        own["rendezvous"] = str(Path(self._folder.name) / "rendezvous")
        for rank in range(self.ranks):
            command = [sys.executable, "-m", "peers.worker", json.dumps({**config, **own, "rank": rank})]
            with self._log(rank).open("w") as log:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                self._processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))

    def _tell(self, *command: Any) -> list[dict[str, Any]] | None:
        """Gives a command to all ranks and waits for their answers; None, and the processes ended, on any failure."""
        if self.failure is not None:
            return None
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()
            return self._answers()
        except (Failed, BrokenPipeError) as failed:
            self.failure = str(failed) or "its process ended"
            self.log = "\n".join("\n".join(self._lines(rank)) for rank in range(self.ranks))
            self.stop()
            return None

    def _answers(self) -> list[dict[str, Any]]:
        streams = {process.stdout: rank for rank, process in enumerate(self._processes)}
        answers: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + self._timeout
        while len(answers) < self.ranks:
            ready, _, _ = select.select(list(streams), [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise Failed(f"no answer within {self._timeout:g} s")
            for stream in ready:
                rank = streams.pop(stream)
                assert stream is not None
                line = stream.readline()
                if not line:
                    raise Failed(f"rank {rank} ended: {(self._lines(rank) or ['without a word'])[-1]}")
                answers[rank] = json.loads(line)
                if "error" in answers[rank]:
                    raise Failed(answers[rank]["error"])
        return [answers[rank] for rank in range(self.ranks)]

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{rank}.log"

    def _lines(self, rank: int) -> list[str]:
        """What a rank wrote to standard error."""
        return [line for line in self._log(rank).read_text().splitlines() if line.strip()]

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._processes = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
