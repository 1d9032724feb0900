"""How fast runs would train on this machine with all its workers busy: ``python -m disco.train.calibrate``.

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
"""How long each kind of run is measured, after two steps of warm-up."""


def tokens_per_second(configs: Sequence[TrainConfig], cache: Path, workers: int) -> list[float]:
    """Tokens per second that one of ``workers`` processes trains on, for each configuration.

    Args:
        configs: runs, their data prepared.
        cache: where their tokens are.
        workers: processes, of one thread each, that do the same at the same time.

    Raises:
        UserError: a process failed, for example because the data are too short for a batch; with its last line.
    """
    command = [sys.executable, "-m", "disco.train.calibrate", str(cache)]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    request = json.dumps([to_dict(config) for config in configs])

    def ask(worker: int) -> list[float]:
        done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"the test of this machine's speed failed (exit code {done.returncode}): {why}")
        speeds: list[float] = json.loads(done.stdout)
        return speeds

    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(ask, range(workers)))
    return [sum(speeds) / workers for speeds in zip(*answers, strict=True)]


def _measure(config: TrainConfig, cache: Path) -> float:
    import torch

    from disco.groups import init_
    from disco.train.cohort import build_optimizer
    from disco.train.data import TokenStream
    from disco.train.model import Llama

    stream = TokenStream(config.data, cache, context=config.model.context, seed=config.seed)
    model = Llama(config.model, config.data.vocab)
    init_(model, model.init_scales())
    optimizer = build_optimizer(model, config.optimizer)
    tokens, targets = map(torch.from_numpy, stream.batch(0, config.batch))

    def step() -> None:
        optimizer.zero_grad()
        model.loss(tokens, targets).backward()
        optimizer.step()

    step()
    step()
    steps, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < SECONDS:
        step()
        steps += 1
    return steps * config.batch / passed


if __name__ == "__main__":
    print(json.dumps([_measure(from_dict(TrainConfig, item), Path(sys.argv[1])) for item in json.load(sys.stdin)]))
