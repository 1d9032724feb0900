"""disco.fit.surface: one model of the loss over all runs."""

import math

import numpy as np
import pytest

from disco.errors import UserError
from disco.fit import Surface, surface

TRUE = {"lr(batch)": 0.5, "lr(tokens)": -0.4, "batch(tokens)": 0.45 / (0.45 + 0.6)}


def runs(noise: float = 0.0, sizes: tuple[float, ...] = (), seed: int = 0) -> dict[str, np.ndarray]:
    """A table of the model's own form, lopsided, with 4 horizons of each run."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in sizes or (1.0,):
        for b in range(9, 15):
            for u in np.arange(-8.0, 1.0):
                own = rng.normal(0, noise)
                for d in range(18, 22):
                    best = -4 + 0.5 * (b - 11) - 0.4 * (d - 20) - (0.6 * (math.log2(size) - 20) if sizes else 0.0)
                    off = u - best
                    loss = 1.2 + 0.4 * 2 ** (-0.45 * (d - b - 9)) + 0.2 * 2 ** (-0.6 * (b - 11))
                    loss += 0.05 * 2 * (math.exp(0.3 * off) - 1 - 0.3 * off) / 0.3**2
                    loss += 0.5 * 2 ** (-0.4 * (math.log2(size) - 20)) if sizes else 0.0
                    loss += own + rng.normal(0, noise / 2)
                    rows.append((2.0**u, 2.0**b, 2.0**d, loss, size, f"{size}/{b}/{u}"))
    names = ("lr", "batch", "tokens", "loss", "parameters", "run")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def fit(table: dict[str, np.ndarray], **options: object) -> Surface:
    return surface(*(table[name] for name in ("lr", "batch", "tokens", "loss")), run=table["run"], **options)  # type: ignore[arg-type]


def test_its_own_form_is_recovered() -> None:
    found = fit(runs(0.001))
    for name, value in TRUE.items():
        assert found.exponent(name)[0] == pytest.approx(value, abs=0.03)
    assert found.value("skew") == pytest.approx(0.3, abs=0.02)
    assert math.exp(found.value("log k")) == pytest.approx(0.05, rel=0.05)
    best = found.optimum(2.0**20)
    true_batch = (math.log2(0.6 * 0.2 / (0.45 * 0.4)) + 0.45 * (20 - 9) + 0.6 * 11) / (0.45 + 0.6)
    assert best.batch == pytest.approx(true_batch, abs=0.1)
    assert best.lr == pytest.approx(-4 + 0.5 * (true_batch - 11), abs=0.05)
    assert found.loss(2.0**-3, 2.0**11, 2.0**20) > found.loss(2.0**best.lr, 2.0**best.batch, 2.0**20)
    fixed = found.optimum(2.0**22, batch=2.0**12)
    assert fixed.lr == pytest.approx(-4 + 0.5 - 0.8, abs=0.05)
    assert fixed.batch == 12
    assert fixed.batch_interval is None


def test_sizes() -> None:
    table = runs(0.001, sizes=(2.0**19, 2.0**20, 2.0**21))
    found = fit(table, parameters=table["parameters"])
    assert found.exponent("lr(parameters)")[0] == pytest.approx(-0.6, abs=0.02)
    assert found.optimum(2.0**20, batch=2.0**11, parameters=2.0**22).lr == pytest.approx(-5.2, abs=0.1)


def test_intervals_of_its_own_form_cover() -> None:
    covered = []
    for seed in range(12):
        found = fit(runs(0.005, seed=seed), bootstraps=100)
        for name, value in TRUE.items():
            interval = found.exponent(name)[1]
            assert interval is not None
            covered.append(interval[0] <= value <= interval[1])
    assert 0.8 <= np.mean(covered) <= 1.0


def test_a_run_that_nearly_diverged_counts_little() -> None:
    table = runs(0.001)
    bad = (table["lr"] == 1.0) & (table["batch"] == 512)
    spoilt = table | {"loss": np.where(bad, table["loss"] + 5, table["loss"])}
    for name in TRUE:
        assert fit(spoilt).exponent(name)[0] == pytest.approx(fit(table).exponent(name)[0], abs=0.02)


def test_rows_may_be_shuffled_but_not_columns() -> None:
    table = runs(0.003)
    order = np.random.default_rng(1).permutation(len(table["lr"]))
    whole = fit({name: values[order] for name, values in table.items()})
    assert whole.values == pytest.approx(fit(table).values, abs=1e-6)
    mixed = fit(table | {"loss": table["loss"][order]})
    assert abs(mixed.exponent("lr(batch)")[0] - 0.5) > 0.1 or mixed.residual > 0.02


def test_errors_and_dictionary() -> None:
    table = runs(0.003)
    few, one = table["lr"] < 2**-5.5, table["batch"] == 512
    with pytest.raises(UserError, match="parameters need at least 22 runs, got 18"):
        fit({name: values[few] for name, values in table.items()})
    with pytest.raises(UserError, match="two batches, two numbers of tokens and three learning rates"):
        fit({name: values[one] for name, values in table.items()})
    with pytest.raises(UserError, match=r"tokens must be positive, got 0.0 at index 0"):
        surface(table["lr"], table["batch"], np.zeros_like(table["lr"]), table["loss"])
    found = fit(table, bootstraps=30)
    assert Surface.from_dict(found.to_dict()) == found
    with pytest.raises(UserError, match="no exponent 'lr\\(width\\)'"):
        found.exponent("lr(width)")
    with pytest.raises(UserError, match="needs positive numbers"):
        found.optimum(-1)


def test_best_rates_stay_among_those_swept() -> None:
    """Runs that nearly diverged on the high side of a lopsided valley, as in Step Law's table: no start may end among
    them, and losses that only fall have no valley."""
    table = runs(0.003)
    high = np.log2(table["lr"]) > -2.5
    rng = np.random.default_rng(2)
    broken = table | {"loss": np.where(high, table["loss"] + rng.uniform(1, 4, len(high)), table["loss"])}
    found = fit(broken)
    for tokens in (2.0**18, 2.0**21):
        assert -8 <= found.optimum(tokens).lr <= 0
    assert found.exponent("lr(batch)")[0] == pytest.approx(0.5, abs=0.1)
    falling = table | {
        "loss": 3 - 0.2 * np.log2(table["lr"]) - 0.1 * np.log2(table["tokens"]) + rng.normal(0, 0.003, len(high))
    }
    with pytest.raises(UserError, match=r"found no valley: its best rates are outside those swept at \d of 4 horizons"):
        fit(falling)
