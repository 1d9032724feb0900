"""The text of a fit: every number with its interval, the exponents, the ridge, and what would tell."""

import dataclasses
import math
import re

import numpy as np
import pytest
from synthetic import columns

from disco.fit import NORM, StudyFit, fit_table
from disco.report import render_fit
from disco.runs.units import power, two_to

RATES = np.arange(-9.0, 2.0)


@pytest.fixture(scope="module")
def fit() -> StudyFit:
    table = columns(RATES, noise=0.004, rng=np.random.default_rng(3))
    stray = np.random.default_rng(4).normal(0, 0.1, len(table["lr"]))
    return fit_table(table | {NORM: table[NORM] * 2**stray}, bootstraps=200)


@pytest.fixture(scope="module")
def text(fit: StudyFit) -> str:
    return render_fit(fit)


def rows(text: str, title: str) -> list[str]:
    """Those of the table with a title."""
    lines = text.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(title))
    end = next((at for at in range(start, len(lines)) if not lines[at]), len(lines))
    return lines[start + 3 : end]


def test_optima_have_intervals(fit: StudyFit, text: str) -> None:
    shown = rows(text, "Optima at the best batch")
    assert len(shown) == len(fit.horizons)
    for row, item in zip(shown, fit.horizons, strict=True):
        cell = fit.cell(item.family, item.model, item.batch, item.tokens)
        assert cell is not None
        assert cell.lr.interval is not None
        assert row.split()[:2] == [power(item.tokens), power(item.batch)]
        low, high = cell.lr.interval
        assert f"{two_to(cell.lr.x)} [{low:.1f}, {high:.1f}]" in row
        assert f"{item.loss:.4f}" in row


def test_joint_optima_have_ridge_and_region(fit: StudyFit, text: str) -> None:
    shown = rows(text, "Over batch and rate together")
    assert len(shown) == len(fit.bottoms)
    last = fit.bottoms[-1]
    (ridge, low, high) = map(float, re.findall(r"(0\.\d+) \[(0\.\d+), (0\.\d+)\]", shown[-1])[0])
    assert ridge == pytest.approx(last.optimum.ridge, abs=0.005)
    assert high - low == pytest.approx(2 * 1.645 * last.optimum.ridge_error, abs=0.011)
    assert f"{power(last.near.smallest)} .. {power(last.near.largest)}" in shown[-1]


def test_rules_have_exponents_with_intervals(fit: StudyFit, text: str) -> None:
    shown = rows(text, "Exponents of the scaling rules")
    law = fit.rule("scion", "d32-L2", "lr(batch, tokens)").law
    assert law is not None
    (low, high), value = law.interval("batch"), law.exponents["batch"]
    (row,) = [line for line in shown if line.split()[:4] == ["lr(batch,", "tokens)", "20", "cells"]]
    assert f"{value:.2f} [{low:.2f}, {high:.2f}]" in row
    assert [line for line in shown if "batch(tokens)" in line and "joint optima" in line]
    surface = fit.surfaces[0].surface
    assert surface is not None
    value, interval = surface.exponent("batch(tokens)")
    assert interval is not None
    (row,) = [line for line in shown if "batch(tokens)" in line and "one stage" in line]
    assert f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" in row


def test_cannot_tell_says_what_would(fit: StudyFit, text: str) -> None:
    path = fit.path("scion", "d32-L2")
    assert path.transfer is not None
    assert path.transfer.verdict == "cannot tell"
    needed = path.transfer.needed
    assert needed is not None
    flat = " ".join(text.split())
    assert f"{path.transfer.slope:+.2f} [" in flat
    if needed.optima is not None:
        rates = len(RATES)
        runs = (needed.optima - path.transfer.n) * rates
        assert f"takes {needed.optima} optima in place of {path.transfer.n} (about {runs:,} more runs)" in flat
    if needed.octaves is not None:
        assert f"{needed.octaves:.1f} doublings of tokens in place of 3.0" in flat
    assert needed.optima is not None or needed.octaves is not None


def test_reasons_stand_where_numbers_do_not() -> None:
    fit = fit_table(columns(RATES, batches=(1024, 2048), horizons=(2**20,)))
    text = " ".join(render_fit(fit).split())
    assert "No rule lr(batch, tokens): not enough: 2 of 2 cells" in text
    assert "cannot tell: optima at" in text
    edge = " ".join(render_fit(fit_table(columns(np.arange(-12.0, -8.0)))).split())
    assert "rate: edge-high; no-optimum" in edge


def test_layer_groups_of_an_unnamed_family_have_a_clean_title() -> None:
    rng = np.random.default_rng(0)
    made = []
    for ratio in 2.0 ** np.arange(-3, 4):
        for batch in (1024, 2048, 4096):
            for rate in range(-7, 0):
                off = rate - (-4 + 0.5 * (math.log2(batch) - 11))
                loss = 2 + 0.06 * off**2 + 0.03 * (off + math.log2(ratio)) ** 2 + rng.normal(0, 0.002)
                made.append((batch, 2.0**rate, ratio, loss))
    batch, lr, ratio, loss = np.array(made).T
    n = len(lr)
    table = {
        "model": np.full(n, "toy"), "family": np.full(n, ""), "batch": batch.astype(int), "lr": lr, "loss": loss,
        "tokens": np.full(n, 2**20), "ratio_hidden": ratio, "ratio_input": np.ones(n), "ratio_output": np.ones(n),
    }  # fmt: skip
    text = render_fit(fit_table(table))
    assert "\nLayer groups: toy, 2^20 tokens\n" in text
    assert ", ," not in text


def test_sets_of_ratios_are_one_set_in_full(fit: StudyFit) -> None:
    """Sixty sets of ratios would be sixty times the same tables."""
    more = [dataclasses.replace(item, family=f"scion, ratio hidden 2^{k}") for k in (-3, -2) for item in fit.cells]
    horizons = [dataclasses.replace(i, family=f"scion, ratio hidden 2^{k}") for k in (-3, -2) for i in fit.horizons]
    many = dataclasses.replace(fit, cells=(*fit.cells, *more), horizons=(*fit.horizons, *horizons))
    text = render_fit(many)
    assert len(rows(text, "Optima at the best batch")) == len(fit.horizons)
    assert "2 more are in the fit" in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_in_a_narrow_terminal_intervals_stay_whole(fit: StudyFit, width: int) -> None:
    text = render_fit(fit, width)
    tables = [line for line in text.splitlines() if "[" in line or "]" in line]
    assert tables
    assert all(line.count("[") == line.count("]") for line in tables if line.startswith(" "))
    wide = max(map(len, render_fit(fit).splitlines()))
    assert max(map(len, text.splitlines())) <= max(width, 97) < wide
    words = set(render_fit(fit).replace("[", " ").replace("]", " ").split())
    assert words - set(text.replace("[", " ").replace("]", " ").replace("..", " .. ").split()) <= {
        "─" * n for n in range(300)
    }
