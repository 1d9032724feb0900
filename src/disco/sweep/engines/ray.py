"""Ray: jobs of its job server, which outlive the process that submitted them. No torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from disco.errors import UserError
from disco.sweep.clusters import RayConfig
from disco.sweep.engines._queue import JobState, Phase, QueueError
from disco.train.calibrate import environment

T = TypeVar("T")
PHASES = {"PENDING": Phase.QUEUED, "RUNNING": Phase.RUNNING, "STOPPED": Phase.CANCELLED}
"""Ray's JobStatus; SUCCEEDED and FAILED are ends."""
INHERITED = ("PYTHONPATH", "GLIBC_TUNABLES")


class RayQueue:
    """The job server of a Ray cluster. Ray has no requeue: a job that is started again is "<key>.r1", "<key>.r2", ...

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """

    engine = "ray"

    def __init__(self, config: RayConfig) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise UserError("--engine ray needs the extra 'ray': pip install 'disco-scion[ray]'") from None
        self.config = config
        address = config.address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
        self._client = _asked(f"no Ray cluster answers at {address}", lambda: JobSubmissionClient(address))

    def submit(self, name: str, orders: Sequence[Path]) -> None:
        """One job after the other; if one is refused, those before it are stopped."""
        for index, order in enumerate(orders):
            try:
                self._start(f"{name}.{index}", order)
            except QueueError:
                self.cancel([f"{name}.{before}" for before in range(index)])
                raise

    def _start(self, submission: str, order: Path) -> None:
        config = self.config
        command = shlex.join([sys.executable, "-m", "disco.sweep.engines.task", str(order)])
        variables = {key: value for key, value in environment().items() if key in INHERITED}
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(config.cpus))
        _asked(
            "Ray refused a job",
            lambda: self._client.submit_job(
                entrypoint=f"exec {command}",
                submission_id=submission,
                runtime_env={"env_vars": variables},
                entrypoint_num_cpus=config.cpus * config.processes,
                entrypoint_num_gpus=config.gpus,
                entrypoint_memory=config.memory_bytes,
            ),
        )

    def requeue(self, key: str, order: Path) -> None:
        """A new job for the same order."""
        attempts = self._attempts([key])
        if not attempts:
            raise QueueError(f"Ray has forgotten job {key}")
        self._start(f"{key}.r{max(attempts[key]) + 1}", order)

    def states(self, keys: Collection[str]) -> Mapping[str, JobState]:
        """From the job server: of each key the last attempt."""
        states = {}
        for key, attempts in self._attempts(keys).items():
            last = max(attempts)
            details = attempts[last]
            word = str(details.status.value)
            phase = PHASES.get(word, Phase.ENDED)
            reason = " ".join((details.message or "").split()).split(". ")[0] if phase != Phase.RUNNING else ""
            states[key] = JobState(id=details.submission_id, phase=phase, word=word, reason=reason, requeues=last)
        return states

    def _attempts(self, keys: Collection[str]) -> dict[str, dict[int, Any]]:
        """Details of every attempt, by key and number."""
        found: dict[str, dict[int, Any]] = {}
        for details in _asked("Ray does not answer", self._client.list_jobs):
            key, _, number = (details.submission_id or "").partition(".r")
            if key in keys:
                found.setdefault(key, {})[int(number or 0)] = details
        return found

    def cancel(self, keys: Collection[str]) -> None:
        """Ray sends SIGTERM, and some seconds later SIGKILL (its RAY_JOB_STOP_WAIT_TIME_S)."""
        for state in self.states(keys).values():
            if state.live:
                _asked(f"Ray cannot stop job {state.id}", partial(self._client.stop_job, state.id))


def _asked(trouble: str, call: Callable[[], T]) -> T:
    """What Ray answers; its client raises plain errors of several kinds.

    Raises:
        QueueError: it does not.
    """
    try:
        return call()
    except (RuntimeError, OSError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QueueError(f"{trouble}: {why}") from None
