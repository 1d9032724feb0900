"""How fast a run would train on this machine, from a few of its steps."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from disco.groups import init_
from disco.train.config import TrainConfig
from disco.train.data import TokenStream
from disco.train.loop import build_optimizer
from disco.train.model import Llama


def tokens_per_second(config: TrainConfig, cache: Path, seconds: float = 0.3) -> float:
    """Training tokens per second of one thread, measured for about ``seconds`` after two steps of warm-up.

    Args:
        config: the run, its data prepared.
        cache: where its tokens are.
    """
    torch.set_num_threads(1)
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
    while time.perf_counter() - started < seconds:
        step()
        steps += 1
    return steps * config.batch / (time.perf_counter() - started)
