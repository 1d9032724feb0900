"""What a job of a cluster asks for: the ``[slurm]`` and ``[ray]`` tables of a study file. No torch, no scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from disco.train.config import ConfigError, from_dict


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What all schedulers understand. A job trains one cohort of runs in one process, or one run in several."""

    jobs: int = 8
    """Jobs in the queue or running at the same time, at most; `--workers` replaces it."""
    processes: int = 1
    """Processes of a job on each node. Those of all nodes train one run, whose ``parallel`` sizes multiply to them."""
    cpus: int = 1
    """Cores of a process, and threads of torch. With 1, and one process, the numbers are those of the local engine, to
    the bit."""
    gpus: int = 0
    """Of a job, on each node."""
    memory: float = 4.0
    """GiB of a job, on each node; no more runs train together than fit."""

    def __post_init__(self) -> None:
        for name, least in (("jobs", 1), ("processes", 1), ("cpus", 1), ("gpus", 0)):
            _require(getattr(self, name) >= least, f"{name} must be {least} or more, got {getattr(self, name)}")
        _require(math.isfinite(self.memory) and self.memory > 0, f"memory is a number of GiB, got {self.memory:g}")

    @property
    def memory_bytes(self) -> int:
        """Memory of a job in bytes."""
        return int(self.memory * 2**30)

    @property
    def world(self) -> int:
        """Processes of a job on all nodes."""
        return self.processes


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(JobConfig):
    """Options of sbatch; what is not given is the cluster's default."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    """Of a job."""
    time: int = 60
    """Minutes until Slurm ends a job. Before that it saves and is requeued, as often as it takes."""
    warning: int = 90
    """Seconds before the end at which it does."""
    setup: tuple[str, ...] = ()
    """Lines of shell before training, such as "module load cuda"."""
    options: tuple[str, ...] = ()
    """Other long options of sbatch, such as "reservation=maintenance" or "exclusive"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.nodes >= 1, f"nodes must be 1 or more, got {self.nodes}")
        _require(self.time > 0, f"time is a number of minutes, 1 or more, got {self.time}")
        _require(0 < self.warning < 60 * self.time, f"warning must lie within the time, got {self.warning} seconds")
        _require(not any(option.startswith("-") for option in self.options), "options are without dashes: name=value")

    @property
    def world(self) -> int:
        """Processes of a job on all nodes."""
        return self.nodes * self.processes


@dataclass(frozen=True, kw_only=True)
class RayConfig(JobConfig):
    """Ray jobs; ``memory`` is asked for as Ray's logical resource."""

    address: str = ""
    """Of the cluster's dashboard, such as "http://head:8265"; the variable RAY_API_SERVER_ADDRESS or that of this
    machine if not given."""


CLUSTERS: Mapping[str, type[JobConfig]] = {"slurm": SlurmConfig, "ray": RayConfig}
"""Engines besides ``local``, and the section of a study file that is theirs."""


def read_cluster(engine: str, table: Mapping[str, Any]) -> JobConfig:
    """The settings of an engine in a study file's content.

    Raises:
        ConfigError: an unknown key or a bad value, named.
    """
    try:
        config: JobConfig = from_dict(CLUSTERS[engine], table.get(engine, {}), f"{engine}.")
        return config
    except ConfigError as error:
        named = f"{engine}." in str(error) or str(error).startswith(f"{engine} ")
        raise ConfigError(str(error) if named else f"{engine}.{error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
