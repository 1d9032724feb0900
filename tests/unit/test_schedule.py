"""Schedule and evaluation points: hand-made numbers, and what must hold for every configuration."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from disco.runs.horizons import window
from disco.train.config import DataConfig, ModelConfig, ScheduleConfig, TrainConfig
from disco.train.schedule import Point, evaluation_points, factor, learning_rate_factor

MODEL = ModelConfig(width=32, depth=2, head_size=16, context=128)


def config(batch: int = 1024, horizon: int = 2**20, valid: int = 2**16, **schedule: Any) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        data=DataConfig(valid_tokens=valid),
        schedule=ScheduleConfig(**schedule),
        batch=batch,
        horizon=horizon,
    )


def test_constant() -> None:
    assert {factor(step, steps=9) for step in range(9)} == {1.0}


def test_warmup_and_decay_by_hand() -> None:
    factors = [factor(step, steps=8, warmup=4, decay=4) for step in range(8)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_where_warmup_and_decay_meet_the_lower_holds() -> None:
    assert [factor(step, steps=4, warmup=4, decay=4) for step in range(4)] == [0.25, 0.5, 0.5, 0.25]


def test_steps_outside_the_run_and_unknown_shapes_are_errors() -> None:
    for step in (-1, 10):
        with pytest.raises(ValueError, match=r"step must be in 0\.\.9"):
            factor(step, steps=10)
    with pytest.raises(ValueError, match="'cosin'"):
        factor(0, steps=10, shape="cosin")  # type: ignore[arg-type]


@given(
    st.integers(1, 200),
    st.floats(0, 300),
    st.integers(0, 200),
    st.sampled_from(["linear", "sqrt", "cosine"]),
    st.floats(0, 1),
)
def test_factor_rises_then_falls_within_its_bounds(
    steps: int, warmup: float, decay: int, shape: Any, minimum: float
) -> None:
    factors = [
        factor(step, steps=steps, warmup=warmup, decay=min(decay, steps), shape=shape, minimum=minimum)
        for step in range(steps)
    ]
    assert all(0 < value <= 1 for value in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_config_is_in_tokens() -> None:
    run = config(batch=1024, horizon=16 * 1024, warmup=2 * 1024, decay=0.25)
    assert [learning_rate_factor(run, step) for step in range(16)] == [0.5] + [1.0] * 12 + [0.75, 0.5, 0.25]


def test_without_decay_the_factor_does_not_depend_on_the_horizon() -> None:
    short, long = (config(horizon=horizon, warmup=5000) for horizon in (2**18, 2**20))
    for step in range(256):
        assert learning_rate_factor(short, step) == learning_rate_factor(long, step)


def test_a_decay_branch_is_constant_until_it_starts() -> None:
    run = config(horizon=4 * 2**18, decay=0.25)
    start = run.branch_tokens // run.batch
    assert start == 768
    assert {learning_rate_factor(run, step) for step in range(start + 1)} == {1.0}
    assert learning_rate_factor(run, 1023) == pytest.approx(1 / 256)


def test_points_by_hand() -> None:
    points = evaluation_points(config(batch=128, horizon=2**14, valid=2**11))
    windows = {0, 62, 63, 64, 124, 126, 128}  # 2^13 = 4 x valid, and 2^14, in steps of 128
    curve = {1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128}
    assert points == tuple(Point(step, step in windows) for step in sorted(windows | curve))


def test_a_horizon_that_is_no_power_of_two_gets_its_window() -> None:
    points = evaluation_points(config(batch=1024, horizon=300 * 1024))
    assert [point.step for point in points if point.horizon] == [0, 248, 252, 256, 292, 296, 300]


def test_windows() -> None:
    assert [window(step) for step in (1, 2, 3, 64, 127, 128)] == [
        (1,), (1, 2), (1, 2, 3), (62, 63, 64), (125, 126, 127), (124, 126, 128)
    ]  # fmt: skip


def test_a_run_of_one_step() -> None:
    assert evaluation_points(config(batch=8192, horizon=8192)) == (Point(0, True), Point(1, True))


batches = st.integers(0, 7).map(lambda power: 2**power * 128) | st.sampled_from([384, 640])


@given(batches, st.integers(1, 3000), st.integers(1, 3000), st.integers(7, 14))
@example(batch=128, steps=249, more=8, valid=7)  # ends inside the window of the horizon of 256 steps
def test_a_longer_run_only_appends_points(batch: int, steps: int, more: int, valid: int) -> None:
    short = config(batch=batch, horizon=steps * batch, valid=2**valid)
    points = evaluation_points(short)
    longer = evaluation_points(replace(short, horizon=(steps + more) * batch))

    assert [point.step for point in points] == sorted({point.step for point in points})
    assert points[0] == Point(0, True)
    assert points[-1] == Point(steps, True)

    own = {*window(steps), *window(steps + more)}
    outside = [point for point in points if point.step not in own]
    assert outside == [point for point in longer if point.step <= steps and point.step not in own]
