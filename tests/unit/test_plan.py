"""disco.guide.plan: a recommendation where the study carries one, a labelled default where it does not."""

import json
import math

import numpy as np
import pytest
from synthetic import columns

from disco.errors import UserError
from disco.fit import NORM, StudyFit, fit_table
from disco.guide import Plan, plan

RATES = np.arange(-9.0, 2.0)


def join(*tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def test_recovers_the_law_it_extrapolates() -> None:
    found = plan(fit_table(columns(RATES)), 2**22)
    assert found.supported
    assert found.batch.source == "rule"
    assert found.batch.value == 4096  # 2^(11 + 0.5 * 2)
    assert found.batch.interval is not None
    assert found.batch.interval[0] < 4096 < found.batch.interval[1] < 2 * 4096
    assert math.log2(found.lr.value) == pytest.approx(-4 + 0.6 - 0.5 * 2, abs=0.05)
    assert found.lr.interval is not None
    assert found.lr.interval[0] < 2**-4.4 < found.lr.interval[1]
    assert found.norm.source == "mean"
    assert math.log2(found.norm.value) == pytest.approx(6, abs=0.05)
    assert (found.octaves, found.cells) == (1, 20)


def test_a_given_batch_is_kept_and_moves_the_rate() -> None:
    fit = fit_table(columns(RATES))
    found = plan(fit, 2**22, batch=16384)
    assert (found.batch.value, found.batch.source) == (16384, "given")
    assert math.log2(found.lr.value) == pytest.approx(-4 + 0.6 * 3 - 0.5 * 2, abs=0.05)
    assert any("2^14 lies outside the grid of 2^9 to 2^13 tokens" in note for note in found.warnings)


def test_a_drifting_norm_is_extrapolated() -> None:
    found = plan(fit_table(columns(RATES, drift=0.2)), 2**23)
    assert found.norm.source == "rule"
    assert math.log2(found.norm.value) == pytest.approx(6 + 0.2 * 3, abs=0.1)
    assert "+0.20 octaves per doubling" in found.norm.why


def test_too_few_horizons_give_a_labelled_default() -> None:
    found = plan(fit_table(columns(RATES, horizons=(2**19, 2**20))), 2**23)
    assert not found.supported
    assert (found.batch.source, found.lr.source, found.norm.source) == ("default", "default", "default")
    assert found.batch.value == 2048
    assert math.log2(found.lr.value) == pytest.approx(-4, abs=0.1)
    assert found.lr.interval is None
    assert "carried over unchanged; no rule lr(batch, tokens): not enough: 10 of 10 cells" in found.lr.why
    assert sum("is a default, not a prediction" in note for note in found.warnings) == 2


def test_an_interval_too_wide_to_act_on_gives_a_default() -> None:
    rng = np.random.default_rng(2)
    table = columns(RATES, batches=(1024, 2048, 4096), horizons=(2**18, 2**19, 2**20))
    cell = {key: rng.normal(0, 1.5) for key in {*zip(table["batch"], table["tokens"], strict=True)}}
    shift = np.array([cell[key] for key in zip(table["batch"], table["tokens"], strict=True)])
    found = plan(fit_table(table | {"lr": table["lr"] * 2**shift}), 2**26)
    assert found.lr.source == "default"
    assert "octaves" in found.lr.why
    assert any("extrapolated 6.0 doublings of tokens from a study that spans 2.0" in note for note in found.warnings)


def test_nothing_to_go_by_is_said() -> None:
    found = plan(fit_table(columns(np.arange(-12.0, -8.0))), 2**22)
    assert math.isnan(found.lr.value)
    assert "no cell has an optimum inside its grid" in found.lr.why
    assert math.isnan(found.norm.value)
    assert found.to_dict()["lr"]["value"] is None


def test_choice_of_model_and_family() -> None:
    small, large = columns(RATES), columns(RATES, model=(64, 2))
    other = small | {"family": np.full(len(small["lr"]), "adamw"), "loss": small["loss"] + 1}
    fit = fit_table(join(small, large, other))
    assert (plan(fit, 2**22).model, plan(fit, 2**22).family) == ("d64-L2", "scion")
    assert plan(fit, 2**22, model="d32-L2").family == "scion"  # the lower loss
    one_batch = columns(RATES, model=(64, 2), batches=(2048,))
    assert plan(fit_table(join(small, one_batch)), 2**22).model == "d32-L2"  # the largest that carries a rule
    assert plan(fit, 2**22, family="adamw").model == "d32-L2"
    with pytest.raises(UserError, match="no model 'd1-L1'; it has 'd32-L2', 'd64-L2'"):
        plan(fit, 2**22, model="d1-L1")
    with pytest.raises(UserError, match="no runs of model 'd64-L2' in family 'adamw'"):
        plan(fit, 2**22, model="d64-L2", family="adamw")


def test_a_fit_of_nothing_is_no_fit() -> None:
    for model in (None, "d32-L2"):
        with pytest.raises(UserError, match="the fit holds no runs"):
            plan(StudyFit(NORM, (), (), (), (), (), ()), 2**22, model=model)


@pytest.mark.parametrize(("tokens", "batch"), [(0, None), (-1, None), (2**20, 0), (1024, 2048)])
def test_bad_input(tokens: int, batch: int | None) -> None:
    with pytest.raises(UserError, match="0 < batch <= tokens"):
        plan(fit_table(columns(RATES, batches=(2048,), horizons=(2**20,))), tokens, batch)


def test_a_short_run_gets_no_batch_longer_than_itself() -> None:
    assert plan(fit_table(columns(RATES)), 700).batch.value <= 700


def test_dictionary_and_back() -> None:
    found = plan(fit_table(columns(RATES)), 2**22)
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_interval_of_the_plan_covers() -> None:
    """The true optimum at twice the largest horizon, with the noise of every run drawn anew."""
    covered = 0
    for seed in range(40):
        table = columns(RATES, batches=(1024, 2048, 4096), noise=0.005, rng=np.random.default_rng(seed))
        lr = plan(fit_table(table), 2**22, batch=4096).lr
        assert lr.interval is not None
        covered += lr.interval[0] <= 2**-4.4 <= lr.interval[1]
    assert covered >= 36


def test_a_run_shorter_than_the_study_is_warned_of() -> None:
    fit = fit_table(columns(RATES))
    short, inside = plan(fit, 2**14), plan(fit, 2**20)
    assert any("shorter than the shortest horizon swept, 2^18 tokens" in note for note in short.warnings)
    assert not any("shorter" in note for note in inside.warnings)
