"""Studies with a known truth, as columns for a fit and as run records for a page."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from disco.runs.schema import SCHEMA_VERSION, Outcome, norm_key
from disco.runs.writer import RunWriter
from disco.train.config import ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig, to_dict

START = math.log(256)
GROUPS = {
    "input": ["tok_embeddings"],
    "hidden": [f"layers.{layer}.{part}" for layer in (0, 1) for part in ("attention.wo", "feed_forward.w2")],
    "output": ["output"],
    "vector": [],
}


def columns(
    rates: np.ndarray,
    batches: tuple[int, ...] = (512, 1024, 2048, 4096, 8192),
    horizons: tuple[int, ...] = (2**18, 2**19, 2**20, 2**21),
    seeds: tuple[int, ...] = (0,),
    noise: float = 0.002,
    exponents: tuple[float, float, float] = (0.6, -0.5, 0.5),
    norm: float = 6.0,
    drift: float = 0.0,
    model: tuple[int, int] = (32, 2),
    rng: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """A table of runs at horizons whose optima follow power laws.

    ``exponents``: of the batch and the tokens in lr*, of the tokens in batch*; at 2^20 tokens batch* = 2^11, and there
    lr* = 2^-4. ``norm``: log2 of norm* at 2^20 tokens; ``drift``: its octaves per doubling of tokens.
    ``rates``: log2 of the learning rates of the grid.
    """
    rng = rng or np.random.default_rng(0)
    of_batch, of_tokens, best = exponents
    rows = []
    for tokens in horizons:
        octave = math.log2(tokens) - 20
        for batch in batches:
            away = math.log2(batch) - 11
            lr_best = -4 + of_batch * away + of_tokens * octave
            for rate in rates:
                for seed in seeds:
                    off = rate - lr_best
                    loss = 2.0 - 0.1 * octave + 0.06 * off**2 + 0.02 * (away - best * octave) ** 2
                    rows.append(
                        {
                            "run": f"b{batch}-r{rate}-s{seed}", "model": f"d{model[0]}-L{model[1]}", "family": "scion",
                            "width": model[0], "depth": model[1], "parameters": 12 * model[0] ** 2 * model[1],
                            "seed": seed, "batch": batch, "lr": 2.0**rate, "tokens": tokens, "sigma": noise,
                            "loss": loss + rng.normal(0, noise), "loss_start": START, "diverged": False,
                            "norm/output/rms_to_inf": 2.0 ** (norm + drift * octave + 0.8 * off),
                        }
                    )  # fmt: skip
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def write_runs(
    folder: Path,
    rates: tuple[float, ...] = (-7, -6, -5, -4, -3, -2, -1),
    batches: tuple[int, ...] = (512, 1024, 2048, 4096, 8192),
    last: int = 2**22,
    models: tuple[tuple[int, int], ...] = ((32, 2),),
    seed: int = 0,
    momentum: float = 0.0,
    diverge: float = math.inf,
) -> Path:
    """Run records of a made-up trainer whose norm is a function of the path length and whose loss is a bowl in it."""
    rng = np.random.default_rng(seed)
    for width, depth in models:
        for batch in batches:
            for rate in rates:
                config = TrainConfig(
                    model=ModelConfig(width=width, depth=depth, head_size=16, context=128),
                    optimizer=OptimizerConfig(lr=2.0**rate, momentum=momentum),
                    schedule=ScheduleConfig(),
                    batch=batch,
                    horizon=last,
                    seed=seed,
                )
                run = f"d{width}L{depth}m{momentum:g}b{batch}r{-rate:g}s{seed}"
                _write(folder / run, run, config, rate > diverge, rng)
    return folder


def _write(folder: Path, run: str, config: TrainConfig, diverges: bool, rng: np.random.Generator) -> None:
    content = to_dict(config)
    content["data"] |= {"digest": "0" * 12, "vocab": 256, "valid_tokens": 2**15}
    document = {
        "schema": SCHEMA_VERSION,
        "id": run,
        "config": content,
        "groups": GROUPS,
        "parameters": config.model.parameters(256),
    }
    lr, batch = config.optimizer.lr, config.batch
    with RunWriter(folder) as writer:
        writer.start(document)
        horizons = [2**k for k in range(17, int(math.log2(config.horizon)) + 1)]
        for step, at_horizon in _points(batch, horizons):
            if diverges and step > 40:
                break
            writer.append(_line(step, batch, lr, config.model, at_horizon, rng))
        outcome = Outcome.DIVERGED if diverges else Outcome.FINISHED
        writer.finish(outcome, step=step, tokens=step * batch)


def _points(batch: int, horizons: list[int]) -> list[tuple[int, bool]]:
    """Steps with a line, and whether it has a held-out loss."""
    valid = {0}
    for tokens in horizons:
        step = tokens // batch
        spacing = max(1, step // 64)
        valid |= {s for s in (step - 2 * spacing, step - spacing, step) if s > 0}
    end = max(valid)
    curve = {round(2 ** (k / 2)) for k in range(2 * int(math.log2(end)) + 1)}
    return [(step, step in valid) for step in sorted(valid | curve)]


def _line(
    step: int, batch: int, lr: float, model: ModelConfig, at_horizon: bool, rng: np.random.Generator
) -> dict[str, float]:
    path, tokens = step * lr, step * batch
    known = ([-8, -2, 2, 4, 6, 8, 10, 14], [0.02, 0.3, 2.4, 3.8, 5.2, 6.25, 7.1, 8.6])
    norm = float(np.interp(math.log2(path), *known)) if step else 0.0
    norm += 0.1 * (math.log2(lr) > -2)
    loss = START
    if step:
        octave = math.log2(tokens) - 20
        off = norm - (5.9 - 0.1 * max(0.0, 1 - octave) + 0.1 * math.log2(model.width / 32))
        away = math.log2(batch) - 11 - 0.4 * (octave - 1)
        loss = 1.3 + 1.0 * 2 ** (-0.12 * octave) - 0.1 * math.log2(model.width / 32)
        loss = min(loss + 0.05 * off**2 * math.exp(-0.12 * off) + 0.02 * away**2, START)
    line = {
        "step": step, "tokens": tokens, "path": path, "loss/train": loss + rng.normal(0, 0.004), "lr/output": lr,
        norm_key("rms_to_inf", "output"): 2**norm, norm_key("rms_to_rms", "output"): 2 ** (0.92 * norm),
        norm_key("one_to_rms", "tok_embeddings"): 2 ** (0.75 * norm), "time/wall": 0.01 * step,
    }  # fmt: skip
    for index, layer in enumerate(GROUPS["hidden"]):
        line[norm_key("rms_to_rms", layer)] = 2 ** (0.8 * norm + 0.1 * index - 1)
    if at_horizon:
        line["loss/valid"] = loss + rng.normal(0, 0.002)
    return line
