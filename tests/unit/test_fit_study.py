"""disco.fit.fit_table: from a table of runs to optima, best batches, rules and norm transfer."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from synthetic import START, columns

from disco.errors import UserError
from disco.fit import NORM, StudyFit, fit_table, optimum

RATES = np.arange(-9.0, 2.0)
STUDY = ("scion", "d32-L2")


def without(table: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: values for name, values in table.items() if name not in names}


def where(table: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in table.items()}


@pytest.fixture(scope="module")
def fit() -> StudyFit:
    return fit_table(columns(RATES))


def test_every_cell_finds_its_true_optimum(fit: StudyFit) -> None:
    assert len(fit.cells) == 20
    for cell in fit.cells:
        octave, away = math.log2(cell.tokens) - 20, math.log2(cell.batch) - 11
        assert cell.rate() == pytest.approx(-4 + 0.6 * away - 0.5 * octave, abs=0.1)
        assert cell.log2_norm == pytest.approx(6, abs=0.1)
        assert cell.loss == pytest.approx(2 - 0.1 * octave + 0.02 * (away - 0.5 * octave) ** 2, abs=0.005)
        assert cell.lr.y_interval is not None
        assert cell.noise == pytest.approx(0.002)
        assert math.isnan(cell.seed_noise)


def test_paper_rate_is_that_of_the_run_nearest_in_norm(fit: StudyFit) -> None:
    cell = fit.cell(*STUDY, 2048, 2**20)
    assert cell is not None
    norms, losses = [p.norm for p in cell.points], [p.loss for p in cell.points]
    found = optimum(norms, losses, [p.sigma for p in cell.points], "paper", START)
    assert cell.paper == found
    assert cell.rate("paper") == cell.points[int(np.argmin(np.abs(np.array(norms) - found.x)))].lr


def test_best_batches_and_rules(fit: StudyFit) -> None:
    assert [item.batch for item in fit.horizons] == [1024, 2048, 2048, 2048]
    assert [item.smooth_batch for item in fit.horizons] == pytest.approx([10, 10.5, 11, 11.5], abs=0.1)
    law = fit.rule(*STUDY, "lr(batch, tokens)").law
    assert law is not None
    assert law.exponents == pytest.approx({"batch": 0.6, "tokens": -0.5}, abs=0.01)
    assert law.n == 20
    best = fit.rule(*STUDY, "batch(tokens)").law
    assert best is not None
    assert best.exponents["tokens"] == pytest.approx(0.5, abs=0.05)
    composite = fit.rule(*STUDY, "lr(tokens)").law
    assert composite is not None
    assert composite.exponents["tokens"] == pytest.approx(-0.5 + 0.6 * 0.5, abs=0.03)


def test_norm_transfer_over_tokens(fit: StudyFit) -> None:
    path = fit.path(*STUDY)
    assert path.norm == pytest.approx([6] * 4, abs=0.1)
    assert path.transfer is not None
    assert path.transfer.verdict == "transfers"
    drifting = fit_table(columns(RATES, drift=0.3)).path(*STUDY).transfer
    assert drifting is not None
    assert drifting.verdict == "drifts"
    assert drifting.slope == pytest.approx(0.3, abs=0.02)


def test_first_hits_follow_from_the_norm(fit: StudyFit) -> None:
    """The made-up norm is 6 + 0.8 (log2 lr - log2 lr*): it crosses 6 where lr = lr*(batch, tokens)."""
    assert len(fit.hits) >= 5
    for hit in fit.hits:
        best = -4 + 0.6 * (math.log2(hit.batch) - 11) - 0.5 * (math.log2(hit.tokens) - 20)
        assert hit.lr == pytest.approx(best, abs=0.05)
        assert 2**18 < hit.tokens <= 2**21


def test_permuting_a_column_changes_the_result() -> None:
    table = columns(RATES)
    mixed = table | {"loss": np.random.default_rng(0).permutation(table["loss"])}
    assert fit_table(mixed).to_dict() != fit_table(table).to_dict()
    order = np.random.default_rng(1).permutation(len(table["lr"]))
    assert fit_table(where(table, order)).to_dict() == fit_table(table).to_dict()


def test_edge_cells_are_flagged_left_out_and_counted() -> None:
    table = columns(np.arange(-9.0, -2.9))  # the best rates of large batches lie above 2^-3
    found = fit_table(table)
    for cell in found.cells:
        true = -4 + 0.6 * (math.log2(cell.batch) - 11) - 0.5 * (math.log2(cell.tokens) - 20)
        if true > -2.9:
            assert "edge-high" in cell.lr.flags
            assert math.isnan(cell.rate())
    rule = found.rule(*STUDY, "lr(batch, tokens)")
    edge = sum(not cell.usable for cell in found.cells)
    assert edge > 3
    assert (rule.n, rule.left_out) == (20 - edge, edge)
    assert rule.law is not None
    assert rule.law.exponents == pytest.approx({"batch": 0.6, "tokens": -0.5}, abs=0.02)
    assert any("higher learning rates are needed at 2^18 tokens" in note for note in found.warnings)


def test_diverged_runs_bound_the_grid() -> None:
    table = columns(RATES)
    high = table["lr"] >= 0.5
    gone = table | {"loss": np.where(high, np.nan, table["loss"]), "diverged": high}
    gone[NORM] = np.where(high, np.nan, table[NORM])
    cell = fit_table(gone).cell(*STUDY, 8192, 2**18)  # lr* = 2^-1.8, the last rate that lives is 2^-2
    assert cell is not None
    assert not {"edge-high", "edge-low"} & set(cell.lr.flags)
    assert cell.norm is not None
    assert not {"edge-high", "edge-low"} & set(cell.norm.flags)
    cut = fit_table(where(table, ~high)).cell(*STUDY, 8192, 2**18)
    assert cut is not None
    assert "edge-high" in cut.lr.flags
    assert sum(point.diverged for point in cell.points) == 3


def test_seeds_are_pooled_and_tell_the_noise() -> None:
    one, three = (columns(RATES, seeds=seeds, noise=0.01) for seeds in ((0,), (0, 1, 2)))
    cell = fit_table(three).cell(*STUDY, 2048, 2**20)
    assert cell is not None
    assert cell.seed_noise == pytest.approx(0.01, rel=0.4)
    assert len(cell.points) == len(RATES)
    assert all(point.seeds == 3 for point in cell.points)
    assert cell.lr.nearest is not None
    assert cell.points[cell.lr.nearest].lr == pytest.approx(cell.lr.x, abs=0.51)
    widths = [np.mean([c.lr.interval[1] - c.lr.interval[0] for c in fit_table(t).cells if c.lr.interval])
              for t in (one, three)]  # fmt: skip
    assert widths[1] < 0.9 * widths[0]  # what lopsidedness adds does not shrink


def test_seeds_that_diverged_are_counted_and_told() -> None:
    table = columns(RATES, seeds=(0, 1, 2))
    gone = (table["lr"] == 0.5) & (table["seed"] > 0) | (table["lr"] >= 1)
    found = fit_table(table | {"loss": np.where(gone, np.nan, table["loss"]), "diverged": gone})
    *_, whole, torn, dead, _ = found.cells[0].points
    assert [(point.seeds, point.lost, point.diverged) for point in (whole, torn, dead)] == [
        (3, 0, False),
        (1, 2, False),
        (0, 3, True),
    ]
    note = "d32-L2, scion: of the seeds at learning rates 2^-1 some diverged; losses there are of those that lived"
    assert note in found.warnings
    assert not any("some diverged" in note for note in fit_table(table).warnings)


def test_not_enough_says_what_is_needed() -> None:
    two = fit_table(columns(RATES, horizons=(2**19, 2**20)))
    rule = two.rule(*STUDY, "lr(batch, tokens)")
    assert rule.law is None
    found = "not enough: 10 of 10 cells have an optimum inside the grid, at 5 batches and 2 horizons"
    assert rule.reason == f"{found}; needed: 5 at 2 batches and 3 horizons"
    few = fit_table(columns(RATES, batches=(2048,)))
    assert few.rule(*STUDY, "lr(batch, tokens)").reason.endswith(
        "at 1 batches and 4 horizons; needed: 5 at 2 batches and 3 horizons"
    )
    assert few.rule(*STUDY, "batch(tokens)").n == 0
    fixed = few.rule(*STUDY, "lr(tokens)")
    assert fixed.condition == "at a batch of 2^11 tokens"
    assert fixed.law is not None
    assert fixed.law.exponents["tokens"] == pytest.approx(-0.5, abs=0.05)
    assert any("one batch only" in note for note in few.warnings)


def test_best_batch_at_the_edge_is_no_best_batch() -> None:
    found = fit_table(columns(RATES, batches=(2048, 4096, 8192), horizons=(2**18, 2**19, 2**20, 2**22)))
    assert [item.flags for item in found.horizons] == [("edge-low",)] * 3 + [()]
    rule = found.rule(*STUDY, "batch(tokens)")
    assert (rule.law, rule.n, rule.left_out) == (None, 1, 3)
    assert any("a smaller batch may be better still at 2^18, 2^19, 2^20 tokens" in note for note in found.warnings)


def test_interaction_of_batch_and_tokens_is_reported() -> None:
    table = columns(RATES, horizons=(2**17, 2**18, 2**19, 2**20, 2**21))
    assert not any("plane" in note for note in _law_warnings(table))
    product = 0.15 * (np.log2(table["batch"]) - 11) * (np.log2(table["tokens"]) - 19)
    bent = table | {"lr": table["lr"] * 2**product}
    assert any("exponent of the batch changes by +0.1" in note for note in _law_warnings(bent))


def _law_warnings(table: dict[str, np.ndarray]) -> tuple[str, ...]:
    law = fit_table(table).rule(*STUDY, "lr(batch, tokens)").law
    assert law is not None
    return law.warnings


def test_models_and_sizes() -> None:
    parts = [columns(RATES, model=(width, 2), norm=6 + 0.05 * width / 32) for width in (32, 64, 128)]
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = fit_table(table)
    assert found.studies == (("scion", "d32-L2"), ("scion", "d64-L2"), ("scion", "d128-L2"))
    (path,) = (path for path in found.paths if path.axis == "width")
    assert path.scale == (32, 64, 128)
    assert path.norm == pytest.approx((6.05, 6.1, 6.2), abs=0.05)
    assert path.at[-1][0] == "d128-L2"
    assert path.transfer is not None
    assert path.transfer.slope == pytest.approx(0.075, abs=0.03)
    assert path.condition.startswith("depth 2, 2^2")


def test_a_table_without_optional_columns() -> None:
    """Step Law's table has no norm, no sigma and no seeds."""
    bare = {
        name: values for name, values in columns(RATES).items() if name in ("model", "batch", "lr", "tokens", "loss")
    }
    found = fit_table(bare)
    assert found.studies == (("", "d32-L2"),)
    assert all(cell.norm is None and cell.paper is None for cell in found.cells)
    law = found.rule("", "d32-L2", "lr(batch, tokens)").law
    assert law is not None
    assert law.exponents["batch"] == pytest.approx(0.6, abs=0.01)
    assert found.path("", "d32-L2").norm == ()


def test_bad_tables() -> None:
    table = columns(RATES)
    with pytest.raises(UserError, match="no column lr, loss; it has"):
        fit_table(without(table, "lr", "loss"))
    with pytest.raises(UserError, match=r"lr must be positive, got 0.0 in row 2"):
        fit_table(table | {"lr": np.where(np.arange(len(table["lr"])) == 2, 0.0, table["lr"])})
    with pytest.raises(UserError, match="has 3 rows and lr has 220"):
        fit_table(table | {"sigma": np.zeros(3)})
    with pytest.raises(UserError, match="no rows with a loss"):
        fit_table(table | {"loss": np.full(220, np.nan)})
    lost = np.full(220, np.nan)
    with pytest.raises(UserError, match="all 220 rows diverged or have a loss that is not finite; add runs at lower"):
        fit_table(table | {"loss": lost, "diverged": np.isnan(lost)})


def test_dictionary_and_back(fit: StudyFit) -> None:
    text = json.dumps(fit.to_dict(), allow_nan=False)
    again = StudyFit.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    assert again.rule(*STUDY, "lr(batch, tokens)") == fit.rule(*STUDY, "lr(batch, tokens)")


def test_statistics_import_neither_torch_nor_tables_nor_plots() -> None:
    code = "import sys, disco.fit; assert not {'torch', 'polars', 'plotly', 'pandas'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, disco.report, disco.guide._plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_optima_at_one_grid_point_carry_no_exponent() -> None:
    table = columns(np.arange(-6.0, 1.0), batches=(1024,), exponents=(0.0, 0.0, 0.0), noise=0.0)
    rule = next(r for r in fit_table(table).rules if (r.name, r.recipe) == ("lr(tokens)", "paper"))
    assert rule.law is None
    assert "same grid point" in rule.reason
