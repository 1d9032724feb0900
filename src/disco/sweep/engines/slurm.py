"""Slurm: arrays of jobs, submitted through submitit; states from squeue, which needs no accounting. No torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from disco.errors import UserError
from disco.sweep.clusters import SlurmConfig
from disco.sweep.engines._queue import FullError, JobState, Phase, QueueError
from disco.sweep.engines.task import perform
from disco.train.calibrate import environment

QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
"""Job state codes of the squeue manual; any other is an end."""
FIELDS = ("Name", "JobArrayID", "ArrayTaskID", "State", "Reason", "RestartCnt", "exit_code")
FOR_NOW = (
    "Slurm job queue full",
    "temporarily unable to accept job",
    "Resource temporarily unavailable",
    "Job creation temporarily disabled",
    "MaxSubmitJob",
    "job submit limit",
)
"""What sbatch says when a limit of jobs is reached: MaxJobCount of the cluster, MaxSubmitJobs of an account or QOS."""
SECONDS = 60
"""How long a command of Slurm may take."""


class SlurmTask:
    """A job of ``task.py``, as submitit carries it to the node.

    Before its time is over, and at SIGTERM, it saves and goes back into the queue, unless it was cancelled or Slurm
    requeues it already.
    """

    def __init__(self, order: Path) -> None:
        self.order = order

    def __call__(self) -> None:
        """Trains; does not return if it is requeued."""
        if perform(self.order) and _asked("squeue", "-h", "-j", _own_id(), "-o", "%T") == "RUNNING":
            _asked("scontrol", "requeue", _own_id())


class SlurmQueue:
    """The scheduler of this machine's Slurm.

    Raises:
        UserError: submitit or Slurm is not installed.
    """

    engine = "slurm"

    def __init__(self, config: SlurmConfig) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            raise UserError("--engine slurm needs the extra 'slurm': pip install 'disco-scion[slurm]'") from None
        _asked("sbatch", "--version")
        self.config = config
        self._submitit = submitit

    def submit(self, name: str, orders: Sequence[Path]) -> None:
        """One array of jobs."""
        try:
            executor = self._submitit.SlurmExecutor(orders[0].parent)
            executor.update_parameters(job_name=name, **self._parameters())
            executor.submit_array([SlurmTask(order) for order in orders])
        except (self._submitit.core.utils.FailedJobError, OSError, RuntimeError) as error:
            kind = FullError if any(words in str(error) for words in FOR_NOW) else QueueError
            raise kind(f"Slurm refused {len(orders)} jobs: {_line(str(error))}") from None

    def _parameters(self) -> dict[str, Any]:
        """Settings by submitit's names."""
        config = self.config
        optional = {
            "account": config.account,
            "partition": config.partition,
            "qos": config.qos,
            "constraint": config.constraint,
            "gpus_per_node": config.gpus or None,
        }
        one_thread = {key: environment()[key] for key in ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        threads = one_thread | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(config.cpus))
        options = [option.partition("=") for option in config.options]
        return {key: value for key, value in optional.items() if value is not None} | {
            "time": config.time,
            "cpus_per_task": config.cpus,
            "mem": f"{config.memory_bytes // 2**20}MB",
            "signal_delay_s": config.warning,
            "stderr_to_stdout": True,
            "setup": [*config.setup, *(f"export {key}={value}" for key, value in threads.items())],
            "additional_parameters": {"requeue": True}
            | {name: value if equals else True for name, equals, value in options},
        }

    def requeue(self, key: str, order: Path) -> None:
        """The same job again, which Slurm counts."""
        state = self.states([key]).get(key)
        if state is None:
            raise QueueError(f"Slurm has forgotten job {key}")
        _asked("scontrol", "requeue", state.id)

    def states(self, keys: Collection[str]) -> Mapping[str, JobState]:
        """From squeue, which tells of ended jobs for some minutes too."""
        names = ",".join(sorted({key.rpartition(".")[0] for key in keys}))
        form = ",".join(f"{field}:|" for field in FIELDS)
        answer = _asked("squeue", "--noheader", "--array", "--states=all", f"--name={names}", f"--Format={form}")
        found = {}
        for line in answer.splitlines():
            name, job, index, word, reason, restarts, code = (part.strip() for part in line.split("|")[: len(FIELDS)])
            phase = Phase.QUEUED if word in QUEUED else Phase.RUNNING if word in RUNNING else Phase.ENDED
            if reason == "NonZeroExitCode":
                reason = f"exit code {int(code) >> 8}"
            found[f"{name}.{index if index.isdigit() else 0}"] = JobState(
                id=job,
                phase=Phase.CANCELLED if word == "CANCELLED" else phase,
                word=word,
                reason="" if reason == "None" else reason,
                requeues=int(restarts),
            )
        return {key: found[key] for key in keys if key in found}

    def cancel(self, keys: Collection[str]) -> None:
        """Slurm sends SIGTERM, and after its KillWait SIGKILL."""
        live = [state.id for state in self.states(keys).values() if state.live]
        if live:
            _asked("scancel", *live)


def _own_id() -> str:
    """The job that this process is; the plain SLURM_JOB_ID of one job of an array means the whole array."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array else os.environ["SLURM_JOB_ID"]


def _asked(*command: str) -> str:
    """What a command of Slurm answers.

    Raises:
        QueueError: it fails or is not there.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise QueueError(f"Slurm is not here: there is no command {command[0]}") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"Slurm does not answer: {command[0]} took {SECONDS} seconds") from None
    if done.returncode:
        raise QueueError(f"Slurm: {_line(done.stderr) or f'{command[0]} ended with exit code {done.returncode}'}")
    return done.stdout.strip()


def _line(text: str) -> str:
    """The last line that names an error, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ([line for line in lines if "error" in line.lower()] or lines or [""])[-1]
