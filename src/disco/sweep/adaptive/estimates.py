"""What the decisions of an adaptive study rest on: belief, noise, and the wanted interval. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from disco.fit import NORM, fit_table
from disco.guide import plan
from disco.runs.units import counted
from disco.sweep.adaptive.belief import Belief, Place, Runs
from disco.sweep.adaptive.scans import Columns, Scans, Space

NOISE = (0.005, 3.0)
"""Standard deviation of the loss of one run in nats, and its degrees of freedom, as long as the runs do not tell."""
NEAR = 1.5
"""Octaves from the best rate within which runs tell how the norm follows the rate."""
BOOTSTRAPS = 200
"""Resamples of whole runs behind the interval of a plan."""


@dataclass(frozen=True)
class Interval:
    """A 90% interval of what the study is after, in log2; infinite where the runs do not bound it."""

    name: str
    low: float
    high: float

    @property
    def width(self) -> float:
        """In octaves."""
        return self.high - self.low

    def __str__(self) -> str:
        wide = f"{self.width:.2f} octaves wide" if math.isfinite(self.width) else "not bounded"
        return f"interval of {self.name} is {wide}"


class Estimate:
    """The belief after some runs, one of them with a finite loss at least, and what follows from it."""

    def __init__(self, space: Space, known: Columns, scans: Scans) -> None:
        self.space, self.known = space, known
        noise, self.freedom = pooled_noise(known)
        self.noise = float(np.median(list(noise.values())))
        rows = [
            (rate, math.log2(batch), math.log2(tokens), loss, noise.get((batch, tokens), self.noise))
            for (batch, rate), run in scans.losses.items() for tokens, loss in run.items() if math.isfinite(loss)
        ]  # fmt: skip
        guess = (float(np.mean(space.rates)), *place(space.start, space.first(space.start)))
        places = [place(batch, tokens) for batch in space.batches for tokens in (*space.horizons, self.horizon)]
        self.belief = Belief(Runs(*np.array(rows).T), guess, places)
        behind = self.belief.behind([place(batch, space.last) for batch in space.batches])
        self.behind: dict[int, float] = dict(zip(space.batches, behind.tolist(), strict=True))
        """Standard deviations by which each batch is behind the best one at the longest horizon."""
        self.best = min(self.behind, key=lambda batch: self.behind[batch])
        self.limit = float(student.isf(space.settings.error_rate, self.freedom))
        """Standard deviations beyond which something cannot be the best, at the study's rate of error."""

    @property
    def horizon(self) -> int:
        """The horizon of the wanted quantity: the longest, or that of the planned run."""
        return self.space.settings.tokens or self.space.last

    @property
    def target(self) -> Place:
        """Where the best rate is wanted."""
        places = [place(batch, self.horizon) for batch in self.space.batches]
        return places[self.belief.best(places)]

    def rate(self, batch: int, tokens: int) -> float:
        """log2 of the best rate."""
        return self.belief.rate(place(batch, tokens))[0]

    def best_rate(self, batch: int) -> tuple[float, float]:
        """log2 of the best rate at the longest horizon, and its standard deviation."""
        return self.belief.rate(place(batch, self.space.last))

    def eta(self) -> tuple[float, Interval]:
        """log2 of the best rate at the longest horizon and its best batch; not bounded where the loss may be flat."""
        rate, sd = self.best_rate(self.best)
        level = float(student.isf(0.05, self.freedom))
        half = sd * level if self.belief.curved > level else math.inf
        return rate, Interval("eta*", rate - half, rate + half)

    def wanted(self) -> Interval:
        """That of the quantity that the study is after."""
        return {"eta": lambda: self.eta()[1], "norm": self._norm, "plan": self._plan}[self.space.settings.quantity]()

    def _norm(self) -> Interval:
        """Least squares of log2 norm on octaves from the best rate, batch and tokens, read off at the best rate."""
        rows = []
        norms = self.known.get(NORM, np.full(len(self.known["lr"]), math.nan))
        for lr, batch, tokens, norm in zip(*(self.known[n] for n in ("lr", "batch", "tokens")), norms, strict=True):
            if tokens in self.space.horizons and norm > 0:
                off = math.log2(lr) - self.rate(int(batch), int(tokens))
                away = np.subtract(place(batch, tokens), place(self.best, self.space.last))
                if abs(off) <= NEAR:
                    rows.append((1.0, off, *away, math.log2(norm)))
        table = np.array(rows).reshape(-1, 5)
        rank = np.linalg.matrix_rank(table[:, :4]) if len(table) else 0
        freedom = len(table) - rank
        if rank < 2 or freedom < 2:
            return Interval("norm*", -math.inf, math.inf)
        solution = np.linalg.lstsq(table[:, :4], table[:, 4])[0]
        spread = float(np.sqrt(np.sum((table[:, 4] - table[:, :4] @ solution) ** 2) / freedom))
        own = spread / math.sqrt(len(table)) * float(student.isf(0.05, self.freedom))
        half = math.hypot(solution[1] * self.eta()[1].width / 2, own)
        return Interval("norm*", float(solution[0] - half), float(solution[0] + half))

    def _plan(self) -> Interval:
        """That of ``disco plan``."""
        name = f"eta* of the plan for {counted(self.horizon)} tokens"
        found = plan(fit_table(self.known, bootstraps=BOOTSTRAPS), self.horizon).lr.interval
        return Interval(name, *(map(math.log2, found) if found else (-math.inf, math.inf)))


def place(batch: float, tokens: float) -> Place:
    """In log2."""
    return math.log2(batch), math.log2(tokens)


def pooled_noise(known: Columns) -> tuple[dict[tuple[int, int], float], float]:
    """Standard deviation of the loss of one run by (batch, tokens), pooled by the fit, and its degrees of freedom."""
    found = {(cell.batch, cell.tokens): cell.run_noise for cell in fit_table(known).cells}
    values = {key: noise.sd for key, noise in found.items() if noise is not None}
    if not values:
        return {(0, 0): NOISE[0]}, NOISE[1]
    return values, max(NOISE[1], min(noise.freedom for noise in found.values() if noise is not None))
