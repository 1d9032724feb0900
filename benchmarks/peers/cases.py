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
from typing import IO, Any

BENCHMARKS = Path(__file__).resolve().parent.parent


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
    built: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"cpu": [], "wall": []})
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _logs: list[IO[str]] = field(default_factory=list)

    def start(self, *, folders: Mapping[str, str], timeout: float, **config: Any) -> None:
        """Starts the processes and builds the optimizer; fills ``built`` and ``errors``."""
        self._timeout = timeout
        environment = os.environ | {"PYTHONPATH": str(BENCHMARKS), "TORCHDYNAMO_DISABLE": "1"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with tempfile.TemporaryDirectory() as folder:
            config |= {"name": self.name, "layout": self.layout, "ranks": self.ranks, "folders": dict(folders)}
            config |= {"timeout": timeout, "rendezvous": str(Path(folder) / "rendezvous")}
            for rank in range(self.ranks):
                self._logs.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - lives as long as the process
                command = [sys.executable, "-m", "peers.worker", json.dumps(config | {"rank": rank})]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._logs[-1]}
                self._processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
            ranks = self.tell("build")
        if ranks:
            self.built = {key: max(rank[key] for rank in ranks) for key in ranks[0] if key.endswith("_bytes")}
            self.built["extra"] = max(rank["extra_bytes"] / rank["parameter_bytes"] for rank in ranks)
            self.built["sent_by_rank"] = [sum(rank["sent"].values()) for rank in ranks]
            self.built["sent"] = max(self.built["sent_by_rank"])
            self.built["sent_by_operation"] = ranks[0]["sent"]
            self.built["collectives"] = sum(ranks[0]["collectives"].values())
            self.errors = (self.tell("errors") or [{}])[0]

    def step(self, seed: int) -> None:
        """One step with the gradients of ``seed``."""
        ranks = self.tell("step", seed)
        if ranks:
            for kind, values in self.seconds.items():
                values.append(max(rank[kind] for rank in ranks))

    def tell(self, *command: Any) -> list[dict[str, Any]] | None:
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

    def _lines(self, rank: int) -> list[str]:
        """What a rank wrote to standard error."""
        self._logs[rank].seek(0)
        lines = self._logs[rank].read().splitlines()
        return [line for line in lines if line.strip() and not line.startswith("USDT")]

    def log(self) -> str:
        """Standard error of all ranks."""
        return "\n".join("\n".join(self._lines(rank)) for rank in range(len(self._logs)))

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes = []
