"""The next round of an adaptive study, as a function of the records so far. No torch.

A batch starts at the first horizon that gives it enough steps: the first batch with the file's rates an octave apart,
the others where the ridge of the optima is expected. Then, horizon by horizon, rates are added where an optimum lies at
the edge, batches and rates that cannot be the best at the longest horizon stop, and the others go on. At the longest
horizon rates half-way between, or more runs of the batches beside, are added while the wanted interval is too wide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from disco.runs.units import counted, short, two_to
from disco.sweep.adaptive.estimates import Estimate, place
from disco.sweep.adaptive.scans import Columns, Order, Scans, Space

SIDES = 2
"""Points that shall stand on each side of an optimum."""
RIVAL = 1.0
"""Standard deviations behind the best batch up to which a batch gets as many rates as the best."""
FARTHEST = 8
"""Octaves beyond the file's rates up to which an optimum is followed."""
MORE = 4
"""Runs that are added in one round at the longest horizon, at most."""
AROUND = 1.75
"""Octaves from the optimum within which such runs lie."""


@dataclass(frozen=True)
class Round:
    """What to do next and why; without orders the study ends."""

    orders: tuple[Order, ...]
    lines: tuple[str, ...]
    answer: Mapping[str, Any] = field(default_factory=dict)
    """At the longest horizon, rates in log2: "batch", the best one (tokens), its best "rate", the 90% interval of that,
    "low" and "high" where there is one, and "ridge", the best rate of each batch (as text). Empty before the first
    runs."""


def decide(space: Space, known: Columns, spent: int) -> Round:
    """The next round.

    Args:
        space: what may be run.
        known: a row per run and horizon of the rounds before, as ``disco.runs.table.columns`` makes it.
        spent: tokens that they trained on.
    """
    scans = Scans(known, space.horizons)
    alive = any(math.isfinite(loss) for run in scans.losses.values() for loss in run.values())
    return _Policy(space, scans, Estimate(space, known, scans), spent).round() if alive else _first(space, scans, spent)


def _first(space: Space, scans: Scans, spent: int) -> Round:
    """The file's rates, or lower ones while all diverge."""
    batch, tokens = space.start, space.first(space.start)
    tried = scans.rates(batch)
    rates = [tried[0] - 2, tried[0] - 1] if tried else list(space.rates)
    why = ": all rates above diverged" if tried else ""
    if rates[0] < space.rates[0] - FARTHEST:
        return Round((), (f"stop: every run diverged, down to {two_to(tried[0])} at B={_p(batch)}",))
    orders = _affordable(space, scans, spent, [Order(batch, rate, tokens) for rate in rates])
    if not orders:
        return Round((), (_budget(space, spent),))
    return Round(tuple(orders), (f"started B={_p(batch)}: {_span(o.rate for o in orders)} to D={_p(tokens)}{why}",))


class _Policy:
    """The decisions after some runs. Each step returns orders, or nothing where it has nothing to do."""

    def __init__(self, space: Space, scans: Scans, estimate: Estimate, spent: int) -> None:
        self.space, self.scans, self.estimate, self.spent = space, scans, estimate, spent
        self.rung = scans.longest()
        """The horizon that the study has come to."""
        self.lines: list[str] = []
        self.at_edge = False
        """Whether a scan has its optimum at an edge."""

    def round(self) -> Round:
        steps = [self._widen] + ([self._promote] if self.rung < self.space.last else [self._catch_up, self._refine])
        orders: list[Order] = []
        for step in steps:
            said, wanted = len(self.lines), step()
            orders = _affordable(self.space, self.scans, self.spent, wanted)
            if orders and len(orders) < len(wanted):
                self.lines.append(
                    f"left out {len(wanted) - len(orders)} of these runs: the budget does not reach for them"
                )
            if orders:
                break
            if wanted:
                del self.lines[said:]
        if not orders:
            stopped = any(line.startswith("stop:") for line in self.lines)
            self.lines += [*([] if stopped else [_budget(self.space, self.spent)]), *self._caveats()]
        rate, interval = self.estimate.eta()
        ridge = {str(batch): self.estimate.rate(batch, self.space.last) for batch in self.space.batches}
        answer: dict[str, Any] = {"batch": self.estimate.best, "rate": rate, "ridge": ridge}
        if math.isfinite(interval.width):
            answer |= {"low": interval.low, "high": interval.high}
        return Round(tuple(orders), tuple(self.lines), answer)

    def _out(self, batch: int) -> bool:
        """Whether a batch cannot be the best one, and is not wanted beside it for the laws of a plan."""
        away = abs(self.space.batches.index(batch) - self.space.batches.index(self.estimate.best))
        return self._behind(batch) and not (away <= 1 and self.space.settings.quantity == "plan")

    def _behind(self, batch: int) -> bool:
        """Whether a batch cannot be the best one."""
        return self.estimate.behind[batch] > self.estimate.limit

    def _widen(self) -> list[Order]:
        """More rates, and once each optimum has a point on both sides, more batches."""
        orders = self._edges()
        return orders if self.at_edge else self._start_batches(orders)

    def _edges(self) -> list[Order]:
        """Rates beyond the edge of a scan, until enough points stand on both sides of its optimum."""
        orders: list[Order] = []
        for batch in self.scans.batches:
            if self.scans.longest(batch) < self.rung or (self._out(batch) and self.rung > self.space.first(batch)):
                continue
            why = self._beyond(batch)
            new = [Order(batch, rate, self.rung) for rate in why]
            if new and self._reaches(batch, orders + new):
                orders += new
                self.lines += [f"extended B={_p(batch)} to {two_to(rate)}: {why[rate]}" for rate in why]
        return orders

    def _beyond(self, batch: int) -> dict[float, str]:
        """Rates to add, and why."""
        scan = self.scans.scan(batch, self.rung)
        first = self.rung == self.space.first(batch)
        sides = SIDES if first or (self.rung == self.space.last and batch == self.estimate.best) else 1
        # Runs of one horizon do not tell where the ridge is, so there the lowest run counts.
        middle = min(scan, key=lambda rate: (scan[rate], rate)) if first else self.estimate.rate(batch, self.rung)
        lowest, highest = min(min(scan), self.space.above(middle)), max(max(scan), self.space.below(middle))
        sorts = [([rate for rate in scan if rate < middle], lowest, -1)]
        if math.inf not in scan.values():
            sorts.append(([rate for rate in scan if rate > middle], highest, 1))
        wanted = {}
        for beyond, edge, side in sorts:
            for i in range(sides - len(beyond)):
                why = "one point beyond the optimum" if beyond else "optimum at the edge"
                self.at_edge |= not beyond
                wanted[edge + side * (i + 1)] = why
        bounds = self.space.rates[0] - FARTHEST, self.space.rates[-1] + FARTHEST
        return {
            r: why for r, why in wanted.items() if bounds[0] <= r <= bounds[1] and not self.scans.diverged(batch, r)
        }

    def _start_batches(self, orders: list[Order]) -> list[Order]:
        """These orders, and the batches next to those that run, once the horizon has enough steps for them."""
        started = [self.space.batches.index(batch) for batch in self.scans.batches]
        for index, batch in enumerate(self.space.batches):
            ready = self.space.first(batch) <= self.rung and not self._out(batch)
            if ready and index not in started and {index - 1, index + 1} & set(started):
                rate = self.estimate.rate(batch, self.rung)
                low = self.space.below(rate, SIDES)
                new = [Order(batch, low + i, self.rung) for i in range(2 * SIDES)]
                if not self._reaches(batch, orders + new):
                    continue
                where = f"{_span(o.rate for o in new)} to D={_p(self.rung)}"
                self.lines.append(f"started B={_p(batch)}: {where}, optimum expected at {two_to(rate)}")
                orders += new
        return orders

    def _needed(self, batch: int, tokens: int) -> list[float]:
        """Rates that locate the optimum at the longest horizon, and are not all above that at ``tokens``."""
        many = self.estimate.behind[batch] < RIVAL or self.space.settings.quantity == "plan"
        sides = SIDES if many else SIDES - 1
        end, here = self.estimate.rate(batch, self.space.last), self.estimate.rate(batch, tokens)
        low, high = self.space.below(end, sides), max(self.space.above(end, sides), self.space.above(here))
        return [low + i for i in range(round(high - low) + 1)]

    def _promote(self) -> list[Order]:
        """Takes to the next horizon what may be the best at the longest, and what locates its optimum."""
        tokens = self.space.horizons[self.space.horizons.index(self.rung) + 1]
        orders: list[Order] = []
        for batch in sorted(self.scans.batches, key=lambda b: (self.estimate.behind[b], b)):
            here = [rate for rate in self.scans.rates(batch) if self._stands(batch, rate)]
            if self._out(batch):
                if here:
                    behind = f"cannot be the best batch ({self.estimate.behind[batch]:.1f} sigma)"
                    self.lines.append(f"stopped B={_p(batch)} at D={_p(self.rung)}: {behind}")
                continue
            go = self._within_reach(batch, orders, self._continued(batch, tokens, here))
            if not go:
                if batch == self.estimate.best:
                    return []
                continue
            orders += go
            rate, sd = self.estimate.best_rate(batch)
            where = f"optimum at D={_p(self.space.last)} expected at {two_to(rate)} +- {sd:.2f}"
            self.lines.append(f"continued B={_p(batch)}: {_span(o.rate for o in go)} to D={_p(tokens)}, {where}")
        return orders

    def _stands(self, batch: int, rate: float) -> bool:
        """Whether a run is at the horizon that the study has come to, and has not diverged."""
        return self.scans.reached(batch, rate) == self.rung and not self.scans.diverged(batch, rate)

    def _continued(self, batch: int, tokens: int, here: list[float]) -> list[Order]:
        """The runs of one batch that go on, with a line for those that stop.

        A rate cannot be the best of an octave's lattice when the optimum surely lies beyond the middle between it and
        its neighbour, and when there surely is one: the loss is not flat.
        """
        needed = self._needed(batch, tokens)
        middle, sd = self.estimate.best_rate(batch)
        curved = self.estimate.belief.curved
        lag = {rate: min((abs(rate - middle) - 0.5) / sd, curved) for rate in here if rate not in needed}
        for side in (-1, 1):
            out = [rate for rate, sigmas in lag.items() if sigmas > self.estimate.limit and side * (rate - middle) > 0]
            if out:
                why = f"cannot be the best ({min(lag[rate] for rate in out):.1f} sigma)"
                self.lines.append(f"stopped {_span(out)} at B={_p(batch)}, D={_p(self.rung)}: {why}")
        rates = {*needed, *(rate for rate, sigmas in lag.items() if sigmas <= self.estimate.limit)}
        return [Order(batch, rate, tokens) for rate in sorted(rates) if not self.scans.diverged(batch, rate)]

    def _reaches(self, batch: int, orders: list[Order]) -> bool:
        """Whether after these runs of another batch the budget takes the best batch to the longest horizon."""
        best, last = self.estimate.best, self.space.last
        return batch == best or self._fits([*orders, *(Order(best, rate, last) for rate in self._needed(best, last))])

    def _within_reach(self, batch: int, before: list[Order], orders: list[Order]) -> list[Order]:
        """As many of these runs of a batch as the budget allows, those nearest to its optimum: the best batch must get
        to the longest horizon with them, and another one, with two at least, must leave enough for that."""
        middle = self.estimate.best_rate(batch)[0]
        nearest = sorted(orders, key=lambda order: abs(order.rate - middle))

        def fits() -> bool:
            if batch == self.estimate.best:
                return self._fits([dataclasses.replace(order, tokens=self.space.last) for order in nearest])
            return len(nearest) > 1 and self._reaches(batch, before + nearest)

        left = []
        while nearest and not fits():
            left.append(nearest.pop().rate)
        if left:
            what = ", ".join(map(two_to, sorted(left))) if nearest else "all rates"
            self.lines.append(f"left {what} at B={_p(batch)}, D={_p(self.rung)}: the budget does not reach for them")
        return [order for order in orders if order in nearest]

    def _catch_up(self) -> list[Order]:
        """A batch that has become the best one, to the longest horizon."""
        batch = self.estimate.best
        if self.scans.longest(batch) == self.space.last:
            return []
        rates = self._needed(batch, self.space.last)
        new = [Order(batch, rate, self.space.last) for rate in rates if not self.scans.diverged(batch, rate)]
        orders = self._within_reach(batch, [], new)
        if not orders:
            return []
        self.lines.append(
            f"continued B={_p(batch)}: {_span(o.rate for o in orders)} to D={_p(self.space.last)}, now the best batch"
        )
        return orders

    def _refine(self) -> list[Order]:
        """The runs near the optimum that narrow the wanted interval most per token (Bayesian c-optimal design; Chaloner
        & Verdinelli 1995, Stat. Sci. 10:273), if it is too wide."""
        estimate, width = self.estimate, self.space.settings.width
        interval = estimate.wanted()
        how = f"{interval} (wanted {width:g})"
        if interval.width <= width:
            self.lines.append(f"stop: {how}")
            return []
        now = estimate.belief.after(estimate.target, [], estimate.noise)
        goal = now * width / interval.width
        orders: list[Order] = []
        candidates = list(self._candidates())
        while len(orders) < MORE and now > goal:
            gains = []
            for order in candidates:
                if order not in orders and self._fits([*orders, order]):
                    more = [(o.rate, place(o.batch, o.tokens)) for o in (*orders, order)]
                    then = estimate.belief.after(estimate.target, more, estimate.noise)
                    gains.append(((now**2 - then**2) / self.scans.cost([order]), then, order))
            if not gains:
                break
            _, now, best = max(gains, key=lambda gain: gain[0])
            orders.append(best)
        longest = {(order.batch, order.rate): order.tokens for order in sorted(orders, key=lambda order: order.tokens)}
        orders = [order for order in orders if order.tokens == longest[order.batch, order.rate]]
        self.lines += [f"refined B={_p(o.batch)} with {two_to(o.rate)} to D={_p(o.tokens)}: {how}" for o in orders]
        if not orders:
            left = _budget(self.space, self.spent) if candidates else "stop: all runs near the optimum are there"
            self.lines += [how, left]
        return orders

    def _candidates(self) -> Iterator[Order]:
        """Runs near the optima of the last two horizons, on the lattice of half octaves."""
        for batch in self.scans.batches:
            for tokens in self.space.horizons[-2:]:
                middle = self.estimate.rate(batch, tokens)
                low = self.space.below(middle, SIDES)
                for rate in (low + half / 2 for half in range(4 * SIDES)):
                    new = self.scans.reached(batch, rate) < tokens and not self.scans.diverged(batch, rate)
                    if new and abs(rate - middle) <= AROUND and not self._out(batch):
                        yield Order(batch, rate, tokens)

    def _fits(self, orders: list[Order]) -> bool:
        return self.spent + self.scans.cost(orders) <= self.space.budget

    def _caveats(self) -> Iterator[str]:
        """What to know about the answer."""
        best, started = self.estimate.best, self.scans.batches
        for batch in self.space.batches:
            if batch != best and not self._behind(batch):
                behind = f"{self.estimate.behind[batch]:.1f} sigma behind"
                yield f"note: B={_p(batch)} may be the best batch too ({behind})"
            elif batch not in started:
                yield f"not started B={_p(batch)}: cannot be the best batch ({self.estimate.behind[batch]:.1f} sigma)"
        if len(self.space.batches) > 1 and best in (self.space.batches[0], self.space.batches[-1]):
            side = "smallest" if best == self.space.batches[0] else "largest"
            yield f"note: the best batch, {_p(best)}, is the {side} of the study"


def _affordable(space: Space, scans: Scans, spent: int, orders: Iterable[Order]) -> list[Order]:
    """The first of the orders that fit into the budget."""
    kept: list[Order] = []
    for order in orders:
        if spent + scans.cost([*kept, order]) <= space.budget:
            kept.append(order)
    return kept


def _budget(space: Space, spent: int) -> str:
    return f"stop: budget of {counted(space.budget)} tokens spent ({short(space.budget - spent)} left)"


def _p(value: float) -> str:
    return two_to(math.log2(value))


def _span(rates: Iterable[float]) -> str:
    rates = sorted(rates)
    return two_to(rates[0]) + (f" .. {two_to(rates[-1])}" if len(rates) > 1 else "")
