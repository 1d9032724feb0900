"""Pooled noise of the loss, and cells that use it."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.coverage.generator import Truth, bowl, study

from disco.fit._cells import complete, fit_cells, split
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
    assert shared[0].correlation == pytest.approx(0.495)  # no residuals: the prior's
    of_squares = 0.495 ** (2 * np.abs(np.subtract.outer(range(4), range(4))))
    assert shared[0].freedom == pytest.approx(20 * 14 * 4 / of_squares.sum() - 2, rel=0.02)  # four horizons as 2.8
    assert found[0].freedom > shared[0].freedom
    assert math.isnan(found[0].correlation)
    few = pooled_noise(seeds[:3], batch[:3], tokens[:3])
    assert len({item.sd for item in few if item}) == 1


@pytest.mark.parametrize("true", [0.1, 0.5, 0.85])
def test_correlation_along_runs_is_seen(true: float) -> None:
    """From residuals of the cells' own curves, whose shape and place change with the horizon; shrunk to 1/2."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(6):
        truth = Truth(lr_batch=0.6, lr_tokens=-0.4)
        memory = math.log(0.5) / math.log(true)
        table = study(rng, truth, np.arange(-7.0, 0.1, 0.5), bowl("logcosh", 1.5), noise=0.006, memory=memory)
        cells = list(split(table, "batch", "tokens"))
        batch, tokens = ([float(rows[name][0]) for rows in cells] for name in ("batch", "tokens"))
        scans = [contrasts(np.log2(rows["lr"]), rows["loss"]) for rows in cells]
        known = next(item for item in pooled_noise(scans, batch, tokens, batch) if item)
        found.append(known.correlation)
    assert np.mean(found) == pytest.approx(true, abs=0.15)
    assert np.std(found) < 0.2


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
