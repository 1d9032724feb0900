"""Pooled noise of the loss, and cells that use it."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.coverage.generator import Truth, bowl, study

from disco.fit._cells import complete, fit_cells
from disco.fit._noise import Contrasts, Noise, pooled_noise
from disco.fit._optimum import contrasts

OUTPUT = "norm/output/rms_to_inf"


def test_noise_is_pooled_over_scans_of_any_shape() -> None:
    rng = np.random.default_rng(0)
    x = np.arange(-4.0, 5.0)
    scans = [
        contrasts(x, 0.05 * bowl("logcosh", 2.0)(x - rng.uniform(-1, 1)) + rng.normal(0, 0.01, 9)) for _ in range(60)
    ]
    found = pooled_noise(scans, np.full(60, 512), np.full(60, 2**20))
    assert {item.sd for item in found if item} == {found[0].sd if found[0] else 0}
    assert isinstance(found[0], Noise)
    assert found[0].sd == pytest.approx(0.01, rel=0.25)
    assert 10 < found[0].freedom < 60 * 2


def test_noise_follows_batch_and_tokens() -> None:
    rng = np.random.default_rng(1)
    batch, tokens = np.repeat(2.0 ** np.arange(8, 13), 4), np.tile(2.0 ** np.arange(18, 22), 5)
    sd = 0.01 * (batch / 2**10) ** -0.5 * (tokens / 2**20) ** -0.2
    seeds = [Contrasts(np.zeros(0), np.zeros(0), s**2 * rng.chisquare(14), 14) for s in sd]
    found = pooled_noise(seeds, batch, tokens)
    assert [item.sd for item in found if item] == pytest.approx(list(sd), rel=0.25)
    assert found[0] is not None
    assert found[0].freedom == pytest.approx(20 * 14 - 2)
    shared = pooled_noise(seeds, batch, tokens, runs=list(batch))
    assert shared[0] is not None
    assert shared[0].freedom == pytest.approx(20 * 14 / 2 - 2)  # four horizons of one run count as two
    few = pooled_noise(seeds[:3], batch[:3], tokens[:3])
    assert len({item.sd for item in few if item}) == 1


def test_nothing_known_is_none() -> None:
    assert pooled_noise([None, None], [1, 2], [1, 2]) == [None, None]
    assert pooled_noise([Contrasts(np.zeros(0), np.zeros(0), 0.0, 0.0)], [1], [1]) == [None]
    x = np.arange(5.0)
    assert contrasts(x[:3], x[:3] ** 2) is None


def test_cells_rest_on_the_noise_of_the_study() -> None:
    rng = np.random.default_rng(2)
    truth = Truth()
    columns = study(rng, truth, np.arange(-8.0, 1.0), bowl("exponential", 1.5), noise=0.006, diverged=2.5)
    columns["norm/hidden/rms_to_rms"] = columns[OUTPUT] ** 0.9 / 4
    cells = fit_cells(complete(columns, OUTPUT))
    assert len(cells) == 20
    assert all(cell.run_noise is not None for cell in cells)
    assert cells[0].run_noise is not None
    assert cells[0].run_noise.sd == pytest.approx(0.006, rel=0.6)
    covered = [
        cell.lr.interval[0] <= truth.lr(cell.batch, cell.tokens) <= cell.lr.interval[1]
        for cell in cells if cell.usable and cell.lr.interval
    ]  # fmt: skip
    assert len(covered) >= 16
    assert np.mean(covered) > 0.75
    for cell in cells:
        assert set(cell.norms) == {OUTPUT, "norm/hidden/rms_to_rms"}
        assert cell.norms[OUTPUT] == cell.norm
        if cell.norm is not None and cell.norm.usable and cell.norms["norm/hidden/rms_to_rms"].usable:
            assert cell.norms["norm/hidden/rms_to_rms"].x == pytest.approx(0.9 * cell.norm.x - 2, abs=0.15)
        assert math.isfinite(cell.noise)
