"""Coverage of the 90% intervals of exponents: by resampling whole runs and, to compare, by the scatter of the optima.

python -m benchmarks.coverage.rules [--studies 1000] [--bootstraps 200]

Noise is correlated along a run (its correlation halves per octave of tokens), bowls are lopsided by shapes that are not
fitted, grids differ in spacing and reach; every study has its own exponents and its own place on the grid.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.coverage.generator import Truth, bowl, study
from benchmarks.coverage.report import section

from disco.fit import Rule
from disco.fit._scaling import Scaling
from disco.fit._study import NORM, fit_once

SHAPES = (
    ("parabola", 1.0),
    ("exponential", 1.5),
    ("exponential", 2.0),
    ("logcosh", 1.5),
    ("quartic", 1.5),
    ("pieces", 1.5),
)
GRIDS = {
    "octaves": (np.arange(-9.0, 2.0), tuple(2**k for k in range(9, 14)), tuple(2**k for k in range(18, 22))),
    "half octaves": (np.arange(-7.5, 0.1, 0.5), tuple(2**k for k in range(9, 14)), tuple(2**k for k in range(18, 22))),
    "wide": (np.arange(-9.6, 2.1, 0.8), tuple(2**k for k in range(8, 15)), tuple(2**k for k in range(18, 23))),
    "cut off": (np.arange(-7.0, -2.4, 0.5), tuple(2**k for k in range(9, 14)), tuple(2**k for k in range(18, 22))),
}
"""log2 rates, batches, horizons. Of "cut off" some fifth of the cells have their optimum beyond the grid."""
STUDY = ("scion", "d32-L2")
NOISES = (0.003, 0.01)
"""Nats; a step of one octave off the optimum costs 0.06."""


@dataclass(frozen=True)
class Setting:
    grid: str
    shape: tuple[str, float]
    noise: float


SETTINGS = tuple(Setting(grid, shape, noise) for grid in GRIDS for shape in SHAPES for noise in NOISES)


def one(setting: Setting, rng: np.random.Generator, bootstraps: int) -> Iterator[tuple[str, str, bool | None]]:
    """(quantity, how, covered) of one study; None where there is no interval."""
    rates, batches, horizons = GRIDS[setting.grid]
    spacing = float(rates[1] - rates[0])
    truth = Truth(lr_batch=rng.uniform(0.4, 0.8), lr_tokens=rng.uniform(-0.7, -0.3), batch_tokens=rng.uniform(0.3, 0.6))
    table = study(
        rng, truth, (rates + rng.uniform(-0.5, 0.5) * spacing).tolist(), bowl(*setting.shape),
        batches=batches, horizons=horizons, noise=setting.noise,
    )  # fmt: skip
    composite = truth.lr_tokens + truth.lr_batch * truth.batch_tokens
    true = {
        ("lr(batch, tokens)", "batch"): truth.lr_batch,
        ("lr(batch, tokens)", "tokens"): truth.lr_tokens,
        ("batch(tokens)", "tokens"): truth.batch_tokens,
        ("lr(tokens)", "tokens"): composite,
    }
    del table[NORM]  # the optimal norm is benchmarks/coverage/transfer.py's
    fit = fit_once(table, NORM, bootstraps, int(rng.integers(2**31)))
    plain = list(Scaling(fit.cells, fit.horizons, None).model_rules(*STUDY, [], 0))
    for (name, column), value in true.items():
        for how, rules in (("resampled", fit.rules), ("scatter", plain)):
            yield f"{name}: {column}", how, _law(rules, name, "quadratic", column, value)
    how = "resampled"
    yield "joint batch(tokens)", how, _law(fit.rules, "batch(tokens)", "joint", "tokens", truth.batch_tokens)
    yield "joint lr(tokens)", how, _law(fit.rules, "lr(tokens)", "joint", "tokens", composite)
    interaction = fit.rule(*STUDY, "lr(batch, tokens)").interaction
    yield "interaction", how, _within(interaction.interval if interaction else None, 0.0)
    gap = fit.composites[0].difference_interval if fit.composites else None
    yield "composite - direct", how, _within(gap, 0.0)
    found = fit.surfaces[0].surface
    for name, value in (
        ("lr(batch)", truth.lr_batch), ("lr(tokens)", truth.lr_tokens), ("batch(tokens)", truth.batch_tokens)
    ):  # fmt: skip
        yield f"one-stage {name}", how, _within(found.exponent(name)[1] if found else None, value)


def _law(rules: Sequence[Rule], name: str, recipe: str, column: str, value: float) -> bool | None:
    law = next((r.law for r in rules if (r.model, r.name, r.recipe) == (STUDY[1], name, recipe)), None)
    return _within(law.interval(column) if law else None, value)


def _within(interval: tuple[float, float] | None, value: float) -> bool | None:
    known = interval is not None and all(map(math.isfinite, interval))
    return interval[0] <= value <= interval[1] if known and interval else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--bootstraps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    each = math.ceil(arguments.studies / len(SETTINGS))
    hits: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for round_ in range(each):  # all settings in turn, so that an interrupted run is a fair sample
        for index, setting in enumerate(SETTINGS):
            rng = np.random.default_rng([arguments.seed, round_, index])
            for quantity, how, covered in one(setting, rng, arguments.bootstraps):
                if covered is not None:
                    groups = ("all", setting.grid, " ".join(map(str, setting.shape)), f"noise {setting.noise}")
                    for group in groups:
                        hits[quantity, how][group].append(covered)
        if round_ % 4 == 0 or round_ == each - 1:
            show(hits, (round_ + 1) * len(SETTINGS), arguments.bootstraps)


def show(hits: dict[tuple[str, str], dict[str, list[bool]]], studies: int, bootstraps: int) -> None:
    groups = list(next(iter(hits.values())))
    rows = [
        [quantity, how, str(len(by["all"])), *(f"{np.mean(by[g]):.2f}" if by.get(g) else "" for g in groups)]
        for (quantity, how), by in hits.items()
    ]
    note = f"{studies} studies, {bootstraps} resamples of whole runs; coverage of the true exponent."
    section("Exponents", ["exponent", "interval", "n", *groups], rows, note)


if __name__ == "__main__":
    main()
