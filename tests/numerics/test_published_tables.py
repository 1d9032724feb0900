"""The published tables (shared/data, see its README) through the Python API."""

import csv
from pathlib import Path

import numpy as np
import pytest

from disco.fit import optimum, power_law

ANCHOR = 11.765
VERTICES = {
    (31, 32): (7.65, 4.58),
    (31, 64): (7.26, 4.41),
    (31, 128): (6.92, 4.40),
    (31, 256): (6.73, 4.51),
    (31, 512): (6.18, 4.70),
    (31, 1024): (5.88, 5.05),
    (31, 2048): (5.41, 5.39),  # printed 5.45: the figure cuts off points of this panel
    (33, 32): (7.87, 4.59),
}
"""Vertex log2 norm and loss of arXiv:2510.03871 v1, Fig. 12, by log2 tokens and batch in sequences."""


def read(path: Path) -> dict[str, np.ndarray]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def numbers(table: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    return [table[name].astype(float) for name in names]


def test_rule_of_the_28_optima(shared: Path) -> None:
    horizon, batch, rate = numbers(read(shared / "paper_eta_opt.csv"), "log2_h", "log2_bs", "log2_lr_opt")
    law = power_law(2**rate, {"batch": 2**batch, "tokens": 2**horizon})
    assert law.n == 28
    assert {name: round(value, 3) for name, value in law.exponents.items()} == {"batch": 0.619, "tokens": -0.558}
    assert {name: round(value, 3) for name, value in law.standard_errors.items()} == {"batch": 0.051, "tokens": 0.045}
    assert round(law.intercept, 2) == 9.75
    assert round(law.intercept_error, 2) == 1.60
    assert round(law.r2, 3) == 0.923


def test_the_28_optima_are_not_a_plane(shared: Path) -> None:
    """The exponent of the batch grows with tokens (method.md): +0.051(21) per doubling over these four horizons."""
    horizon, batch, rate = numbers(read(shared / "paper_eta_opt.csv"), "log2_h", "log2_bs", "log2_lr_opt")
    law = power_law(2**rate, {"batch": 2**batch, "tokens": 2**horizon}, interactions=True)
    assert law.exponents["batch:tokens"] == pytest.approx(0.0509, abs=5e-4)
    assert law.standard_errors["batch:tokens"] == pytest.approx(0.0207, abs=5e-4)
    for tokens in (31, 37):  # the slope at one horizon is that of the horizon's own fit, to within its error
        own = power_law(2 ** rate[horizon == tokens], {"batch": 2 ** batch[horizon == tokens]})
        slope = law.exponents["batch"] + tokens * law.exponents["batch:tokens"]
        assert abs(slope - own.exponents["batch"]) < 2 * own.standard_errors["batch"]


@pytest.mark.parametrize(("panel", "printed"), VERTICES.items())
def test_vertices_of_the_norm_scans(shared: Path, panel: tuple[int, int], printed: tuple[float, float]) -> None:
    table = read(shared / "norm_scans_sample.csv")
    tokens, batch, norm, loss, sigma = numbers(table, "log2_horizon", "bs", "log2_norm", "loss", "loss_std")
    rows = (tokens == panel[0]) & (batch == panel[1])
    found = optimum(norm[rows], loss[rows], sigma[rows], recipe="paper", anchor=ANCHOR)
    assert (round(found.x, 2), round(found.y, 2)) == printed
    assert found.flags == ()
    assert found.n == min(7, rows.sum())
    free = optimum(norm[rows], loss[rows], sigma[rows])
    assert free.flags == ()
    assert free.x == pytest.approx(found.x, abs=0.35)  # the two recipes differ by up to a third of an octave here


def test_step_law_within_a_quarter_percent(shared: Path) -> None:
    """All runs within 0.25% of the least loss of their (N, D), by least squares in logarithms."""
    table = read(shared / "steplaw_dense.csv")
    N, D, rate, batch, loss = numbers(table, "N", "D", "lr", "bs", "smooth loss")
    least = {key: np.nanmin(loss[(key[0] == N) & (key[1] == D)]) for key in {*zip(N, D, strict=True)}}
    near = loss <= 1.0025 * np.array([least[key] for key in zip(N, D, strict=True)])
    assert near.sum() == 129
    rates = power_law(rate[near], {"N": N[near], "D": D[near]})
    batches = power_law(batch[near], {"D": D[near]})
    assert rates.exponents == pytest.approx({"N": -0.766, "D": 0.197}, abs=0.005)
    assert batches.exponents["D"] == pytest.approx(0.613, abs=0.005)
