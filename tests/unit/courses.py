"""Courses made by a law of growth that is known: n grows by rate x speed(n) - rate x decay x n, step by step."""

import math
from typing import Any

import numpy as np

from disco.guide._course import Course


def speed(norm: float, batch: float = 1024.0) -> float:
    """dn/dS: all steps agree while the norm is small; later n^2 grows with S, sooner at small batches."""
    turn = 2.0 ** (4.0 + 0.1 * math.log2(batch / 1024))
    return 0.9 / (1 + (norm / turn) ** 2) ** 0.5


def made(
    batch: float = 1024.0,
    rate: float = 0.25,
    horizon: float = 2.0**20,
    *,
    own: float = 0.0,
    seed: int = 0,
    **settings: Any,
) -> Course:
    """A run with points at steps 2^(k/2); its speed is 2^own times the law's, and varies a little by itself."""
    rng = np.random.default_rng(seed)
    course = Course(
        tokens=np.zeros(1), path=np.zeros(1), lr=np.full(1, rate), norm=np.ones(1), loss=np.full(1, math.nan),
        batch=batch, rate=rate, horizon=horizon, width=64.0, depth=2.0, **settings,
    )  # fmt: skip
    steps = int(horizon / batch)
    points = {round(2 ** (k / 2)) for k in range(2 * steps.bit_length())} | {steps}
    ratio, norm, path, noise = course.ratios.get("output", 1.0), 1.0, 0.0, 0.0
    rows = [(0.0, 0.0, rate, 1.0)]
    factors = course.factor((np.arange(steps) + 0.5) * batch)
    for step in range(1, steps + 1):
        lr = rate * float(factors[step - 1])
        noise += 0.02 * (rng.normal() - noise) if seed else 0.0
        norm += ratio * lr * (speed(norm, batch) * 2 ** (own + noise) - course.weight_decay * norm)
        path += lr
        if step in points:
            rows.append((step * batch, path, lr, norm))
    tokens, paths, rates, norms = np.array(rows).T
    return Course(**{**vars(course), "tokens": tokens, "path": paths, "lr": rates, "norm": norms,
                     "loss": np.full(len(tokens), math.nan)})  # fmt: skip


def study(**settings: Any) -> list[Course]:
    """Three batches by four rates."""
    return [
        made(batch, rate, seed=index + 1, own=0.03 * math.sin(9.0 * index), **settings)
        for index, (batch, rate) in enumerate((b, r) for b in (512.0, 1024.0, 4096.0) for r in (1.0, 0.5, 0.25, 0.06))
    ]
