"""A plan and runs of a made-up law of growth: log2 norm = SLOPE log2(1 + path) for every layer group."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from disco.guide import Curvatures, Estimate, Plan
from disco.guide._bands import bands
from disco.guide._course import Course

SLOPE = 0.6
BATCH, RATE, TOKENS = 256, 2.0**-1, 2**18
SETTINGS = {"optimizer.name": "scion", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0}


def law(path: Any) -> Any:
    """log2 norm."""
    return SLOPE * np.log2(1 + np.asarray(path))


def momentum(path: Any, batch: float) -> Any:
    """log2 of its size: noise, of which a quarter as many tokens have twice as much, and a signal that fades."""
    return np.log2(np.hypot(4.0 / (1 + np.asarray(path)), np.sqrt(256 / batch)))


def run(
    rate: float = RATE,
    batch: int = BATCH,
    share: float = 1.0,
    seed: int = 0,
    noise: float = 0.01,
    really: float = 1.0,
    **changes: Any,
) -> Course:
    """A run of ``share`` of the horizon; its norms are the law's but for a factor that stays with it.

    ``really``: its batch over the declared one.
    """
    steps = np.unique(np.round(2 ** np.arange(0, np.log2(share * TOKENS / batch) + 1e-9, 0.25)))
    steps = np.append(steps, share * TOKENS / batch) if steps[-1] < share * TOKENS / batch else steps
    random = np.random.default_rng(seed)
    path = rate * steps
    norms = {group: 2 ** (law(path) + random.normal(0, noise)) for group in ("input", "hidden", "output")}
    sizes = {group: 2 ** (momentum(path, really * batch) + random.normal(0, 5 * noise)) for group in norms}
    values: dict[str, Any] = {
        "tokens": steps * batch, "path": path, "lr": np.full(len(steps), rate), "norm": norms["output"],
        "loss": 5.5 - 0.2 * np.log2(steps * batch / 256) + random.normal(0, 0.02, len(steps)),
        "norms": norms, "momenta": sizes, "batch": float(batch), "rate": rate, "horizon": float(TOKENS),
        "width": 16.0, "depth": 1.0,
    }  # fmt: skip
    return Course(**values | changes)


def study() -> list[Course]:
    """Five rates at three batches, two seeds."""
    return [
        run(RATE * 2.0**u, int(BATCH * 2.0**b), seed=100 + 10 * (3 * u + b) + s)
        for u in range(-2, 3) for b in (-1, 0, 1) for s in (0, 1)
    ]  # fmt: skip


def plan(courses: Sequence[Course] = (), **changes: Any) -> Plan:
    """The plan at ``RATE``, where the norm ends at what the law says, give or take 0.1 octaves."""
    end = float(law(RATE * TOKENS / BATCH))
    values: dict[str, Any] = {
        "family": "scion", "model": "d16-L1", "tokens": TOKENS, "octaves": 0.0, "cells": 9, "warnings": (),
        "batch": Estimate(float(BATCH), None, "given", "given"), "lr": Estimate(RATE, None, "rule", "made up"),
        "norm": Estimate(2**end, (2 ** (end - 0.1), 2 ** (end + 0.1)), "rule", "made up"),
        "curvature": Curvatures(lr=0.02, batch=0.01), "settings": SETTINGS, "bands": bands(courses, BATCH, RATE),
    }  # fmt: skip
    return Plan(**values | changes)
