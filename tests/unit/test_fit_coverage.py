"""Small fixed-seed forms of benchmarks/coverage: intervals cover, edges are told, verdicts err rarely."""

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.coverage import cell, rules, transfer
from benchmarks.coverage.generator import SHAPES


def test_intervals_of_the_optimum_cover() -> None:
    """Over nine shapes and two grids, noise pooled and not; each alone within what the number of draws allows."""
    for freedom in (20, 0):
        total = cell.Count()
        for shape in SHAPES:
            for grid in ((1.0, 7), (0.5, 9)):
                total.add(cell.run(cell.Setting(shape, grid, 0.25, freedom=freedom), 25, seed=1))
        assert total.usable > 0.8 * total.replicates
        assert 0.85 <= total.covered / total.usable <= 0.97
        assert 0.85 <= total.value / total.usable <= 0.97


def test_three_seeds_and_diverged_runs() -> None:
    for setting in (
        cell.Setting(("exponential", 1.5), (1.0, 7), 0.25, seeds=3),
        cell.Setting(("exponential", 1.5), (1.0, 7), 0.25, diverged=1.6),
    ):
        count = cell.run(setting, 100, seed=2)
        assert count.usable > 0.7 * count.replicates
        assert count.covered / count.usable >= 0.85


@pytest.mark.parametrize("grid", [(1.0, 7), (1.0, 5)])
def test_edges_are_told(grid: tuple[float, int]) -> None:
    outside, inside, _ = cell.edges(grid, 0.2, 200)
    assert outside >= 0.95
    assert inside < 0.05


@pytest.mark.parametrize(("memory", "optima"), [(None, 6), (0.5, 6), (1.0, 4), (1.0, 9)])
def test_verdicts_err_at_the_stated_rate(memory: float | None, optima: int) -> None:
    """5% and three standard deviations of 400 draws, also where errors of horizons are correlated."""
    most = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    at_margin = transfer.verdicts(1.0, optima, 0.1, 400, seed=3, memory=memory)
    at_zero = transfer.verdicts(0.0, optima, 0.1, 400, seed=4, memory=memory)
    assert at_margin["transfers"] <= most
    assert at_margin["drifts"] <= most
    assert at_zero["drifts"] <= most


def test_verdicts_with_resampled_runs() -> None:
    """8 whole studies, true slopes of none, one and three margins."""
    said: Counter[tuple[float, str]] = Counter()
    for how, slope, verdict in transfer.of_studies(8, 100, 3):
        said[slope, verdict] += how == "resampled runs"
    assert said[0.0, "drifts"] == said[3.0, "transfers"] == 0
    assert said[1.0, "transfers"] <= 2  # 5% of 8 and three standard deviations
    assert said[0.0, "transfers"] >= 3
    assert said[3.0, "drifts"] >= 6


def test_exponents_of_joint_optima_cover() -> None:
    """Flanks unlike each other: the vertex of a plain bowl drifts with the best batch. Exponents of bowls with a cubic
    held 4 of these 16."""
    shapes = (("exponential", 1.5), ("exponential", 2.0), ("logcosh", 1.5), ("quartic", 1.5))
    settings = [rules.Setting(grid, shape, 0.003) for grid in ("half octaves", "cut off") for shape in shapes]
    covered = []
    for index, setting in enumerate(settings):
        found = rules.one(setting, np.random.default_rng([5, index]), 100)
        covered += [inside for quantity, _, inside in found if quantity.startswith("joint") and inside is not None]
    assert len(covered) >= 14
    assert np.mean(covered) >= 0.8
