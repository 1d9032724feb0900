"""Adaptive studies on losses with a known truth: error, regret, tokens, and what stopping drops.

    python benchmarks/adaptive_simulated.py [--kind laws|other] [--seeds FIRST COUNT] [--budget 13.2] [--width 0.35]

Batches 2^8 to 2^13, horizons 2^16 to 2^20 tokens, a guess of the best rate that is up to two octaves off. Kind "laws"
has the policy's own laws, with levels that stray from them, four shapes of bowls and a bent drift; on its seeds below
1000 the constants were chosen. Kind "other" shares no formula with the policy: best batches drift, small batches bend
the ridge, the drift of the optimal rate changes half-way, bowls have kinks or plateaus, and 3% of the runs outliers.
The budget is in runs to the end; the full grid has 66. One or two seconds per study.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from disco.sweep.adaptive.policy import Round, decide
from disco.sweep.adaptive.scans import Columns, Space
from disco.sweep.adaptive.settings import Adaptive

BATCHES = tuple(2**k for k in range(8, 14))
HORIZONS = tuple(2**k for k in range(16, 21))
LAST, END = HORIZONS[-1], 20.0
SHAPES = ("parabola", "linex", "two parabolas", "wall")
OTHER_SHAPES = ("kink", "plateau", "cubic", "wall")
GRID = 11 * len(BATCHES)
"""Runs of the full grid."""


class Truth:
    """A loss over log2 rate, batch and tokens, and the noise of its runs. All arguments are log2."""

    def __init__(self, seed: int, kind: str = "laws") -> None:
        draw = np.random.default_rng([seed, len(kind)])
        self.seed, self.kind = seed, kind
        self.floor, self.size, self.exponent = draw.uniform(1.2, 1.7), draw.uniform(0.25, 0.5), draw.uniform(0.3, 0.6)
        self.best_batch, self.batch_exponent = draw.uniform(8.7, 11.6), draw.uniform(0.3, 0.7)
        self.alpha, self.delta, self.bend = draw.uniform(0.3, 0.7), draw.uniform(-0.6, -0.2), draw.normal(0, 0.03)
        self.middle = draw.uniform(-6, -1)
        self.curvature, self.drift = math.exp(draw.uniform(math.log(0.007), math.log(0.03))), draw.normal(0, 0.12)
        self.shape = (SHAPES if kind == "laws" else OTHER_SHAPES)[draw.integers(4)]
        self.skew = draw.normal(0, 0.35)
        self.noise = (0.002, 0.004, 0.007)[draw.integers(3)]
        self.wall = draw.uniform(2.2, 4.5)
        self.stray = draw.normal(0, 0.02, (20, 30))
        self.guess = round(self.middle - 0.25 - 4 * self.delta + draw.uniform(-2, 2))

    def ridge(self, batch: float, tokens: float) -> float:
        """The best rate."""
        t = tokens - END
        rate = self.middle + self.alpha * (batch - 10) + self.delta * t
        if self.kind == "laws":
            return float(rate + self.bend * t * t)
        return float(rate + 8 * self.bend * max(0.0, t + 2) + 0.15 * max(0.0, 9.5 - batch) ** 2)

    def level(self, batch: float, tokens: float) -> float:
        """The loss at the best rate."""
        steps = self.size * 2 ** (-self.exponent * (tokens - batch - 10))
        if self.kind == "laws":
            below, part = divmod(batch - 6, 1)
            stray = self.stray[int(below) : int(below) + 2, round(tokens)] @ [1 - part, part]
            share = (
                self.exponent
                * 2 ** (-self.exponent * (10 - self.best_batch))
                * 2 ** (self.batch_exponent * (self.best_batch - 10))
            )
            noise = self.size * share / self.batch_exponent * 2 ** (-self.batch_exponent * (batch - 10))
            return float(self.floor + steps * (1 + stray) + noise)
        away = batch - (self.best_batch + self.batch_exponent * (tokens - END))
        fall = self.size * 2 ** (-self.exponent * (tokens - 20) * (1 - 0.04 * (tokens - 20)))
        return float(self.floor + fall + 0.05 * self.size * (away**2 + 0.2 * abs(away) ** 3))

    def loss(self, rate: float, batch: float, tokens: float) -> float:
        """Without noise."""
        off = rate - self.ridge(batch, tokens)
        few = 0.15 * max(0.0, 9 - (tokens - batch))
        return self.level(batch, tokens) + self.curvature * 2 ** (self.drift * (tokens - END) + few) * self._bowl(off)

    def _bowl(self, off: float) -> float:
        z = self.skew * off
        if self.shape == "linex":
            return off * off * (1 + z / 3 + z * z / 12 if abs(z) < 1e-3 else 2 * (math.expm1(z) - z) / z**2)
        if self.shape == "two parabolas":
            return off * off * (1.8 if off > 0 else 0.8)
        if self.shape == "wall":
            left = 2 * math.log(math.cosh(1.2 * off)) / 1.44 if off < 0 else off * off
            return left + 0.3 * math.expm1(max(0.0, 2 * (off - 1.5)))
        if self.shape == "kink":
            return 0.6 * abs(off) ** 1.5 + 0.4 * off * off
        if self.shape == "plateau":
            return off * off / (1 + 0.15 * off * off) if off < 0 else off * off
        if self.shape == "cubic":
            return off * off * (1 + max(-0.5, 0.6 * self.skew * off))
        return off * off

    def diverges(self, rate: float, batch: float) -> bool:
        """Whether a run does not reach the first horizon."""
        return rate - self.ridge(batch, math.log2(HORIZONS[0])) > self.wall

    def measured(self, rate: float, batch: float, tokens: float) -> float:
        """With noise, which one doubling of the tokens halves the correlation of."""
        draw = np.random.default_rng([self.seed, round(8 * batch), round(1000 * (rate + 40))])
        values = draw.normal(size=16)
        outlier = self.kind == "other" and draw.uniform() < 0.03
        noise = values[0]
        for value in values[1 : round(tokens) - 15]:
            noise = 0.5 * noise + math.sqrt(0.75) * value
        spread = self.noise * 2 ** (0.15 * max(0.0, 10 - batch))
        return self.loss(rate, batch, tokens) + spread * (noise + (5 if outlier else 0))


@dataclass(frozen=True)
class Played:
    """One adaptive study, played to its end."""

    rounds: tuple[Round, ...]
    reached: dict[tuple[int, float], int]
    """Horizon by batch and rate."""
    spent: int


def table(truth: Truth, reached: dict[tuple[int, float], int]) -> Columns:
    """The rows of these runs up to the horizons that they reached."""
    rows = []
    for (batch, rate), last in reached.items():
        lost = truth.diverges(rate, math.log2(batch))
        for tokens in HORIZONS:
            if tokens <= last:
                loss = math.nan if lost else truth.measured(rate, math.log2(batch), math.log2(tokens))
                rows.append((batch, 2.0**rate, tokens, loss, lost, "m", truth.noise / 2))
    names = ("batch", "lr", "tokens", "loss", "diverged", "model", "sigma")
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}


def play(truth: Truth, settings: Adaptive, budget: int, batches: tuple[int, ...] = BATCHES, most: int = 60) -> Played:
    """Plays the rounds of an adaptive study, ``most`` of them at most. A diverged run costs an eighth of its tokens."""
    space = Space(batches, HORIZONS, tuple(float(truth.guess + i) for i in range(-2, 3)), budget, settings)
    reached: dict[tuple[int, float], int] = {}
    rounds: list[Round] = []
    spent = 0
    while len(rounds) < most:
        rounds.append(decide(space, table(truth, reached), spent))
        if not rounds[-1].orders:
            break
        for order in rounds[-1].orders:
            run = order.batch, order.rate
            before = reached.get(run, 0)
            new = max(0, order.tokens - before)
            spent += (0 if before else new // 8) if truth.diverges(order.rate, math.log2(order.batch)) else new
            reached[run] = max(before, order.tokens)
    return Played(tuple(rounds), reached, spent)


def grade(truth: Truth, played: Played, batches: tuple[int, ...] = BATCHES) -> dict[str, Any]:
    """What the study found, against the truth and against the lowest run of the full grid."""
    answer = played.rounds[-1].answer
    b = math.log2(answer["batch"])
    least = {batch: truth.level(math.log2(batch), END) for batch in batches}
    grid = {}
    for batch in batches:
        centre = round(2 * truth.ridge(math.log2(batch), END)) / 2
        for rate in (centre + half / 2 for half in range(-5, 6)):
            if not truth.diverges(rate, math.log2(batch)):
                grid[batch, rate] = truth.measured(rate, math.log2(batch), END)
    lowest = min(grid, key=lambda run: grid[run])
    best = min(least, key=lambda batch: least[batch])
    nearest = min(
        (run for run in played.reached if run[0] == best),
        key=lambda run: truth.loss(run[1], math.log2(best), END),
        default=None,
    )
    true = truth.ridge(b, END)
    return {
        "off": answer["rate"] - true, "width": answer.get("high", math.inf) - answer.get("low", -math.inf),
        "covered": answer.get("low", -math.inf) <= true <= answer.get("high", math.inf),
        "regret": truth.loss(answer["rate"], b, END) / min(least.values()) - 1,
        "spent": played.spent / LAST,
        "dropped": 0 < played.reached.get(lowest, 0) < LAST, "never run": lowest not in played.reached,
        "best dropped": nearest is None or played.reached[nearest] < LAST,
        "rounds": len(played.rounds), "noise": truth.noise / truth.curvature,
    }  # fmt: skip


def summary(results: list[dict[str, Any]]) -> str:
    """One line."""
    of = {key: np.array([result[key] for result in results], dtype=float) for key in results[0]}
    off, regret, ratio = np.abs(of["off"]), of["regret"], GRID / of["spent"]
    return (
        f"{len(results)} studies: off {np.sqrt(np.mean(off**2)):.3f} octaves (rms), "
        f"{np.mean(off <= 0.25):.3f} within 0.25; "
        f"covered {of['covered'].mean():.3f}, median width {np.median(of['width']):.2f}; "
        f"regret {100 * regret.mean():.3f}%, {np.mean(regret <= 0.003):.3f} within 0.3%; "
        f"tokens {GRID / of['spent'].mean():.2f}x fewer in total, {np.median(ratio):.2f}x (median), "
        f"{ratio.min():.2f}x (least); "
        f"grid's lowest run stopped {of['dropped'].mean():.3f}, never run {of['never run'].mean():.3f}; "
        f"truly best run stopped {of['best dropped'].mean():.3f}; {of['rounds'].mean():.1f} rounds"
    )


def main() -> None:
    """Prints a line for all studies and one for each third of noise over curvature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("laws", "other"), default="laws")
    parser.add_argument("--seeds", type=int, nargs=2, default=(1000, 100))
    parser.add_argument("--budget", type=float, default=GRID / 5)
    parser.add_argument("--width", type=float, default=Adaptive.width)
    parser.add_argument("--error-rate", type=float, default=Adaptive.error_rate)
    args = parser.parse_args()
    settings = Adaptive(width=args.width, error_rate=args.error_rate)
    first, count = args.seeds
    results = []
    for seed in range(first, first + count):
        truth = Truth(seed, args.kind)
        results.append(grade(truth, play(truth, settings, round(args.budget * LAST))))
    print("all:", summary(results))
    results.sort(key=lambda result: result["noise"])
    for name, part in zip(("least", "middle", "most"), np.array_split(np.arange(count), 3), strict=True):
        print(f"{name} noise:", summary([results[i] for i in part]))


if __name__ == "__main__":
    main()
