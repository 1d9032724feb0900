"""Faults injected into runs that follow a plan: after how many tokens the norms show them, and the loss.

    python -m benchmarks.faults FOLDER [--size full]

A study is trained at several rates, batches and seeds; the bands of its runs at the planned settings are what a plan
holds. Then runs at the planned settings: healthy ones of other seeds, and ones whose optimizer or data are not what
they declare. A fault is flagged at the first logged point at which a layer group's norm is off its band; the loss shows
it at the first point at which it is farther from the healthy runs' losses than these are from each other.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy import stats

from disco.guide._bands import ALARMS, LOSS, Band, bands
from disco.guide._course import Course, course
from disco.guide._faults import looks_like, seen
from disco.norms import Spectral
from disco.runs.reader import Run, read_run
from disco.runs.schema import Metric
from disco.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, to_dict
from disco.train.loop import train_cohort

SHARDS = 4


@dataclass(frozen=True)
class Size:
    """How large the study and its runs are."""

    width: int
    depth: int
    horizon: int
    batch: int
    """Planned, tokens; the study has half and twice of it too."""
    rate: float
    """Planned; the study has an octave on either side too."""
    study_seeds: int
    seeds: int
    """Of healthy runs, and of each fault."""
    faulty: int


SIZES = {
    "small": Size(16, 1, 2**16, 1024, 2**-4, 2, 6, 1),
    "full": Size(32, 2, 2**18, 1024, 2**-4, 3, 40, 5),
}
FAULTS = ("momentum", "small batch", "large batch", "decay", "ratio", "shards")
LARGE = 8
"""Times the batch that is declared: that of one GPU in place of that of eight."""


def planned(size: Size, seed: int = 0, *, rate: float | None = None, batch: int | None = None) -> TrainConfig:
    """The run that is planned: momentum 0.9 and a ratio of 1/8 for the hidden layers."""
    batch = batch or size.batch
    return TrainConfig(
        model=ModelConfig(width=size.width, depth=size.depth, head_size=8, context=64),
        data=DataConfig(valid_tokens=1024),
        optimizer=OptimizerConfig(lr=rate or size.rate, momentum=0.9, ratios={"hidden": 1 / 8}),
        batch=batch,
        horizon=size.horizon,
        seed=seed,
    )


def with_fault(config: TrainConfig, fault: str) -> TrainConfig:
    """What is really trained where ``config`` is declared."""
    optimizer = config.optimizer
    match fault:
        case "momentum":  # the weight of the new gradient taken for that of the old buffer
            return replace(config, optimizer=replace(optimizer, momentum=0.1))
        case (
            "small batch"
        ):  # one sequence where there should be all: 1 taken for the number of batches, not of sequences
            real = config.model.context
            return replace(config, batch=real, horizon=config.horizon // config.batch * real)
        case "large batch":
            return replace(config, batch=LARGE * config.batch, horizon=LARGE * config.horizon)
        case "decay":
            return replace(config, optimizer=replace(optimizer, weight_decay=0.1))
        case "ratio":
            return replace(config, optimizer=replace(optimizer, ratios={}))
    return config


@contextlib.contextmanager
def injected(fault: str) -> Iterator[None]:
    """A patch of the optimizer for the fault that no setting makes: blocks of rows are orthogonalised apart."""
    whole = Spectral._lmo

    def per_shard(self: Spectral, gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(self, part) for part in gradient.chunk(SHARDS, dim=-2)], dim=-2)

    with mock.patch.object(Spectral, "_lmo", per_shard) if fault == "shards" else contextlib.nullcontext():
        yield


def train(folder: Path, configs: Sequence[TrainConfig], fault: str = "") -> list[Course]:
    """Trains runs that are alike but for rate and seed, with a fault that their records do not declare."""
    runs = folder / (fault or "healthy")
    real = [with_fault(config, fault) for config in configs]
    with injected(fault):
        ended = train_cohort(real, runs)
    return [course(_declared(read_run(runs / id), config)) for id, config in zip(ended, configs, strict=True)]


def _declared(run: Run, config: TrainConfig) -> Run:
    """A record that says that ``config`` was trained."""
    steps = run.column(Metric.STEP)
    rates = {key: np.full(len(steps), config.optimizer.lr) for key in run.metrics if key.startswith(Metric.LR)}
    counted = {str(Metric.TOKENS): steps * config.batch, str(Metric.PATH): steps * config.optimizer.lr}
    return replace(run, config=to_dict(config), metrics={**run.metrics, **rates, **counted})


def study(folder: Path, size: Size) -> list[Course]:
    """Runs around the planned settings: three batches, three rates."""
    found = []
    for batch in (size.batch // 2, size.batch, 2 * size.batch):
        configs = [
            planned(size, 1000 + seed, rate=size.rate * 2**octave, batch=batch)
            for octave in (-1, 0, 1) for seed in range(size.study_seeds)
        ]  # fmt: skip
        found += train(folder, configs)
    return found


def first_off(of: Course, expected: Sequence[Band]) -> float:
    """Tokens at which a layer group's norm is first off its band; infinite if it never is."""
    for tokens in of.tokens[of.tokens > 0].tolist():
        found = seen(of.until(tokens), expected)
        if any(each.outside and each.tokens == tokens and each.quantity != LOSS for each in found):
            return float(tokens)
    return math.inf


def loss_off(of: Course, healthy: Sequence[Course]) -> float:
    """Tokens at which the training loss is first as far from that of healthy runs as one of ``ALARMS`` of them ever is,
    by their own mean and standard deviation at each point (Student, Bonferroni over the octaves); infinite if never."""
    tokens = of.tokens[of.tokens > 0]
    others = np.array([np.interp(tokens, each.tokens, each.loss) for each in healthy])
    many = len(healthy)
    error = others.std(axis=0, ddof=1) * math.sqrt(1 + 1 / many)
    limit = stats.t.ppf(1 - ALARMS / math.log2(tokens[-1] / tokens[0]) / 2, many - 1)
    off = np.abs(of.loss[of.tokens > 0] - others.mean(axis=0)) > limit * error
    return float(tokens[off][0]) if off.any() else math.inf


def main() -> None:
    """Trains, and prints a row per fault."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--size", choices=SIZES, default="full")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[arguments.size]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        expected = bands(study(folder, size), size.batch, size.rate)
        healthy = train(folder, [planned(size, seed) for seed in range(201, 201 + size.seeds)])
        row = "{:10} {:>5} {:>8} {:>26} {:>26}  {}"
        print(row.format("fault", "runs", "flagged", "tokens, norms", "tokens, loss", "looks like, at the end"))
        for fault in ("", *FAULTS):
            seeds = range(101, 101 + size.faulty)
            runs = train(folder, [planned(size, seed) for seed in seeds], fault) if fault else healthy
            norms = [first_off(each, expected) for each in runs]
            losses = [loss_off(each, [c for c in healthy if c is not each]) for each in runs]
            words = [looks_like(each, expected) for each in runs] if fault else [""]
            flagged = sum(map(math.isfinite, norms))
            said = max(set(words), key=words.count)
            print(row.format(fault or "none", len(runs), flagged, _median(norms), _median(losses), said), flush=True)


def _median(tokens: Sequence[float]) -> str:
    """Median, least and largest."""
    low, middle, high = np.quantile(tokens, [0, 0.5, 1], method="inverted_cdf")
    return " ".join(f"{value:,.0f}" if math.isfinite(value) else "never" for value in (middle, low, high))


if __name__ == "__main__":
    main()
