"""Scaling rules of a study: censored edges, resampled runs, interaction, held-out horizons, composite, sizes."""

import json
import math

import numpy as np
import pytest
from synthetic import columns

from disco.errors import UserError
from disco.fit import Rule, StudyFit, fit_table
from disco.fit._study import NORM, fit_once

RATES = np.arange(-9.0, 2.0)
STUDY = ("scion", "d32-L2")


def correlated(seed: int, noise: float = 0.01, share: float = 0.8, **options: object) -> dict[str, np.ndarray]:
    """The synthetic study with noise of which a ``share`` of the variance is one draw per run."""
    table = columns(RATES, noise=0.0, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    _, run = np.unique(table["run"], return_inverse=True)
    own = rng.normal(0, noise * math.sqrt(share), run.max() + 1)[run]
    table = {name: values for name, values in table.items() if name != NORM}
    return table | {"loss": table["loss"] + own + rng.normal(0, noise * math.sqrt(1 - share), len(run))}


@pytest.fixture(scope="module")
def fit() -> StudyFit:
    return fit_table(correlated(0), bootstraps=200)


def test_resampled_rules(fit: StudyFit) -> None:
    rule = fit.rule(*STUDY, "lr(batch, tokens)")
    assert rule.law is not None
    assert rule.law.bootstraps > 180
    assert rule.law.n == 20
    plain = fit_table(correlated(0)).rule(*STUDY, "lr(batch, tokens)").law
    assert plain is not None
    assert rule.law.exponents == plain.exponents
    assert rule.law.standard_errors != plain.standard_errors
    assert not any("correlated" in note for note in fit.warnings)
    again = fit_once(correlated(0), NORM, 200, 0).rule(*STUDY, "lr(batch, tokens)").law
    assert again == rule.law  # the seed decides
    for name, true in (("batch", 0.6), ("tokens", -0.5)):
        low, high = rule.law.interval(name)
        assert low < true < high
        assert 0.02 < high - low < 0.4


def test_runs_that_share_their_noise_are_not_independent() -> None:
    """Shared noise is not averaged away over the horizons, and the errors know it."""

    def error(share: float) -> float:
        laws = (
            fit_once(correlated(s, share=share), NORM, 200, s).rule(*STUDY, "lr(batch, tokens)").law for s in range(3)
        )
        return float(np.mean([law.standard_errors["tokens"] for law in laws if law]))

    assert error(1.0) > 1.05 * error(0.0)


def test_rows_may_be_shuffled_but_not_columns(fit: StudyFit) -> None:
    table = correlated(0)
    order = np.random.default_rng(1).permutation(len(table["lr"]))
    shuffled = fit_once({name: values[order] for name, values in table.items()}, NORM, 200, 0)
    law, again = (f.rule(*STUDY, "lr(batch, tokens)").law for f in (fit, shuffled))
    assert law is not None
    assert again is not None
    assert again.standard_errors == pytest.approx(law.standard_errors)
    for name in ("lr", "batch", "tokens", "loss"):
        mixed = fit_table(table | {name: table[name][order]})
        other = mixed.rule(*STUDY, "lr(batch, tokens)").law
        assert other is None or np.hypot(other.exponents["batch"] - 0.6, other.exponents["tokens"] + 0.5) > 0.2


def test_coverage_in_small(fit: StudyFit) -> None:
    """The full form is benchmarks/coverage/rules.py."""
    covered = []
    for seed in range(6):
        law = (
            fit_once(correlated(seed, batches=(512, 2048, 8192)), NORM, 100, seed).rule(*STUDY, "lr(batch, tokens)").law
        )
        assert law is not None
        for name, true in (("batch", 0.6), ("tokens", -0.5)):
            low, high = law.interval(name)
            covered.append(low <= true <= high)
    assert 0.8 <= np.mean(covered) <= 1.0


def test_edges_bound_the_rule() -> None:
    table = columns(np.arange(-9.0, -2.9))
    rule = fit_table(table).rule(*STUDY, "lr(batch, tokens)")
    assert rule.law is not None
    assert rule.law.censored >= 3
    assert rule.law.censored <= rule.left_out
    assert rule.law.exponents == pytest.approx({"batch": 0.6, "tokens": -0.5}, abs=0.03)


def test_interaction(fit: StudyFit) -> None:
    found = fit.rule(*STUDY, "lr(batch, tokens)").interaction
    assert found is not None
    assert found.interval[0] < 0 < found.interval[1]
    assert found.p_value > 0.05
    table = columns(RATES)
    product = 0.15 * (np.log2(table["batch"]) - 11) * (np.log2(table["tokens"]) - 19)
    bent = fit_table(table | {"lr": table["lr"] * 2**product}).rule(*STUDY, "lr(batch, tokens)").interaction
    assert bent is not None
    assert bent.value == pytest.approx(0.15, abs=0.02)
    assert bent.p_value < 1e-6


def test_leaving_out_a_horizon(fit: StudyFit) -> None:
    held = fit.rule(*STUDY, "lr(batch, tokens)").held_out
    assert [item.tokens for item in held] == [2**18, 2**19, 2**20, 2**21]
    for item in held:
        assert item.n == 5
        assert abs(item.bias) <= item.error < 0.5
        assert item.exponents["batch"] == pytest.approx(0.6, abs=0.15)


def test_composite_and_direct_exponent_agree(fit: StudyFit) -> None:
    (found,) = fit.composites
    assert found.composite == pytest.approx(-0.5 + 0.6 * 0.5, abs=0.15)
    assert found.direct == pytest.approx(-0.2, abs=0.15)
    assert found.composite_interval is not None
    assert found.composite_interval[0] < -0.2 < found.composite_interval[1]
    assert found.difference_interval is not None
    assert found.difference_interval[0] < 0 < found.difference_interval[1]
    (plain,) = fit_table(correlated(0)).composites
    assert plain.difference_interval is None


def test_joint_optima_carry_rules_too(fit: StudyFit) -> None:
    assert len(fit.bottoms) == 4
    for item in fit.bottoms:
        octave = math.log2(item.tokens) - 20
        assert item.optimum.batch == pytest.approx(11 + 0.5 * octave, abs=0.4)
        assert item.optimum.ridge == pytest.approx(0.6, abs=0.1)
        assert item.near.largest >= 2**item.optimum.batch
    law = fit.rule(*STUDY, "batch(tokens)", "joint").law
    assert law is not None
    low, high = law.interval("tokens")
    assert low < 0.5 < high


def test_sizes() -> None:
    parts = []
    for width in (32, 64, 128):
        part = columns(RATES, model=(width, 2))
        parts.append(
            part | {"lr": part["lr"] * (width / 32) ** -0.5, "parameters": 0 * part["width"] + 12 * width**2 * 2}
        )
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = fit_table(table)
    rules = {rule.name: rule for rule in found.rules if not rule.model and rule.recipe == "quadratic"}
    law = rules["lr(batch, tokens, parameters)"].law
    assert law is not None
    assert law.exponents == pytest.approx({"batch": 0.6, "tokens": -0.5, "parameters": -0.25}, abs=0.02)
    assert rules["lr(batch, tokens, width)"].law is not None
    assert rules["lr(batch, tokens, width)"].law.exponents["width"] == pytest.approx(-0.5, abs=0.04)
    assert rules["batch(tokens)"].n == 12
    assert rules["batch(tokens, parameters)"].law is not None
    assert rules["batch(tokens, parameters)"].law.exponents["parameters"] == pytest.approx(0, abs=0.03)
    assert found.rule("scion", "", "lr(tokens, parameters)", "joint").law is not None


def test_it_all_goes_to_json_and_back(fit: StudyFit) -> None:
    text = json.dumps(fit.to_dict(), allow_nan=False)
    again = StudyFit.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    assert again.rule(*STUDY, "lr(batch, tokens)") == fit.rule(*STUDY, "lr(batch, tokens)")
    assert again.default_stage == fit.default_stage
    old = json.loads(text)
    for key in ("bottoms", "composites", "surfaces", "rolling", "bootstraps"):
        del old[key]
    for rule in old["rules"]:
        del rule["interaction"], rule["held_out"]
        if rule["law"]:
            for key in ("censored", "misfit", "bootstraps", "degrees"):
                del rule["law"][key]
    before = StudyFit.from_dict(old)  # a fit.json of the first form
    assert before.bottoms == ()
    assert isinstance(before.rules[0], Rule)
    assert before.default_stage == "two-stage"


def test_too_few_resamples_are_refused() -> None:
    with pytest.raises(UserError, match="bootstraps must be 0 or at least 100, got 5"):
        fit_table(correlated(0), bootstraps=5)
