"""Published rules as objects."""

import math

import pytest

from disco.errors import UserError
from disco.fit import PUBLISHED, published

N, D = 1e9, 1e11


def test_values_are_those_of_the_formulas() -> None:
    compute = 6 * N * D
    step_law, deepseek, porian = map(published, ("step-law", "deepseek", "porian"))
    assert step_law.rate(D, parameters=N) == pytest.approx(1.79 * N**-0.713 * D**0.307)
    assert step_law.best_batch(D) == pytest.approx(0.58 * D**0.571)
    assert deepseek.rate(D, parameters=N) == pytest.approx(0.3118 * compute**-0.125)
    assert deepseek.best_batch(D, N) == pytest.approx(0.2920 * compute**0.3271)
    assert porian.rate(D, parameters=N) == pytest.approx(3.7 * N**-0.36)
    assert porian.best_batch(D, N) == pytest.approx(0.7576 * N**0.703)


def test_exponents_only_need_a_constant() -> None:
    rule = published("optimal-norm")
    assert rule.needs_constant
    with pytest.raises(UserError, match="gives exponents only for the learning rate; calibrate it first"):
        rule.rate(D, batch=2**20)
    tokens, batch = [2.0**29, 2.0**31], [2.0**15, 2.0**16]
    lr = [2.0**5 * b**0.62 * d**-0.56 for b, d in zip(batch, tokens, strict=True)]
    fitted = rule.calibrate(lr, batch, tokens, [N, N])
    assert fitted.calibrated
    assert fitted.rate(D, batch=2**20) == pytest.approx(2.0**5 * 2 ** (20 * 0.62) * D**-0.56)
    assert math.log2(fitted.best_batch(2.0**33)) == pytest.approx(15.5 + 3 * 0.45)
    assert published("step-law").calibrate(lr, batch, tokens, [N, N]) == published("step-law")


def test_power_lines_keeps_its_timescale() -> None:
    """B / (eta lambda D) moves with (D/N)^-0.527 at a fixed weight decay."""
    rule = published("power-lines").calibrate([1e-3], [2.0**20], [D], [N])

    def timescale(batch: float, tokens: float, size: float) -> float:
        return batch / (rule.rate(tokens, batch, size) * tokens)

    assert timescale(2**18, 8 * D, 2 * N) / timescale(2**20, D, N) == pytest.approx(4**-0.527)


def test_missing_arguments_and_names() -> None:
    with pytest.raises(UserError, match="its learning rate needs parameters as positive numbers"):
        published("porian").rate(D)
    with pytest.raises(UserError, match="gives no rule for the batch"):
        published("bjorck").best_batch(D)
    with pytest.raises(UserError, match="no published rule 'nobody'; there are step-law, deepseek"):
        published("nobody")
    for rule in PUBLISHED:
        assert rule.condition
        assert rule.source.startswith("arXiv:")
        assert type(rule).from_dict(rule.to_dict()).to_dict() == rule.to_dict()
