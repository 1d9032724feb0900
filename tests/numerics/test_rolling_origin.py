"""Step Law's table (shared/data) beyond its own rule: joint optima of its 17 cells, and the rolling origin."""

import csv
from pathlib import Path

import numpy as np
import pytest

from disco.fit import joint, power_law, rolling_origin


@pytest.fixture(scope="module")
def table(shared: Path) -> dict[str, np.ndarray]:
    with (shared / "steplaw_dense.csv").open() as file:
        rows = list(csv.DictReader(file))
    raw = {name: np.array([float(row[name]) for row in rows]) for name in ("N", "D", "lr", "bs", "smooth loss")}
    return {
        "model": raw["N"].astype(int).astype(str), "parameters": raw["N"], "tokens": raw["D"], "lr": raw["lr"],
        "batch": 2048 * raw["bs"], "loss": raw["smooth loss"], "run": np.arange(len(rows)),
    }  # fmt: skip


def vertices(table: dict[str, np.ndarray], within: float | None) -> tuple[np.ndarray, ...]:
    found = []
    for N, D in sorted({*zip(table["parameters"], table["tokens"], strict=True)}):
        cell = (table["parameters"] == N) & (table["tokens"] == D)
        best = joint(table["lr"][cell], table["batch"][cell], table["loss"][cell], within=within)
        assert best.usable
        found.append((N, D, best.lr, best.batch))
    return tuple(np.array(column) for column in zip(*found, strict=True))


def test_laws_of_the_17_joint_optima(table: dict[str, np.ndarray]) -> None:
    N, D, lr, batch = vertices(table, within=0.02)
    assert len(N) == 17
    rates, batches = power_law(2**lr, {"N": N, "D": D}), power_law(2**batch, {"D": D})
    assert rates.exponents == pytest.approx({"N": -0.695, "D": 0.208}, abs=5e-4)
    assert rates.standard_errors == pytest.approx({"N": 0.037, "D": 0.021}, abs=5e-4)
    assert batches.exponents["D"] == pytest.approx(0.569, abs=5e-4)
    assert batches.standard_errors["D"] == pytest.approx(0.033, abs=5e-4)


def test_the_ridge_steepens_with_tokens(table: dict[str, np.ndarray]) -> None:
    """eta ~ B^alpha(D): alpha is 0.39(5) at 4e9 and 0.65(2) at 1e11 tokens for the smallest model."""
    small = table["parameters"] == table["parameters"].min()
    ridge = [
        joint(*(table[name][small & (table["tokens"] == D)] for name in ("lr", "batch", "loss")), within=0.02).ridge
        for D in (4e9, 1e11)
    ]
    assert ridge == pytest.approx([0.39, 0.65], abs=0.01)


def test_ours_has_the_lowest_regret_at_the_largest_horizons(table: dict[str, np.ndarray]) -> None:
    """Even against the rule that was fitted to this table, the horizons that are left out here among it."""
    found = rolling_origin(table, dataset="step-law")
    assert len({(f.model, f.tokens) for f in found.forecasts}) == 5
    assert found.methods[0] == found.best == "joint"
    assert found.mean("joint") == pytest.approx(0.0010, abs=2e-4)
    assert found.mean("step-law") == pytest.approx(0.00144, abs=1e-4)
    assert next(f.note for f in found.forecasts if f.method == "step-law") == "in-sample"
    assert found.mean("one-stage") < 0.0020
    assert found.mean("carried over") == pytest.approx(0.0050, abs=1e-4)
    for name in ("deepseek", "porian", "optimal-norm", "power-lines", "bjorck"):
        assert found.mean(name) > 2 * found.mean("joint")
