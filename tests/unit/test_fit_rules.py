"""disco.fit.power_law and disco.fit.norm_transfer."""

import numpy as np
import pytest
from scipy import stats

from disco.errors import UserError
from disco.fit import PowerLaw, Transfer, norm_transfer, power_law


def table(rng: np.random.Generator, scatter: float, n: int = 24) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    batch, tokens = 2.0 ** rng.integers(3, 12, n), 2.0 ** rng.integers(29, 37, n)
    return 2**9.75 * batch**0.62 * tokens**-0.56 * 2 ** rng.normal(0, scatter, n), {"batch": batch, "tokens": tokens}


def test_an_exact_law() -> None:
    law = power_law(*table(np.random.default_rng(0), 0.0))
    assert law.exponents == pytest.approx({"batch": 0.62, "tokens": -0.56})
    assert law.intercept == pytest.approx(9.75)
    assert law.r2 == pytest.approx(1)
    assert law.n == 24
    assert law.warnings == ()


def test_standard_errors_are_those_of_textbook_regression() -> None:
    y, x = table(np.random.default_rng(1), 0.4)
    line = stats.linregress(np.log2(x["batch"]), np.log2(y))
    law = power_law(y, {"batch": x["batch"]})
    assert law.exponents["batch"] == pytest.approx(line.slope)
    assert law.standard_errors["batch"] == pytest.approx(line.stderr)
    assert law.intercept_error == pytest.approx(line.intercept_stderr)
    assert law.r2 == pytest.approx(line.rvalue**2)


def test_a_weight_of_two_is_the_point_twice() -> None:
    y, x = table(np.random.default_rng(2), 0.4, 10)
    weight = np.array([2, 1, 1, 1, 2, 1, 1, 1, 1, 1])
    twice = np.repeat(np.arange(10), weight)
    law, copied = power_law(y, x, weight), power_law(y[twice], {name: column[twice] for name, column in x.items()})
    assert law.exponents == pytest.approx(copied.exponents)
    assert law.intercept == pytest.approx(copied.intercept)


def test_permuting_a_column_changes_the_law() -> None:
    rng = np.random.default_rng(3)
    y, x = table(rng, 0.1)
    mixed = power_law(y, {**x, "batch": rng.permutation(x["batch"])})
    assert abs(mixed.exponents["batch"] - 0.62) > 0.2
    assert mixed.r2 < 0.9


def test_units_move_only_the_intercept() -> None:
    y, x = table(np.random.default_rng(4), 0.3)
    law, other = power_law(y, x), power_law(y, {**x, "batch": 4096 * x["batch"]})
    assert other.exponents == pytest.approx(law.exponents)
    assert other.standard_errors == pytest.approx(law.standard_errors)
    assert other.intercept == pytest.approx(law.intercept - 12 * law.exponents["batch"])


def test_interaction_is_found_and_does_not_depend_on_units() -> None:
    y, x = table(np.random.default_rng(5), 0.05)
    y = y * 2 ** (0.05 * (np.log2(x["batch"]) - 7) * (np.log2(x["tokens"]) - 33))
    for unit in (1, 4096):
        law = power_law(y, {**x, "batch": unit * x["batch"]}, interactions=True)
        assert list(law.exponents) == ["batch", "tokens", "batch:tokens"]
        assert abs(law.exponents["batch:tokens"] - 0.05) < 3 * law.standard_errors["batch:tokens"] < 0.02


def test_predictions_are_those_of_the_formula() -> None:
    y, x = table(np.random.default_rng(6), 0.3)
    law = power_law(y, x)
    at = {"batch": 2.0**9, "tokens": 2.0**38}
    design = np.stack([np.ones(24), *(np.log2(column) for column in x.values())], axis=1)
    row = np.array([1, 9, 38])
    half = stats.t.ppf(0.95, 21) * law.scatter * np.sqrt(1 + row @ np.linalg.inv(design.T @ design) @ row)
    prediction = law.predict(at)
    assert prediction.log2 == pytest.approx(law.intercept + 9 * law.exponents["batch"] + 38 * law.exponents["tokens"])
    assert prediction.high - prediction.log2 == pytest.approx(half)


def test_intervals_of_exponents_cover() -> None:
    rng = np.random.default_rng(8)
    covered = predicted = 0
    for _ in range(400):
        law = power_law(*table(rng, 0.3))
        low, high = law.interval("tokens")
        covered += low <= -0.56 <= high
        new = law.predict({"batch": 2.0**12, "tokens": 2.0**39})
        predicted += new.low <= 9.75 + 12 * 0.62 - 39 * 0.56 + rng.normal(0, 0.3) <= new.high
    assert 0.85 <= covered / 400 <= 0.95
    assert 0.85 <= predicted / 400 <= 0.95


def test_warnings() -> None:
    exact = power_law([1, 2], {"tokens": [1, 2]})
    assert exact.warnings[0] == "as many parameters as points: no standard errors"
    assert np.isnan(exact.standard_errors["tokens"])
    assert exact.predict({"tokens": 8}).high == np.inf
    few = power_law([1, 2.1, 4], {"tokens": [1, 2, 4]})
    assert few.warnings == ("only 1 more point than parameters: intervals are wide",)
    narrow = power_law([1, 1.1, 1.2, 1.3, 1.4], {"tokens": [1, 1.1, 1.2, 1.3, 1.4]})
    assert "tokens spans a factor of 1.4 only" in narrow.warnings
    line = 2.0 ** np.arange(10)
    near = line * (1 + 0.01 * np.array([1, -1, 1, 1, -1, -1, 1, -1, 1, -1]))
    assert "nearly together" in power_law(line, {"batch": near, "tokens": line}).warnings[0]
    heavy = power_law(line * near, {"tokens": near}, weights=[100, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert "1.2 effective points of 10" in heavy.warnings[0]


@pytest.mark.parametrize(
    ("y", "x", "message"),
    [
        ([1, 2, 3], {"tokens": [1, 2]}, "tokens has 2 values and y has 3"),
        ([1, 2, 0], {"tokens": [1, 2, 4]}, "y must be positive, got 0.0 at index 2"),
        ([1, 2, 3], {"tokens": [1, np.nan, 4]}, "tokens must be positive, got nan at index 1"),
        ([1], {"tokens": [2]}, "2 parameters need at least as many points, got 1"),
        ([1, 2, 3], {"tokens": [2, 2, 2]}, "tokens has one value only"),
        ([1, 2, 3, 5], {"batch": [1, 2, 4, 8], "tokens": [1, 4, 16, 64]}, "batch, tokens vary together"),
        ([1, 2, 3], {"a:b": [1, 2, 4]}, "must not contain ':'"),
    ],
)
def test_errors(y: list, x: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        power_law(y, x)
    with pytest.raises(UserError, match="weights must be 2 positive numbers"):
        power_law([1, 2], {"tokens": [1, 2]}, weights=[1, 0])


def test_dictionary_and_back() -> None:
    law = power_law(*table(np.random.default_rng(9), 0.3))
    again = PowerLaw.from_dict(law.to_dict())
    assert again == law
    assert again.predict({"batch": 4, "tokens": 8}) == law.predict({"batch": 4, "tokens": 8})


TOKENS = 2.0 ** np.arange(20, 26)
WIGGLE = 2 ** np.array([0.02, -0.03, 0.01, -0.01, 0.03, -0.02])


def test_transfer_verdicts() -> None:
    constant = norm_transfer(TOKENS, 64 * WIGGLE, margin=0.05)
    assert constant.verdict == "transfers"
    assert constant.constant
    drifting = norm_transfer(TOKENS, 64 * WIGGLE * TOKENS**0.2, margin=0.05)
    assert drifting.verdict == "drifts"
    assert drifting.slope == pytest.approx(0.2, abs=0.02)
    assert norm_transfer(TOKENS, 64 * WIGGLE**10, margin=0.05).verdict == "cannot tell"
    assert norm_transfer(TOKENS[:2], 64 * WIGGLE[:2], margin=0.05) == Transfer(
        pytest.approx(-0.05), None, 0.05, "cannot tell", 2
    )
    assert np.isnan(norm_transfer(TOKENS[:1], [64], margin=0.05).slope)
    with pytest.raises(UserError, match="margin must be a positive slope"):
        norm_transfer(TOKENS, 64 * WIGGLE, margin=0)


def test_transfer_errs_at_the_stated_rate() -> None:
    """With the true slope on the margin either firm verdict is a draw of 5%."""
    rng = np.random.default_rng(10)
    said = [
        norm_transfer(TOKENS, 64 * TOKENS**0.1 * 2 ** rng.normal(0, 0.1, 6), margin=0.1).verdict for _ in range(400)
    ]
    assert said.count("transfers") <= 0.08 * 400  # 5% and the spread of 400 draws
    assert said.count("drifts") <= 0.08 * 400
