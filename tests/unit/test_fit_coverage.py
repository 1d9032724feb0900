"""Small fixed-seed forms of benchmarks/coverage: intervals cover, edges are told, verdicts err rarely."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.coverage import cell, transfer
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


def test_verdicts_err_at_the_stated_rate() -> None:
    """5% and three standard deviations of 400 draws."""
    most = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    at_margin, at_zero = transfer.verdicts(1.0, 6, 0.1, 400, seed=3), transfer.verdicts(0.0, 6, 0.1, 400, seed=4)
    assert at_margin["transfers"] <= most
    assert at_margin["drifts"] <= most
    assert at_zero["drifts"] <= most
