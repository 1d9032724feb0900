"""Adaptive rounds on simulated losses: exact reasons on a few surfaces, and small forms of the benchmark."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from benchmarks.adaptive_simulated import LAST, Truth, grade, play

from disco.fit import NORM
from disco.sweep.adaptive.belief import Belief, Runs
from disco.sweep.adaptive.estimates import Estimate
from disco.sweep.adaptive.policy import Round, decide
from disco.sweep.adaptive.scans import Columns, Order, Scans, Space
from disco.sweep.adaptive.settings import Adaptive

Loss = Callable[[float, float, float], float]
"""Of log2 rate, batch and tokens; infinite: the run diverges."""


def space(batches: tuple[int, ...] = (1024,), budget: int = 2**24, **settings: object) -> Space:
    rates = (-6.0, -5.0, -4.0, -3.0, -2.0)
    return Space(batches, (2**16, 2**17, 2**18), rates, budget, Adaptive(**settings))  # type: ignore[arg-type]


def rows(runs: dict[tuple[int, float], int], loss: Loss, noise: float = 0.001) -> Columns:
    """Measured losses of runs, by batch and rate, up to a horizon."""
    table = []
    for (batch, rate), last in runs.items():
        for tokens in (2**16, 2**17, 2**18):
            if tokens <= last:
                draw = np.random.default_rng([batch, round(1000 * (rate + 40)), tokens]).normal()
                y = loss(rate, math.log2(batch), math.log2(tokens)) + noise * draw
                lost = math.isinf(y)
                table.append((batch, 2.0**rate, tokens, math.nan if lost else y, lost, "m", 0.0005, 2.0 ** (6 + rate / 2)))
    names = ("batch", "lr", "tokens", "loss", "diverged", "model", "sigma", NORM)
    return {name: np.array([row[i] for row in table]) for i, name in enumerate(names)} if table else NOTHING


NOTHING: Columns = {name: np.zeros(0) for name in ("batch", "lr", "tokens", "loss")}


def bowl(middle: float, curvature: float = 0.03, diverges: float = math.inf) -> Loss:
    """A plain bowl: best rate 2^middle at a batch of 2^10 and 2^16 tokens, and best batch 2^10."""

    def loss(rate: float, batch: float, tokens: float) -> float:
        off = rate - (middle + 0.5 * (batch - 10) - 0.4 * (tokens - 16))
        level = 1.5 + 2 ** (-0.4 * (tokens - batch - 6)) + 0.02 * (batch - 10) ** 2
        return math.inf if rate > diverges else level + curvature * off**2

    return loss


def follow(loss: Loss, where: Space, most: int = 40) -> tuple[list[Round], dict[tuple[int, float], int]]:
    """All rounds of a study."""
    runs: dict[tuple[int, float], int] = {}
    rounds: list[Round] = []
    while not rounds or (rounds[-1].orders and len(rounds) < most):
        rounds.append(decide(where, rows(runs, loss), sum(runs.values())))
        for order in rounds[-1].orders:
            runs[order.batch, order.rate] = max(order.tokens, runs.get((order.batch, order.rate), 0))
    return rounds, runs


def lines(rounds: list[Round]) -> list[list[str]]:
    return [list(round.lines) for round in rounds]


def test_a_study_starts_with_the_files_rates_at_the_shortest_horizon() -> None:
    first = decide(space((512, 1024, 2048)), NOTHING, 0)
    assert first.orders == tuple(Order(1024, rate, 2**16) for rate in (-6.0, -5.0, -4.0, -3.0, -2.0))
    assert first.lines == ("started B=2^10: 2^-6 .. 2^-2 to D=2^16",)
    assert not first.answer


def test_an_optimum_at_the_edge_is_followed_until_two_points_stand_beyond_it() -> None:
    rounds, runs = follow(bowl(-8.0), space())
    assert lines(rounds)[1] == ["extended B=2^10 to 2^-7: optimum at the edge", "extended B=2^10 to 2^-8: optimum at the edge"]
    assert lines(rounds)[2] == ["extended B=2^10 to 2^-9: optimum at the edge", "extended B=2^10 to 2^-10: optimum at the edge"]
    assert rounds[-1].answer["rate"] == pytest.approx(-8.8, abs=0.15)
    at_end = [rate for (_, rate), tokens in runs.items() if tokens == 2**18]
    assert sum(rate < -8.8 for rate in at_end) >= 2 <= sum(rate > -8.8 for rate in at_end)
