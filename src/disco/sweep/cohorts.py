"""Which runs train together: as many as fit into memory and gain from it, and few enough to keep all workers busy.

Shape letters as in ``train/model.py``. No torch.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from disco.sweep.study import new_tokens
from disco.train.config import TrainConfig, cohort_key

TOKENS = 2**14
"""Tokens of all runs in one step beyond which a cohort gains nothing: activations leave the caches of a core."""

MEMBERS = 32
"""Runs beyond which it gains nothing at the smallest batches."""

SHARE = 0.5
"""Part of the machine's available memory that all workers together may fill."""

SPREAD = 2
"""Cohorts for each worker, at least, if there are runs enough: so that none waits long for the last one."""

COMPILED_WORK = 2.0**44
"""Operations of a cohort from which ``torch.compile`` pays: some six minutes of a core, of which it saves 10 to 20% for
10 to 20 seconds of compilation (docs/log.md)."""

PROCESS_BYTES = 400 * 2**20
"""Memory of a worker that trains nothing: Python and torch."""


@dataclass(frozen=True)
class Cohort:
    """Runs that train together."""

    runs: tuple[TrainConfig, ...]
    compiled: bool = False
    """Whether the model is compiled. Like the grouping, it changes the rounding only."""

    @property
    def work(self) -> float:
        """Floating-point operations of all runs."""
        return sum(map(work, self.runs))


def group(
    runs: Sequence[TrainConfig],
    stands_at: Callable[[TrainConfig], int],
    begun: Sequence[Cohort],
    workers: int,
    memory: int,
) -> list[Cohort]:
    """Divides runs into cohorts, in the order in which they should start: the longest work first.

    Args:
        runs: those that are to be trained, their data prepared.
        stands_at: tokens that a run has been trained for before.
        begun: what is left of interrupted cohorts; they stay as they are, so that they leave the same numbers, unless
            their runs now train on several processes, each alone.
        workers: processes that train cohorts at the same time.
        memory: bytes that they may use together.
    """
    cohorts = [part for cohort in begun for part in _trainable(cohort)]
    taken = {config.id for cohort in begun for config in cohort.runs}
    waiting = [config for config in runs if config.id not in taken]
    families: dict[tuple[str, int], list[TrainConfig]] = {}
    for config in waiting:
        families.setdefault((cohort_key(config), stands_at(config)), []).append(config)
    most = sum(map(work, waiting)) / (SPREAD * workers)
    for family in families.values():
        fair = max(1, int(most / max(1.0, work(family[0]))))
        parts = math.ceil(len(family) / min(fair, largest(family[0], memory // workers)))
        cohorts += [_cohort(family[part::parts]) for part in range(parts)]
    return sorted(cohorts, key=lambda cohort: -cohort.work)


def _trainable(cohort: Cohort) -> list[Cohort]:
    """The cohort, or where its runs train on several processes a cohort for each."""
    if cohort.runs[0].parallel.processes == 1:
        return [cohort]
    return [Cohort((run,), cohort.compiled and _may_compile(run)) for run in cohort.runs]


def _cohort(runs: Sequence[TrainConfig]) -> Cohort:
    pays = sum(map(work, runs)) >= COMPILED_WORK
    there = shutil.which(os.environ.get("CXX", "g++")) is not None
    return Cohort(tuple(runs), compiled=pays and there and _may_compile(runs[0]))


def _may_compile(config: TrainConfig) -> bool:
    return config.parallel.tensor == 1  # see TrainConfig


def largest(config: TrainConfig, memory: int) -> int:
    """Runs like this one that a worker with so many bytes should train together; at least 1.

    A run on several processes trains alone.
    """
    if config.parallel.processes > 1:
        return 1
    fitting = int((memory - PROCESS_BYTES) / bytes_needed(config))
    return max(1, min(MEMBERS, TOKENS // config.batch, fitting))


def bytes_needed(config: TrainConfig) -> float:
    """Memory that one run of a cohort adds to a worker: 1.0 to 1.5 times what was measured (docs/log.md).

    Activations kept for the backward pass are L (9 D + 4 F + 2 H) + 2 D + 3 V floats for each token, with F the hidden
    width of the feed-forward block; then come weights, gradients, optimizer state and what orthogonalisation takes.
    """
    model, vocab = config.model, config.data.vocab
    per_token = model.depth * (9 * model.width + 4 * model.hidden + 2 * model.heads) + 2 * model.width + 3 * vocab
    return 4 * (1.6 * per_token * config.batch + 6 * model.parameters(vocab))


def work(config: TrainConfig) -> float:
    """Floating-point operations of a run, roughly: 6 for a parameter and token (Kaplan et al., arXiv:2001.08361)."""
    return 6.0 * config.model.parameters(config.data.vocab) * new_tokens(config)


def memory_to_use() -> int:
    """Bytes that all workers together may fill: ``SHARE`` of what the machine, or this process's control group, has."""
    return int(SHARE * min(_machine(), _control_group()))


def _machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _control_group() -> float:
    folder = Path("/sys/fs/cgroup")
    try:
        return float((folder / "memory.max").read_text()) - float((folder / "memory.current").read_text())
    except (OSError, ValueError):  # none, or its limit is "max"
        return math.inf
