"""Where the workers of a local sweep train: one on each GPU, or where there is none, one on each core. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from disco.sweep.cohorts import SHARE, memory_to_use
from disco.train.config import TrainConfig
from disco.train.gpus import gpus


@dataclass(frozen=True)
class Places:
    """Places for the workers of a local sweep."""

    workers: int
    memory: int
    """Bytes that all workers together may fill, of the GPUs if they train there."""
    gpus: tuple[str, ...] = ()
    """GPUs that the workers share evenly, as ``CUDA_VISIBLE_DEVICES`` takes them; none: they train on cores."""


def places_for(runs: Iterable[TrainConfig], workers: int | None = None) -> Places:
    """Where ``workers`` processes train these runs.

    Args:
        runs: those of the study; GPUs are used unless all of them want the CPU (``parallel.device``). Where only some
            do, cohorts are for the smaller memory.
        workers: processes; by default one per GPU, or one per core that this process may use.
    """
    on_cpu = {config.parallel.device == "cpu" for config in runs}
    found = gpus() if False in on_cpu else ()
    if not found:
        return Places(workers or len(os.sched_getaffinity(0)), memory_to_use())
    workers = workers or len(found)
    each = SHARE * min(gpu.memory for gpu in found) / math.ceil(workers / len(found))
    memory = min(int(workers * each), memory_to_use()) if True in on_cpu else int(workers * each)
    return Places(workers, memory, tuple(gpu.name for gpu in found))
