"""disco.guide.plan: a recommendation where the study carries one, a labelled default where it does not."""

import json
import math

import numpy as np
import pytest
from synthetic import columns

from disco.errors import UserError
from disco.fit import NORM, StudyFit, fit_table
from disco.guide import Plan, plan
from disco.runs.writer import write_json

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
    assert found.norm.source == "rule"
    assert math.log2(found.norm.value) == pytest.approx(6, abs=0.05)
    assert found.norm.interval is not None
    assert found.norm.interval[0] < 2**6 < found.norm.interval[1]
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
    assert "+0.19 octaves per doubling" in found.norm.why  # drawn a little towards none


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


def test_a_run_shorter_than_the_study_is_warned_of() -> None:
    fit = fit_table(columns(RATES))
    short, inside = plan(fit, 2**14), plan(fit, 2**20)
    assert any("shorter than the shortest horizon swept, 2^18 tokens" in note for note in short.warnings)
    assert not any("shorter" in note for note in inside.warnings)


@pytest.fixture(scope="module")
def resampled() -> StudyFit:
    table = columns(RATES, noise=0.004, rng=np.random.default_rng(3))
    return fit_table(table, bootstraps=200)


def test_every_stage_answers_and_the_rolling_origin_chooses(resampled: StudyFit) -> None:
    found = plan(resampled, 2**22)
    assert found.stage == resampled.default_stage
    assert found.answers[0].name == found.stage
    assert {answer.name for answer in found.answers} >= {"two-stage", "joint", "one-stage", "paper's recipe"}
    for stage in ("two-stage", "joint", "one-stage"):
        own = plan(resampled, 2**22, stage=stage)
        assert own.stage == stage
        assert math.log2(own.lr.value) == pytest.approx(-4 + 0.6 * (math.log2(own.batch.value) - 11) - 1, abs=0.15)
        best = own.answers[0].batch
        assert best is not None
        assert math.log2(best) == pytest.approx(12, abs=0.3)
    with pytest.raises(UserError, match="stage must be one of two-stage, joint, one-stage, got 'both'"):
        plan(resampled, 2**22, stage="both")


def test_disagreement_of_the_stages_widens_the_interval(resampled: StudyFit) -> None:
    found = plan(resampled, 2**22)
    alone = next(answer for answer in found.answers if answer.name == found.stage)
    assert found.batch.interval is not None
    assert alone.batch_interval is not None
    assert found.batch.interval[0] < alone.batch_interval[0] < alone.batch_interval[1] < found.batch.interval[1]


def test_published_rules_stand_beside_with_their_conditions(resampled: StudyFit) -> None:
    answers = {answer.name: answer for answer in plan(resampled, 2**22).answers}
    step_law = answers["step-law"]
    size = 12 * 32**2 * 2
    assert step_law.lr == pytest.approx(1.79 * size**-0.713 * 2 ** (22 * 0.307), rel=1e-6)
    assert step_law.batch == pytest.approx(0.58 * 2 ** (22 * 0.571), rel=1e-6)
    assert "AdamW" in step_law.conditions
    ours = answers["two-stage"]
    assert step_law.cost is not None
    assert ours.cost is not None
    assert step_law.cost > 0.1 > 0.01 > ours.cost
    assert "constant from 4 optima" in answers["optimal-norm"].note
    wide = {answer.name: answer for answer in plan(resampled, 2**22, width=64).answers}["step-law"]
    assert (wide.lr, wide.note) == (None, "its learning rate needs parameters as positive numbers")
    sized = {answer.name: answer for answer in plan(resampled, 2**22, width=64, parameters=10**5).answers}["step-law"]
    assert sized.lr == pytest.approx(1.79 * 1e5**-0.713 * 2 ** (22 * 0.307), rel=1e-6)


def test_width_by_a_rule_where_several_were_swept_and_by_assumption_otherwise(resampled: StudyFit) -> None:
    def at(width: int) -> dict[str, np.ndarray]:
        table = columns(RATES, model=(width, 2), rng=np.random.default_rng(width))
        return table | {"lr": table["lr"] * (width / 32) ** -0.25}

    fit = fit_table(join(at(32), at(64), at(128)))
    found = plan(fit, 2**22, width=512)
    assert (found.model, found.width, found.parameters) == ("d128-L2", 512, None)
    assert found.lr.source == "rule"
    assert "lr(batch, tokens, width)" in found.lr.why
    expected = -4 + 0.6 * (math.log2(found.batch.value) - 11) - 1 - 0.25 * 4
    assert math.log2(found.lr.value) == pytest.approx(expected, abs=0.1)
    assumed = plan(resampled, 2**22, width=512)
    assert assumed.lr.source == "assumed"
    assert assumed.supported
    assert math.log2(assumed.lr.value) == pytest.approx(math.log2(plan(resampled, 2**22).lr.value))
    assert assumed.trust == "caution"
    assert any("width 512 is not that of the sweep (32): assumed, not measured" in note for note in assumed.warnings)
    assert plan(resampled, 2**22, width=32).lr.source == "rule"


def test_one_batch_gives_a_rate_but_no_best_batch() -> None:
    found = plan(fit_table(columns(RATES, batches=(2048,))), 2**22)
    assert (found.batch.value, found.batch.source) == (2048, "default")
    assert found.lr.source == "rule"
    assert math.log2(found.lr.value) == pytest.approx(-4 - 1, abs=0.1)
    assert found.trust == "do not trust"
    assert plan(fit_table(columns(RATES, batches=(2048,))), 2**22, batch=2048).trust == "caution"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "largest batch must be positive, got 0"),
        ({"batch": 4096, "max_batch": 2048}, "a batch of 4096 is larger than the largest allowed, 2048"),
        ({"width": -1.0}, "width must be a positive number, got -1.0"),
        ({"tolerance": math.nan}, "tolerance must be a positive number, got nan"),
    ],
)
def test_bad_numbers(resampled: StudyFit, wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(resampled, 2**22, **wrong)  # type: ignore[arg-type]


def test_a_plan_from_the_file_is_the_plan_from_memory(tmp_path) -> None:
    small, large = columns(RATES), columns(RATES)
    for table, name, parameters in ((small, "d32-L2", 2.0**15), (large, "d64-L2", 2.0**17)):
        table["model"] = np.full(len(table["lr"]), name)
        table["parameters"] = np.full(len(table["lr"]), parameters)
    rng = np.random.default_rng(0)
    both = join(small, large)
    both["loss"] = both["loss"] + rng.normal(0, 0.002, len(both["loss"]))
    fit = fit_table(both, bootstraps=100)
    assert any("parameters" in (rule.law.exponents if rule.law else ()) for rule in fit.rules)
    path = tmp_path / "fit.json"
    write_json(path, fit.to_dict())  # sorts names, which must not mix up the errors of a law
    again = plan(StudyFit.from_dict(json.loads(path.read_text())), 2**22)
    for name in ("batch", "lr", "norm"):
        assert getattr(again, name).interval == pytest.approx(getattr(plan(fit, 2**22), name).interval)
