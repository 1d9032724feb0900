"""Adaptive rounds on simulated losses: exact reasons on a few surfaces, and small forms of the benchmark."""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from benchmarks.adaptive_simulated import LAST, Truth, grade, play, table

from disco.fit import NORM, fit_table
from disco.guide import plan
from disco.sweep.adaptive.belief import Belief, Runs
from disco.sweep.adaptive.estimates import BOOTSTRAPS, Estimate
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
    found = []
    for (batch, rate), last in runs.items():
        for tokens in (2**16, 2**17, 2**18):
            if tokens <= last:
                draw = np.random.default_rng([batch, round(1000 * (rate + 40)), tokens]).normal()
                y = loss(rate, math.log2(batch), math.log2(tokens)) + noise * draw
                lost = math.isinf(y)
                found.append(
                    (batch, 2.0**rate, tokens, math.nan if lost else y, lost, "m", 0.0005, 2.0 ** (6 + rate / 2))
                )
    names = ("batch", "lr", "tokens", "loss", "diverged", "model", "sigma", NORM)
    return {name: np.array([row[i] for row in found]) for i, name in enumerate(names)} if found else NOTHING


NOTHING: Columns = {name: np.zeros(0) for name in ("batch", "lr", "tokens", "loss")}


def bowl(middle: float, curvature: float = 0.03, diverges: float = math.inf) -> Loss:
    """A plain bowl: best rate 2^middle at a batch of 2^10 and 2^16 tokens, and best batch 2^10."""

    def loss(rate: float, batch: float, tokens: float) -> float:
        off = rate - (middle + 0.5 * (batch - 10) - 0.4 * (tokens - 16))
        level = 1.5 + 0.5 * 2 ** (-0.4 * (tokens - 16)) + 0.03 * (batch - 10) ** 2
        return math.inf if rate > diverges else level + curvature * off**2

    return loss


def follow(
    loss: Loss, where: Space, most: int = 40, noise: float = 0.001
) -> tuple[list[Round], dict[tuple[int, float], int]]:
    """All rounds of a study."""
    runs: dict[tuple[int, float], int] = {}
    rounds: list[Round] = []
    while not rounds or (rounds[-1].orders and len(rounds) < most):
        rounds.append(decide(where, rows(runs, loss, noise), sum(runs.values())))
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
    assert lines(rounds)[1:3] == [
        ["extended B=2^10 to 2^-7: optimum at the edge", "extended B=2^10 to 2^-8: optimum at the edge"],
        ["extended B=2^10 to 2^-9: optimum at the edge", "extended B=2^10 to 2^-10: optimum at the edge"],
    ]
    assert rounds[-1].answer["rate"] == pytest.approx(-8.8, abs=0.15)
    at_end = [rate for (_, rate), tokens in runs.items() if tokens == 2**18]
    assert sum(rate < -8.8 for rate in at_end) >= 2 <= sum(rate > -8.8 for rate in at_end)


def test_two_batches_are_warm_started_compared_and_explained() -> None:
    rounds, _ = follow(bowl(-4.0), space((1024, 2048)))
    assert lines(rounds) == [
        ["started B=2^11: 2^-6 .. 2^-2 to D=2^16"],
        [
            "extended B=2^11 to 2^-1: one point beyond the optimum",
            "started B=2^10: 2^-5 .. 2^-2 to D=2^16, optimum expected at 2^-3.98",
        ],
        ["extended B=2^10 to 2^-6: one point beyond the optimum"],
        [
            "stopped 2^-2 at B=2^10, D=2^16: cannot be the best (4.2 sigma)",
            "continued B=2^10: 2^-6 .. 2^-3 to D=2^17, optimum at D=2^18 expected at 2^-4.78 +- 0.55",
            "stopped 2^-2 .. 2^-1 at B=2^11, D=2^16: cannot be the best (3.3 sigma)",
            "continued B=2^11: 2^-6 .. 2^-3 to D=2^17, optimum at D=2^18 expected at 2^-4.28 +- 0.54",
        ],
        [
            "continued B=2^10: 2^-6 .. 2^-3 to D=2^18, optimum at D=2^18 expected at 2^-4.81 +- 0.21",
            "continued B=2^11: 2^-6 .. 2^-3 to D=2^18, optimum at D=2^18 expected at 2^-4.3 +- 0.23",
        ],
        [
            "stop: interval of eta* is 0.29 octaves wide (wanted 0.35)",
            "note: the best batch, 2^10, is the smallest of the study",
        ],
    ]
    assert rounds[-1].answer["batch"] == 1024
    assert rounds[-1].answer["rate"] == pytest.approx(-4.8, abs=0.05)
    assert float(rounds[-1].answer["ridge"]["2048"]) == pytest.approx(-4.3, abs=0.15)


def test_one_rate_is_enough_to_begin_with() -> None:
    where = dataclasses.replace(space(), rates=(-7.0,))
    rounds, _ = follow(bowl(-4.0), where)
    assert lines(rounds)[0] == ["started B=2^10: 2^-7 to D=2^16"]
    assert rounds[-1].lines[0].startswith("stop: interval of eta*")
    assert rounds[-1].answer["rate"] == pytest.approx(-4.8, abs=0.15)


def test_a_batch_that_cannot_be_the_best_stops() -> None:
    rounds, runs = follow(bowl(-4.0), space((512, 1024, 2048)))
    assert lines(rounds)[4][-1] == "stopped B=2^9 at D=2^17: cannot be the best batch (2.7 sigma)"
    assert max(tokens for (batch, _), tokens in runs.items() if batch == 512) == 2**17
    assert lines(rounds)[5] == ["stop: interval of eta* is 0.28 octaves wide (wanted 0.35)"]


def test_a_batch_starts_at_the_first_horizon_with_enough_steps() -> None:
    where = space((1024, 2048, 4096, 8192))
    assert [where.first(batch) for batch in where.batches] == [2**16, 2**16, 2**17, 2**18]
    rounds, runs = follow(bowl(-4.0), where)
    assert min(tokens for (batch, _), tokens in runs.items() if batch == 4096) >= 2**17
    assert "not started B=2^13: cannot be the best batch" in rounds[-1].lines[-2]


def test_a_flat_loss_has_no_interval_and_ends_with_the_budget() -> None:
    rounds, _ = follow(bowl(-4.0, curvature=0.0), space(budget=2**21), noise=0.004)
    at_end = next(round for round in rounds if round.lines[0].startswith("refined"))
    width = re.search(r"interval of eta\* is (?:not bounded|([\d.]+) octaves wide) \(wanted 0.35\)$", at_end.lines[0])
    assert width is not None
    assert width[1] is None or float(width[1]) > 2
    assert "stop: budget of 2^21 tokens spent" in rounds[-1].lines[1]
    assert not any("cannot be the best" in line for round in rounds for line in round.lines)


def test_diverged_runs_are_rates_that_are_too_high() -> None:
    rounds, runs = follow(bowl(-4.5, diverges=-3.5), space())
    assert not any(round.lines[0].startswith("extended") for round in rounds[1:])
    assert {rate: tokens for (_, rate), tokens in runs.items() if rate >= -3} == {-3.0: 2**16, -2.0: 2**16}
    assert rounds[-1].answer["rate"] == pytest.approx(-5.3, abs=0.1)


def test_rates_are_lowered_while_all_diverge() -> None:
    rounds, _ = follow(bowl(-9.5, diverges=-7.5), space())
    assert lines(rounds)[1] == ["started B=2^10: 2^-8 .. 2^-7 to D=2^16: all rates above diverged"]
    assert rounds[-1].answer["rate"] == pytest.approx(-10.3, abs=0.1)
    rounds, runs = follow(bowl(-9.5, diverges=-math.inf), space())
    assert rounds[-1].lines == ("stop: every run diverged, down to 2^-14 at B=2^10",)
    assert len(runs) == 13


def test_the_budget_is_kept_and_the_best_batch_goes_to_the_end_first() -> None:
    for octaves in (18.5, 19.5, 20.5, 21.5):
        budget = round(2**octaves)
        rounds, runs = follow(bowl(-4.0), space((512, 1024, 2048), budget=budget))
        assert sum(runs.values()) <= budget
        assert any("stop: " in line for line in rounds[-1].lines)
        if budget >= 2**20.5:
            assert max(runs.values()) == 2**18
    none = decide(space(budget=2**15), NOTHING, 0)
    assert (none.orders, none.lines) == ((), ("stop: budget of 2^15 tokens spent (32.8k left)",))


def test_the_norm_can_be_what_is_wanted() -> None:
    """The norm moves by half an octave per octave of the rate, so its interval is half as wide."""
    of_rate, of_norm = (follow(bowl(-4.0), space(quantity=quantity))[0][-1] for quantity in ("eta", "norm"))
    width = of_rate.answer["high"] - of_rate.answer["low"]
    assert of_norm.lines[0] == f"stop: interval of norm* is {width / 2:.2f} octaves wide (wanted 0.35)"


def test_the_plan_can_be_what_is_wanted() -> None:
    """The interval is that of ``disco plan``, and the batches beside the best one go along for its laws."""
    truth = Truth(1003)
    played = play(truth, Adaptive(quantity="plan", tokens=2**22, width=1.0), 26 * LAST)
    low, high = plan(fit_table(table(truth, played.reached), bootstraps=BOOTSTRAPS), 2**22).lr.interval or (0, 0)
    wide = f"{math.log2(high / low):.2f} octaves wide (wanted 1)"
    assert played.rounds[-1].lines[0] == f"stop: interval of eta* of the plan for 2^22 tokens is {wide}"
    assert len({batch for (batch, _), tokens in played.reached.items() if tokens == LAST}) >= 3


def test_rounds_are_a_function_of_the_table_whatever_the_order_of_its_rows() -> None:
    where = space((512, 1024, 2048))
    _, runs = follow(bowl(-4.0), where, most=6)
    known = rows(runs, bowl(-4.0))
    turned = {name: values[::-1] for name, values in known.items()}
    assert decide(where, known, 2**20) == decide(where, turned, 2**20)


def test_runs_may_have_gone_on_to_horizons_that_are_none_of_the_studys() -> None:
    where = space()
    _, runs = follow(bowl(-4.0), where, most=2)
    known = rows(runs, bowl(-4.0))
    also = {name: np.append(values, values[:3]) for name, values in known.items()}
    also["tokens"][-3:] = 2**15
    assert decide(where, known, 2**19) == decide(where, also, 2**19)


def test_the_belief_recovers_a_loss_of_its_own_form_and_its_derivatives_are_right() -> None:
    draw = np.random.default_rng(0)
    grid = [(u + b / 2, 9.0 + b, 16.0 + d) for u in (-6, -5, -4, -3) for b in range(3) for d in range(3)]
    rate, batch, tokens = np.array(grid).T
    loss = np.array([bowl(-4.0)(u, b, d) for u, b, d in grid])
    belief = Belief(
        Runs(rate, batch, tokens, loss + draw.normal(0, 1e-3, len(loss)), np.full(len(loss), 1e-3)),
        (-4, 10, 16),
        [(10.0, 20.0)],
    )
    assert belief.rate((10.0, 18.0))[0] == pytest.approx(-4.8, abs=0.1)
    near, far = belief.rate((10.0, 18.0))[1], belief.rate((10.0, 20.0))[1]
    assert near < far < 0.5
    assert belief.best([(9.0, 18.0), (10.0, 18.0), (11.0, 18.0)]) == 1
    assert belief.after((10.0, 20.0), [(-5.5, (10.0, 20.0)), (-3.5, (10.0, 20.0))], 1e-3) < far
    values = belief.mode + draw.normal(0, 0.1, len(belief.mode))
    base, jacobian = belief._model(values)
    for index in range(len(values)):
        step = np.zeros(len(values))
        step[index] = 1e-6
        assert (belief._model(values + step)[0] - base) / 1e-6 == pytest.approx(jacobian[:, index], rel=1e-3, abs=1e-4)


def test_noise_is_the_fits_and_the_error_rate_sets_the_limit() -> None:
    where = space()
    known = rows({(1024, float(rate)): 2**18 for rate in range(-8, -1)}, bowl(-4.5), noise=0.004)
    scans = Scans(known, where.horizons)
    limits = [Estimate(space(error_rate=rate), known, scans).limit for rate in (0.01, 0.05, 0.5)]
    assert limits[0] > 1.3 * limits[1] > 0
    assert limits[2] == pytest.approx(0, abs=1e-9)
    fitted = {cell.run_noise.sd for cell in fit_table(known).cells if cell.run_noise}
    assert {Estimate(where, known, scans).noise} == fitted


@pytest.mark.parametrize("kind", ["laws", "other"])
@pytest.mark.parametrize("seeds", [range(2000, 2001), pytest.param(range(2000, 2020), marks=pytest.mark.full)])
def test_simulated_studies_find_the_optimum_with_a_fifth_of_the_tokens(kind: str, seeds: range) -> None:
    """A small form of benchmarks/adaptive_simulated.py, where 95% of the studies are within both limits."""
    found = [grade(truth, play(truth, Adaptive(), round(13.2 * LAST))) for truth in (Truth(s, kind) for s in seeds)]
    assert np.mean([abs(study["off"]) <= 0.25 for study in found]) >= 0.85
    assert np.mean([study["regret"] <= 0.003 for study in found]) >= 0.85
    assert max(study["spent"] for study in found) <= 13.2
    assert max(study["rounds"] for study in found) < 25
