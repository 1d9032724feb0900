"""What runs will take before they are started: cohorts, memory, and time by a short calibration. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disco.sweep.adaptive.rounds import scans
from disco.sweep.cohorts import PROCESS_BYTES, Cohort, bytes_needed
from disco.sweep.places import Places
from disco.sweep.record import grouped, outcome
from disco.sweep.study import Study, new_tokens
from disco.train.calibrate import tokens_per_second
from disco.train.config import TrainConfig

OVERHEAD = 1.3
"""Time of a sweep over that of its training steps alone: evaluations, norms, checkpoints. Measured on the demo
(docs/log.md)."""

START_SECONDS = 4.0
"""Start of the workers."""

Speeds = Callable[[Sequence[Sequence[TrainConfig]], Path, int, Sequence[str]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What runs will take."""

    runs: int
    cohorts: int
    tokens: int
    memory: int
    """Bytes of all workers together at their largest cohorts, an upper estimate."""
    seconds: float
    workers: int
    gpus: int
    """On which they train; 0: on cores."""


def forecast(
    runs: Sequence[TrainConfig], out: Path, cache: Path, places: Places, speeds: Speeds = tokens_per_second
) -> Forecast:
    """What the runs will take.

    Args:
        runs: those that are left to do, their data prepared in ``cache``.
        out: folder of the sweep; it need not exist.
        cache: where the tokens are.
        places: where the workers train.
        speeds: measures the tokens per second of cohorts, not compiled; see ``train.calibrate``.
    """
    workers = places.workers
    cohorts = grouped(out, runs, workers, places.memory)
    kinds: dict[tuple[object, ...], Cohort] = {}
    for cohort in cohorts:
        kinds.setdefault(_kind(cohort), cohort)
    found = speeds([cohort.runs for cohort in kinds.values()], cache, workers, places.gpus) if kinds else []
    measured = dict(zip(kinds, found, strict=True))
    seconds = [sum(map(new_tokens, cohort.runs)) / measured[_kind(cohort)] for cohort in cohorts]
    memory = sorted((PROCESS_BYTES + sum(map(bytes_needed, cohort.runs)) for cohort in cohorts), reverse=True)
    return Forecast(
        runs=len(runs),
        cohorts=len(cohorts),
        tokens=sum(map(new_tokens, runs)),
        memory=int(sum(memory[:workers])),
        seconds=START_SECONDS + OVERHEAD * last_end(seconds, workers),
        workers=workers,
        gpus=len(places.gpus),
    )


def forecast_study(
    study: Study, out: Path, cache: Path, places: Places, speeds: Speeds = tokens_per_second
) -> Forecast:
    """What is left of a study will take; of an adaptive one the whole budget, at the speed of its first runs."""
    if not study.adaptive:
        left = [config for config in study.runs if outcome(config, out) is None]
        return forecast(left, out, cache, places, speeds)
    first = forecast(study.configs, out, cache, places, speeds)
    budget = sum(scan.space.budget for scan in scans(study))
    return replace(first, tokens=budget, seconds=first.seconds * budget / first.tokens)


def last_end(seconds: Sequence[float], workers: int) -> float:
    """When the last of these pieces of work ends, each given to the first worker that is idle, in their order."""
    ends = [0.0] * workers
    for piece in seconds:
        heapq.heapreplace(ends, ends[0] + piece)
    return max(ends)


def _kind(cohort: Cohort) -> tuple[object, ...]:
    """Cohorts alike in this are measured once."""
    first = cohort.runs[0]
    return first.model, first.batch, first.optimizer.name, len(cohort.runs)
