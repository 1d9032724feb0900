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
from pathlib import Path

from disco.train.config import TrainConfig, from_dict, to_dict

SECONDS = 0.5
"""How long each kind of run is measured, after two steps of warm-up."""


def tokens_per_second(configs: Sequence[TrainConfig], cache: Path, workers: int) -> list[float]:
    """Tokens per second that one of ``workers`` processes trains on, for each configuration.

    Args:
        configs: runs, their data prepared.
        cache: where their tokens are.
        workers: processes, of one thread each, that do the same at the same time.
    """
    command = [sys.executable, "-m", "disco.train.calibrate", str(cache)]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(workers)
    ]
    request = json.dumps([to_dict(config) for config in configs])
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(request)
        process.stdin.close()
    answers = []
    for process in processes:
        assert process.stdout is not None
        answers.append(json.loads(process.stdout.read()))
        process.wait()
    return [sum(speeds) / workers for speeds in zip(*answers, strict=True)]


def _measure(config: TrainConfig, cache: Path) -> float:
    import torch

    from disco.groups import init_
    from disco.train.data import TokenStream
    from disco.train.loop import build_optimizer
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
