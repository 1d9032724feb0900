"""What an adaptive study may run, and which of it has run. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from disco.sweep.adaptive.settings import Adaptive

Columns = Mapping[str, np.ndarray]

MIN_STEPS = 32
"""Steps of the shortest horizon that a batch is started for: the bowl of fewer says little about longer runs."""


@dataclass(frozen=True)
class Space:
    """What an adaptive study may run."""

    batches: tuple[int, ...]
    """In tokens, ascending."""
    horizons: tuple[int, ...]
    """In tokens, ascending; every batch divides them."""
    rates: tuple[float, ...]
    """log2 of the rates that the first batch starts with, one octave apart, ascending."""
    budget: int
    """Tokens."""
    settings: Adaptive

    @property
    def last(self) -> int:
        """The longest horizon."""
        return self.horizons[-1]

    @property
    def start(self) -> int:
        """The batch to start with: the middle one of those whose shortest horizon is the first."""
        ready = [batch for batch in self.batches if self.first(batch) == self.first(self.batches[0])]
        return ready[len(ready) // 2]

    def first(self, batch: int) -> int:
        """The shortest horizon of a batch."""
        return next((tokens for tokens in self.horizons if tokens >= MIN_STEPS * batch), self.last)

    def below(self, rate: float, count: int = 1) -> float:
        """The ``count``-th rate at or below ``rate`` on the lattice of octaves."""
        shift = self.rates[0] - math.floor(self.rates[0])
        return math.floor(rate - shift) + shift - (count - 1)

    def above(self, rate: float, count: int = 1) -> float:
        """The ``count``-th rate above ``rate``."""
        return self.below(rate) + count


@dataclass(frozen=True)
class Order:
    """A run to train, or to continue, to ``tokens``; the rate is log2."""

    batch: int
    rate: float
    tokens: int


class Scans:
    """Losses of the runs so far by batch, rate (log2) and horizon; infinite where the run had diverged.

    Args:
        known: columns batch, lr, tokens, loss, a row per run and horizon.
        horizons: those to look at.
    """

    def __init__(self, known: Columns, horizons: Iterable[int]) -> None:
        self.losses: dict[tuple[int, float], dict[int, float]] = {}
        wanted = set(horizons)
        columns = (known[name].tolist() for name in ("batch", "lr", "tokens", "loss"))
        for batch, lr, tokens, loss in sorted(zip(*columns, strict=True), key=lambda row: row[:3]):
            if tokens in wanted:
                run = self.losses.setdefault((int(batch), round(math.log2(lr), 6)), {})
                run[int(tokens)] = loss if math.isfinite(loss) else math.inf

    @property
    def batches(self) -> list[int]:
        """Those with a run, ascending."""
        return sorted({batch for batch, _ in self.losses})

    def rates(self, batch: int) -> list[float]:
        """Ascending."""
        return sorted(rate for b, rate in self.losses if b == batch)

    def reached(self, batch: int, rate: float) -> int:
        """The longest horizon of a run; 0 without a run."""
        return max(self.losses.get((batch, rate), {0: 0.0}))

    def longest(self, batch: int | None = None) -> int:
        """The longest horizon of a batch, or of all; 0 without a run."""
        return max((max(run) for (b, _), run in self.losses.items() if batch in (None, b)), default=0)

    def diverged(self, batch: int, rate: float) -> bool:
        """Whether a run has diverged."""
        return math.inf in self.losses.get((batch, rate), {}).values()

    def scan(self, batch: int, tokens: int) -> dict[float, float]:
        """Losses by rate at a horizon; a run that had diverged by then counts wherever it stopped."""
        scan = {}
        for rate in self.rates(batch):
            run = self.losses[batch, rate]
            if tokens in run or self.diverged(batch, rate):
                scan[rate] = run.get(tokens, math.inf)
        return scan

    def cost(self, orders: Iterable[Order]) -> int:
        """Tokens to train on, of continued runs only the new ones."""
        most: dict[tuple[int, float], int] = {}
        for order in orders:
            most[order.batch, order.rate] = max(order.tokens, most.get((order.batch, order.rate), 0))
        return sum(max(0, tokens - self.reached(*run)) for run, tokens in most.items())
