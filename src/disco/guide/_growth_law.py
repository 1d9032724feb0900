"""The law that norms grow by, and one course under it, with what every deviation of its speed would do.

A layer's norm n grows along its path S, the sum of the layer's learning rates:

    dn/dS = 2^(f(log2 n, z) + a) - lambda n

f is one function of the norm for all runs, piecewise linear between ``knots`` (a step of size 1 raises the norm by at
most 1, so f is about 0 while all steps agree, and falls once they do not), plus a part for each covariate z of the run
(``TERMS``); a is the run's own deviation. Schedules act through S; with weight decay lambda the norm settles where
both sides agree, below 1/lambda. The law has no memory: what a warmup or a few coarse steps lost at the start is
outgrown. arXiv:2510.03871 (Fig. 1b and 5) shows such curves for one batch at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disco.guide._course import Course

Array = NDArray[np.float64]

TERMS = ("norm", "rate", "batch", "momentum", "memory", "width", "vocab")
"""What f depends on: the norm itself, and covariates whose effect may vary with it."""
BEND, LEVEL = 0.7, 3.0
"""Prior standard deviations of f: of its change of slope per octave of norm, and of its value around ``expected``."""
STEP, EFFECT = 0.15, 0.3
"""The same of a covariate's effect: of its change per octave of norm, and of itself, per unit of the covariate."""
COARSE = 2.0
"""Rate beyond which it tells no more."""
RATIO = 1.2
"""Largest ratio of path between two nodes, and smallest between two observations."""
FIRST = 2.0**-4
"""Path up to which a norm of 1 has not moved."""
SATURATION = 0.5
"""Longest step over which weight decay acts, in units of 1/lambda."""
MOST = 400
"""Pieces of a walk, about, at most."""
TOGETHER = 64
"""Walks that are integrated at once."""
NUDGE = 1e-4


@dataclass(frozen=True)
class Walk:
    """One course cut into pieces of path, up to some tokens."""

    edges: Array
    """Path of the layer at the ends of the pieces, from the first logged norm on."""
    z: Array
    """Covariates in each piece [pieces, terms]."""
    weight_decay: float
    start: float
    """log2 of the norm at the first edge."""
    seen: NDArray[np.intp]
    """Edges at which a norm was observed, the first left out."""
    observed: Array
    """log2 of these norms."""
    fastest: float
    """Largest learning rate of the layer."""

    @property
    def logs(self) -> Array:
        """log2 of the path in the middle of each piece."""
        return np.asarray(np.log2(np.maximum((self.edges[1:] + self.edges[:-1]) / 2, FIRST)))


@dataclass(frozen=True)
class Track:
    """A walk under a law."""

    log2: Array
    """log2 norm at the edges."""
    gain: Array
    """Octaves of norm at each edge [edges, pieces] per octave of speed in each piece."""
    hats: Array
    """Weight of each knot in each piece [pieces, knots]."""
    disagreement: Array
    """1 - 2^f in each piece: 0 where every step adds to the norm, near 1 where steps hardly agree."""

    def design(self, z: Array) -> Array:
        """Octaves of speed in each piece per coefficient, [pieces, terms x knots], for covariates [pieces, terms]."""
        return (z[:, :, None] * self.hats[:, None, :]).reshape(len(z), -1)


def walk(course: Course, tokens: float, layer: str, centre: Mapping[str, float]) -> Walk | None:
    """Cuts a course up to ``tokens``, further than it has come if need be; None where it has no norm or no path ahead.

    Args:
        course: The run.
        tokens: Up to which.
        layer: Layer group.
        centre: Where covariates are 0: "batch", "width", "momentum", "vocab".
    """
    ratio = course.ratios.get(layer, 1.0)
    norm = course.group_norm(layer)
    known = np.isfinite(norm) & (norm > 0) & np.isfinite(course.path) & (course.tokens <= tokens * (1 + 1e-9))
    path, logs = ratio * course.path[known], np.log2(norm[known])
    if not len(path):
        return None
    origin, start = float(path[0]), float(logs[0])
    keep = _apart(path, max(origin, FIRST))
    path, logs = path[keep], logs[keep]
    times, walked = _plan(course, tokens, ratio)
    end = float(walked[-1])
    if not end > origin:
        return None
    first = max(FIRST, ratio * course.rate, origin)
    edges = _nodes(
        np.unique([origin, *([first] if first < min([*path, end]) else []), *path, end]), course.weight_decay
    )
    steps = np.diff(np.interp(edges, walked, times)) / course.batch
    rates = np.diff(edges) / np.maximum(steps, 1e-9)
    z = covariates(course, rates, centre)
    seen = np.searchsorted(edges, path)
    return Walk(edges, z, course.weight_decay, start, seen, logs, float(rates.max()))


def _apart(path: Array, start: float) -> list[int]:
    """Of ascending paths the last, and before it those at least ``RATIO`` apart."""
    kept: list[int] = []
    bound = math.inf
    for index in range(len(path) - 1, -1, -1):
        if path[index] <= bound and path[index] > start:
            kept.append(index)
            bound = path[index] / RATIO
    return kept[::-1]


def _plan(course: Course, tokens: float, ratio: float) -> tuple[Array, Array]:
    """Tokens, and the layer's path there: as logged, then as scheduled."""
    known = np.isfinite(course.path) & (course.tokens <= tokens * (1 + 1e-9))
    at, path = course.tokens[known], course.path[known]
    if not len(at) or at[0] > 0:
        at, path = np.concatenate([[0.0], at]), np.concatenate([[0.0], path])
    rising = np.concatenate([[True], np.diff(path) > 0])
    at, path = at[rising], path[rising]
    if tokens > at[-1] * (1 + 1e-9):
        grid = np.linspace(at[-1], tokens, 513)
        pieces = course.rate * course.factor((grid[1:] + grid[:-1]) / 2) * np.diff(grid) / course.batch
        at, path = np.concatenate([at, grid[1:]]), np.concatenate([path, path[-1] + np.cumsum(pieces)])
    return at, ratio * path


def _nodes(edges: Array, weight_decay: float) -> Array:
    """Edges with more between them wherever they are too far apart."""
    longest = max(SATURATION / weight_decay, (edges[-1] - edges[0]) / MOST) if weight_decay > 0 else math.inf
    parts = []
    for low, high in itertools.pairwise(edges.tolist()):
        pieces = 4 if low == 0 else math.ceil(math.log(high / low) / math.log(RATIO) - 1e-9)
        pieces = max(pieces, math.ceil((high - low) / longest), 1)
        parts.append(np.linspace(low, high, pieces + 1)[:-1] if low == 0 or pieces < 2 or math.isfinite(longest)
                     else np.geomspace(low, high, pieces + 1)[:-1])  # fmt: skip
    return np.concatenate([*parts, edges[-1:]])


def averaged(course: Course) -> float:
    """Tokens that the update's gradient averages over: the batch, and with momentum m (1 + m) / (1 - m) times it (the
    variance of an exponential average of independent gradients)."""
    return course.batch * (1 + course.momentum) / (1 - course.momentum)


def covariates(course: Course, rates: Array, centre: Mapping[str, float]) -> Array:
    """Values of ``TERMS`` in each piece, [pieces, terms].

    * rate: as such, since half as coarse steps do half the harm;
    * batch: the noise of the averaged gradient, 1/sqrt(``averaged``), over that at the study's centre, less 1;
    * momentum: log2 of 1 / (1 - m), the steps that it remembers, over that at the centre;
    * memory: the path walked in these steps, m / (1 - m) rate;
    * width, vocab: octaves from the centre; 0 where one of the two is not known.
    """
    m = course.momentum
    values = (
        1.0,
        np.minimum(rates, COARSE),
        math.sqrt(centre["batch"] / averaged(course)) - 1,
        math.log2(1 - centre["momentum"]) - math.log2(1 - m),
        np.minimum(rates * m / (1 - m), 2 * COARSE),
        _octaves(course.width, centre["width"]),
        _octaves(course.vocab, centre.get("vocab", math.nan)),
    )
    return np.stack([np.broadcast_to(value, rates.shape) for value in values], axis=1)


def _octaves(value: float, centre: float) -> float:
    return math.log2(value / centre) if value > 0 and centre > 0 else 0.0


def track(walks: Sequence[Walk], tables: Sequence[Array], speeds: Sequence[Array], knots: Array) -> list[Track]:
    """Integrates the law along walks, by the midpoint rule with the decay exact; all at once, padded by empty pieces.

    Args:
        walks: Runs.
        tables: f of each run at the knots, in each of its pieces [pieces, knots].
        speeds: Its deviation a in each piece, in octaves.
        knots: log2 norms.
    """
    if len(walks) > TOGETHER:
        rest = track(walks[TOGETHER:], tables[TOGETHER:], speeds[TOGETHER:], knots)
        return track(walks[:TOGETHER], tables[:TOGETHER], speeds[:TOGETHER], knots) + rest
    count, most = len(walks), max(len(each.edges) for each in walks) - 1
    length, speed, table = np.zeros((count, most)), np.zeros((count, most)), np.zeros((count, most, len(knots)))
    for r, (each, f, a) in enumerate(zip(walks, tables, speeds, strict=True)):
        pieces = len(each.edges) - 1
        length[r, :pieces], speed[r, :pieces], table[r, :pieces] = np.diff(each.edges), a, f
    decay = np.array([each.weight_decay for each in walks])[:, None]
    log2 = np.empty((count, most + 1))
    log2[:, 0] = [each.start for each in walks]
    middle, gain = np.empty((count, most)), np.zeros((count, most + 1, most))
    higher, quicker = np.array([0.0, NUDGE, 0.0]), np.array([0.0, 0.0, NUDGE])
    for j in range(most):
        before, faster = log2[:, j, None] + higher, speed[:, j, None] + quicker
        half = _grown(before, before, table[:, j], knots, faster, length[:, j, None] / 2, decay)
        after = _grown(before, half, table[:, j], knots, faster, length[:, j, None], decay)
        log2[:, j + 1], middle[:, j] = after[:, 0], half[:, 0]
        gain[:, j + 1] = gain[:, j] * ((after[:, 1] - after[:, 0]) / NUDGE)[:, None]
        gain[:, j + 1, j] = (after[:, 2] - after[:, 0]) / NUDGE
    found = []
    for r, each in enumerate(walks):
        pieces = len(each.edges) - 1
        low, share = _between(middle[r, :pieces], knots)
        hats, rows = np.zeros((pieces, len(knots))), np.arange(pieces)
        hats[rows, low], hats[rows, low + 1] = 1 - share, share
        lost = 1 - 2.0 ** np.minimum((hats * tables[r]).sum(axis=1), 0.0)
        found.append(Track(log2[r, : pieces + 1], gain[r, : pieces + 1, :pieces].copy(), hats, lost))
    return found


def _grown(log2: Array, at: Array, table: Array, knots: Array, speed: Array, length: Array, decay: Array) -> Array:
    """log2 norm after a piece, the law's right side taken at ``at``; arrays [runs, nudges], table [runs, knots]."""
    low, share = _between(at, knots)
    runs = np.arange(len(table))[:, None]
    f = table[runs, low] * (1 - share) + table[runs, low + 1] * share
    left = np.exp(-decay * length)
    reach = np.where(decay > 0, (1 - left) / np.where(decay > 0, decay, 1.0), length)
    return np.asarray(np.log2(2.0**log2 * left + 2.0 ** np.clip(f + speed, -20.0, 3.0) * reach))


def _between(y: Array, knots: Array) -> tuple[NDArray[np.intp], Array]:
    """Knot below each y and how far it is to the next: 0 to 1, so f is constant outside."""
    low = np.clip(np.searchsorted(knots, y, side="right") - 1, 0, len(knots) - 2)
    return low, np.clip((y - knots[low]) / (knots[low + 1] - knots[low]), 0.0, 1.0)


def expected(knots: Array) -> Array:
    """What f is taken for before any run was seen: steps agree up to a norm of 2^4, beyond it n^2 grows with S."""
    return np.minimum(0.0, 4.0 - knots)


def prior(terms: Sequence[str], knots: Array) -> Array:
    """Precision matrix of the coefficients, [terms x knots] flattened, around ``expected`` and 0."""
    n, widths = len(knots), np.diff(knots)
    steps = np.diff(np.eye(n), axis=0) / np.sqrt(widths)[:, None]
    bends = np.diff(steps / np.sqrt(widths)[:, None], axis=0) / np.sqrt((widths[1:] + widths[:-1]) / 2)[:, None]
    of_norm = bends.T @ bends / BEND**2 + np.eye(n) / LEVEL**2
    of_covariate = steps.T @ steps / STEP**2 + np.eye(n) / (n * EFFECT**2)
    precision = np.zeros((len(terms) * n, len(terms) * n))
    for index, term in enumerate(terms):
        block = slice(index * n, (index + 1) * n)
        precision[block, block] = of_norm if term == "norm" else of_covariate
    return precision
