"""How fast cohorts would train on this machine with all its workers busy: ``python -m disco.train.calibrate``.

Cores that share caches, or are threads of one core, slow each other, so the measurement loads them as a sweep does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from disco.errors import UserError
from disco.train.config import TrainConfig, from_dict, to_dict

SECONDS = 0.5
"""How long each cohort is measured, after two steps of warm-up."""

ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
"""Memory of activations stays with the process, in huge pages, instead of being mapped anew in every step."""


def environment(gpu: str = "") -> dict[str, str]:
    """Variables of a process that trains on one core or ``gpu``: one thread, no other GPU, and memory that it keeps;
    what else the user has set stays."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {"CUDA_VISIBLE_DEVICES": gpu}
    return {"GLIBC_TUNABLES": ALLOCATOR} | dict(os.environ) | one


def tokens_per_second(
    cohorts: Sequence[Sequence[TrainConfig]], cache: Path, workers: int, gpus: Sequence[str] = ()
) -> list[float]:
    """Tokens per second, of all its runs together, that one of ``workers`` processes trains each cohort at.

    Args:
        cohorts: runs that train together, their data prepared.
        cache: where their tokens are.
        workers: processes, of one thread each, that do the same at the same time.
        gpus: those that they share evenly; none: they train on cores.

    Raises:
        UserError: a process failed, for example because the data are too short for a batch; with its last line.
    """
    command = [sys.executable, "-m", "disco.train.calibrate", str(cache)]
    request = json.dumps([[to_dict(config) for config in cohort] for cohort in cohorts])

    def ask(worker: int) -> list[float]:
        place = environment(gpus[worker % len(gpus)] if gpus else "")
        done = subprocess.run(command, input=request, capture_output=True, text=True, env=place)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"the test of this machine's speed failed (exit code {done.returncode}): {why}")
        speeds: list[float] = json.loads(done.stdout)
        return speeds

    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(ask, range(workers)))
    return [sum(speeds) / workers for speeds in zip(*answers, strict=True)]


def _measure(configs: list[TrainConfig], cache: Path) -> float:
    import torch

    from disco.train.cohort import Program
    from disco.train.data import TokenStream

    first = configs[0]
    data = first.data
    stream = TokenStream(data, cache, context=first.model.context, seed=first.seed, repeat=data.repeat)
    program = Program(configs)
    for run in range(len(configs)):
        program.initialise(run)
    tokens, targets = (torch.from_numpy(part).expand(len(configs), -1, -1) for part in stream.batch(0, first.batch))

    def step() -> None:
        program.set_rates(1.0)
        program.gradients(tokens, targets)
        program.step()

    started = time.perf_counter()
    step()  # allocates and warms up
    first_took = time.perf_counter() - started
    if first_took > SECONDS:  # a large model: one step says enough
        return first.batch * len(configs) / first_took
    step()
    steps, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < SECONDS:
        step()
        steps += 1
    return steps * first.batch * len(configs) / passed


if __name__ == "__main__":
    asked = [[from_dict(TrainConfig, config) for config in cohort] for cohort in json.load(sys.stdin)]
    print(json.dumps([_measure(cohort, Path(sys.argv[1])) for cohort in asked]))
