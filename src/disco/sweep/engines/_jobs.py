"""What an engine has to do: runs, grouped into cohorts, and how far they are. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disco.runs.schema import Outcome
from disco.sweep.cohorts import Cohort
from disco.sweep.progress import Snapshot
from disco.sweep.study import new_tokens
from disco.train.config import TrainConfig, to_dict

Kind = tuple[int, int, int]


@dataclass(eq=False)
class Run:
    """A run and where it stands."""

    config: TrainConfig
    outcome: Outcome | None
    reached: int = 0
    """Tokens at the end of its record, once it has ended."""
    reason: str = ""
    tokens: int = 0
    """Tokens trained on, of those that are the run's own."""

    @property
    def total(self) -> int:
        return new_tokens(self.config)


@dataclass(eq=False)
class Job:
    """Runs that train together, the unit of work of a worker."""

    runs: list[Run]
    compiled: bool = False
    deaths: int = 0
    furthest: int = 0
    """How far its runs were, in tokens, when it died; of a cluster, where only deaths that come no further count."""
    running: bool = False
    heard: tuple[float, int] = (0.0, 0)
    """Time of its last progress, and how far its runs were."""

    def __str__(self) -> str:
        runs = [run.config.id for run in self.left]
        return f"run {runs[0]}" if len(runs) == 1 else f"runs {runs[0]} and {len(runs) - 1} more"

    def start(self) -> None:
        """It has been given to a worker."""
        self.running, self.heard = True, (0.0, 0)

    def order(self, out: Path) -> dict[str, Any]:
        """What a worker is told: the runs to train, in which folder of runs."""
        configs = [to_dict(run.config) for run in self.left]
        return {"configs": configs, "runs": str(out), "compiled": self.compiled}

    @property
    def left(self) -> list[Run]:
        """The runs that have not ended."""
        return [run for run in self.runs if run.outcome is None]

    @property
    def kind(self) -> Kind:
        """Jobs alike in this take about the same time per token."""
        config = self.runs[0].config
        return config.model.width, config.model.depth, config.batch

    def halves(self) -> list[Job]:
        """Two jobs with the runs that are left."""
        left = self.left
        return [Job(half, self.compiled) for half in (left[: len(left) // 2], left[len(left) // 2 :])]

    def cohort(self) -> Cohort:
        """As it is written down."""
        return Cohort(tuple(run.config for run in self.runs), self.compiled)


@dataclass
class Pace:
    """Seconds and tokens of training so far, by kind of job."""

    seen: dict[Kind, tuple[float, float]] = field(default_factory=dict)

    def add(self, kind: Kind, seconds: float, tokens: float) -> None:
        before = self.seen.get(kind, (0.0, 0.0))
        self.seen[kind] = before[0] + seconds, before[1] + tokens

    def snapshot(self, runs: Iterable[Run], jobs: Iterable[Job], workers: int) -> Snapshot:
        """Where the sweep stands, with ``workers`` processes."""
        runs, jobs = list(runs), list(jobs)
        seconds, trained = (sum(part) for part in zip((0.0, 0.0), *self.seen.values(), strict=True))
        average = seconds / trained if trained else float("nan")

        def per_token(job: Job) -> float:
            s, t = self.seen.get(job.kind, (0.0, 0.0))
            return s / t if t else average

        left = sum((run.total - run.tokens) * per_token(job) for job in jobs for run in job.left)
        outcomes = [run.outcome for run in runs]
        return Snapshot(
            runs=len(outcomes),
            ended=sum(o is not None for o in outcomes),
            running=sum(len(job.left) for job in jobs if job.running),
            diverged=outcomes.count(Outcome.DIVERGED),
            pruned=outcomes.count(Outcome.PRUNED),
            failed=outcomes.count(Outcome.FAILED),
            tokens=sum(run.total for run in runs),
            done=sum(run.tokens for run in runs),
            tokens_per_second=workers / average if trained else float("nan"),
            seconds_left=left / workers,
        )
