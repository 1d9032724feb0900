"""Which extra runs would narrow the plan most for the tokens they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disco.fit import Result
from disco.guide._cost import Curvatures
from disco.guide._estimates import NORMAL
from disco.guide._target import Target
from disco.runs.units import counted, two_to

Array = NDArray[np.float64]

PRIOR = ((0.5, 0.5), (-0.4, 0.5), (0.45, 0.3))
"""Mean and standard deviation of the exponents of batch and tokens in the best rate, and of tokens in the best batch:
about those published. Where a study leaves one open it stands in; two horizons or batches already say more."""
BATCH_SHARE = 1 / 3
"""Curvature over the batch by that over the rate, where only the latter is known."""
REACH = (2.1, 2.6)
"""Octaves of rate and batch from the optimum within which a run tells about it."""
MEMORY = 0.5
"""Correlation of the noise of one run at horizons one doubling apart."""
LONGER = (1, 2)
"""Doublings of the largest horizon that are considered."""
QUIETEST = 0.01
"""Least noise of a run, in units of the curvature (nats per octave squared): no run is perfect."""
TOP = 3

Runs = list[tuple[float, float, float]]
"""(batch, rate, tokens) in log2."""


@dataclass(frozen=True)
class Advice(Result):
    """A set of runs to add to the sweep, and what it is expected to do if the law of the optima holds."""

    what: str
    runs: int
    tokens: int
    """That they train on in all; of a continued run only the new ones."""
    lr_half: float
    """Half the 90% interval of the learning rate afterwards, in octaves; NaN where the plan has none to narrow."""
    batch_half: float
    """The same of the best batch."""
    saved: float
    """Nats by which the expected cost of the plan falls; NaN where that rests on an interval that the plan has not."""


def advise(
    target: Target, curved: Curvatures, batch: float, lr_half: float, batch_half: float, fixed: bool, continues: bool
) -> tuple[Advice, ...]:
    """The sets of runs that save most per token, best first.

    Every run measures loss = c(D) + k (u - a - alpha b - beta d)^2 + k_b (b - a_b - beta_b d)^2 with the noise of the
    sweep; its Fisher information, summed over the runs there are and those to add, gives the variance of the optimum at
    the planned horizon (Bayesian c-optimal design; Chaloner & Verdinelli 1995, Stat. Sci. 10:273). Intervals are those
    of the plan, scaled by it; where the plan has none, the design's prior (``PRIOR``) ranks the sets, and is not shown.

    Args:
        target: The run to plan.
        curved: Of the study.
        batch: Tokens per step of the plan.
        lr_half: Half the plan's interval of the learning rate in octaves; infinite if it has none.
        batch_half: The same of the best batch.
        fixed: The batch is given, so only the rate matters.
        continues: Runs at a constant rate: one run gives all its horizons, and a longer one continues it.
    """
    design = _Design(target, curved, batch, continues)
    if not design.known:
        return ()
    now = design.variance([])
    weights = np.array([design.curvature, 0.0 if fixed else design.of_batch])
    halves = np.array([half if math.isfinite(half) else math.nan for half in (lr_half, batch_half)])
    known = np.isfinite(halves)
    before = np.where(known, np.square(halves / NORMAL), now)
    tells = bool(known[weights > 0].all())
    found = []
    for what, runs in _candidates(design):
        if not runs:
            continue
        then = design.variance(runs)
        saved = float(weights @ (before * (1 - then / now)))
        lr, of_batch = (float(half) for half in halves * np.sqrt(then / now))
        tokens = design.cost(runs)
        if saved > 0:
            found.append((saved / tokens, Advice(what, len(runs), tokens, lr, of_batch, saved if tells else math.nan)))
    return tuple(advice for _, advice in sorted(found, key=lambda item: -item[0])[:TOP])


class _Design:
    """Information of runs about the optimum at the planned horizon, in coordinates centred there."""

    def __init__(self, target: Target, curved: Curvatures, batch: float, continues: bool) -> None:
        self.target, self.continues = target, continues
        noise = [cell.lr.sigma for cell in target.cells if cell.usable and cell.lr.sigma > 0]
        self.known = curved.lr is not None and bool(noise)
        self.curvature = curved.lr or math.nan
        self.of_batch = curved.batch or BATCH_SHARE * self.curvature
        self.noise = max(float(np.median(noise)), QUIETEST * self.curvature) if self.known else math.nan
        self.at = (math.log2(batch), math.log2(target.tokens))
        points = [(c, p) for c in target.cells for p in c.points if math.isfinite(p.loss)]
        self.runs: Runs = [(math.log2(c.batch), p.lr, math.log2(c.tokens)) for c, p in points]
        self.grid = np.array(sorted({p.lr for _, p in points}))
        self.step = max(float(np.median(np.diff(self.grid))), 0.5) if len(self.grid) > 1 else 1.0
        self.batches = sorted({c.batch for c in target.cells})
        self.horizons = sorted({math.log2(c.tokens) for c in target.cells})
        self.seen: dict[tuple[float, float], list[float]] = {}
        """Horizons of every (batch, rate)."""
        for b, u, d in self.runs:
            self.seen.setdefault((b, u), []).append(d)
        self._fit()
        if self.known:
            ways = self.horizons + [self.horizons[-1] + octaves for octaves in LONGER]
            self._levels = {round(d, 6): 5 + i for i, d in enumerate(ways)}
            self._base = np.sum([self._told(b, u, ds) for (b, u), ds in self.seen.items()], axis=0)

    def _fit(self) -> None:
        """The optima as planes, drawn towards the prior where the study leaves their exponents open."""
        cells = [cell for cell in self.target.cells if cell.usable]
        rows = [(math.log2(c.batch) - self.at[0], math.log2(c.tokens) - self.at[1], c.lr.x) for c in cells]
        self.rate = _ridge(rows, PRIOR[:2])
        best = [(math.log2(h.tokens) - self.at[1], h.smooth_batch) for h in self.target.horizons]
        self.best = _ridge(best, PRIOR[2:])

    def optimum(self, b: float, d: float) -> float:
        """log2 of the best rate."""
        return float(self.rate @ np.array([1.0, b - self.at[0], d - self.at[1]]))

    def best_batch(self, d: float) -> float:
        """log2 of the best batch."""
        return float(self.best @ np.array([1.0, d - self.at[1]]))

    def variance(self, more: Runs) -> Array:
        """Of the best rate at the planned batch, and of the best batch, at the planned horizon."""
        total = self._base
        for b, u, d in more:
            way = [h for h in self.horizons if h < d] if self.continues else []
            total = total + self._told(b, u, sorted({*way, d}))
            if self.continues and (b, u) in self.seen and d > max(self.seen[b, u]):
                total = total - self._told(b, u, self.seen[b, u])  # it goes on, and says that once
        levels = total[5:, 5:] + 1e-9 * np.eye(len(total) - 5)
        own = total[:5, :5] - total[:5, 5:] @ np.linalg.solve(levels, total[5:, :5])
        spread = np.array([10.0, PRIOR[0][1], PRIOR[1][1], 10.0, PRIOR[2][1]])
        inverse = np.linalg.inv(own + np.diag(spread**-2.0))
        return np.array([inverse[0, 0], inverse[3, 3]])

    def cost(self, runs: Runs) -> int:
        """Tokens to train on."""
        spent = 0.0
        for b, u, d in runs:
            done = max(self.seen.get((b, u), [-math.inf])) if self.continues else -math.inf
            spent += 2**d - (2**done if done < d else 0.0)
        return round(spent)

    def _told(self, b: float, u: float, ds: Sequence[float]) -> Array:
        """Fisher information of one run about (a, alpha, beta, a_b, beta_b) and the levels c(D)."""
        near = [d for d in ds if self._near(b, u, d)]
        jacobian = np.zeros((len(near), 5 + len(self._levels)))
        for row, d in enumerate(near):
            x, t = b - self.at[0], d - self.at[1]
            off, away = u - self.optimum(b, d), b - self.best_batch(d)
            jacobian[row, :3] = -2 * self.curvature * off * np.array([1.0, x, t])
            jacobian[row, 3:5] = -2 * self.of_batch * away * np.array([1.0, t])
            jacobian[row, self._levels[round(d, 6)]] = 1.0
        noise = MEMORY ** np.abs(np.subtract.outer(near, near))
        return np.asarray(jacobian.T @ np.linalg.solve(noise, jacobian) / self.noise**2)

    def _near(self, b: float, u: float, d: float) -> bool:
        return abs(u - self.optimum(b, d)) <= REACH[0] and abs(b - self.best_batch(d)) <= REACH[1]


def _ridge(rows: Sequence[tuple[float, ...]], prior: Sequence[tuple[float, float]]) -> Array:
    """Least squares of the last column on 1 and the others, whose slopes have a prior; errors of 0.1 octaves."""
    if not rows:
        return np.array([0.0, *(mean for mean, _ in prior)])
    table = np.array(rows)
    design = np.column_stack([np.ones(len(table)), table[:, :-1]])
    precision = np.diag([0.0, *(sd**-2.0 for _, sd in prior)])
    means = np.array([0.0, *(mean for mean, _ in prior)])
    return np.asarray(
        np.linalg.solve(design.T @ design / 0.01 + precision, design.T @ table[:, -1] / 0.01 + precision @ means)
    )


def _candidates(design: _Design) -> Iterator[tuple[str, Runs]]:
    """Sets of runs, in words."""
    last = design.horizons[-1]
    grid = np.log2(design.batches)
    offsets = np.arange(-2, 3) * design.step

    def rates(b: float, d: float) -> list[float]:
        """Five around the optimum, of the sweep's own where it has such."""
        middle = design.optimum(b, d)
        nearest = design.grid[np.argmin(np.abs(design.grid - middle))]
        steps = nearest + design.step * round((middle - nearest) / design.step)
        return [float(steps + offset) for offset in offsets]

    for octaves in LONGER:
        horizon = last + octaves
        if horizon > design.at[1] + 1e-9:
            continue  # as long as the run itself
        middle = round(design.best_batch(horizon) - grid[0]) + float(grid[0])
        what = f"{counted(2**horizon)} tokens (x{2**octaves})"
        yield f"{what}, batch {two_to(middle)}", [(middle, u, horizon) for u in rates(middle, horizon)]
        three = [middle - 1, middle, middle + 1]
        runs = [(b, u, horizon) for b in three for u in rates(b, horizon)]
        yield f"{what}, batches {two_to(three[0])}..{two_to(three[-1])}", runs
    best = design.best_batch(last)
    near = sorted(map(float, grid[np.argsort(np.abs(grid - best))][:3]))
    where = f"batches {two_to(near[0])}..{two_to(near[-1])}" if len(near) > 1 else f"batch {two_to(near[0])}"
    half = [
        (b, float(u), last) for b in near
        for u in (design.grid[:-1] + design.grid[1:]) / 2 if abs(u - design.optimum(b, last)) <= 1.5
    ]  # fmt: skip
    yield f"{counted(2**last)} tokens, {where}, half-way rates", half
    for name, b in (("larger", float(grid[-1]) + 1), ("smaller", float(grid[0]) - 1)):
        if abs(b - design.best_batch(design.at[1])) <= REACH[1]:
            yield f"{counted(2**last)} tokens, batch {two_to(b)} ({name})", [(b, u, last) for u in rates(b, last)]
    edges: Runs = []
    for cell in design.target.cells:
        side = ("edge-high" in cell.lr.flags) - ("edge-low" in cell.lr.flags)
        if side and math.isclose(math.log2(cell.tokens), last):
            end = max(p.lr for p in cell.points) if side > 0 else min(p.lr for p in cell.points)
            edges += [(math.log2(cell.batch), end + side * k * design.step, last) for k in (1, 2)]
    yield f"{counted(2**last)} tokens, two rates beyond each edge", edges
