"""What healthy runs of a study show at the planned settings: each layer group's norm along the path, the loss along the
tokens. One run's spread goes with it, so that a run that leaves the band is not one of them. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from disco.fit import Result
from disco.guide._course import Course

Array = NDArray[np.float64]

LOSS = "loss"
"""Quantity of a band of the loss; every other but ``MOMENTUM`` is a layer group."""
MOMENTUM = "momentum"
"""That of a band of the momentum's size: the geometric mean over layer groups of ``Course.momenta``, since what changes
the noise of gradients changes it in all of them."""
NEAR = (2.5, 2.5)
"""Octaves of learning rate and of batch within which runs tell what is normal; they count by a normal density with 0.4
of it as standard deviation."""
FEWEST = 4
"""Runs that a point of a band takes, at least; and one more, by their weights, than its quadratic has terms."""
SPACING = 0.5
"""Octaves of path or tokens between points of a band."""
ROUNDING = 0.007
"""Octaves, or nats: interpolation between points half an octave apart."""
CHANCE = {"input": (0.2, 1.0), "hidden": (0.04, 1.0), "output": (0.035, 0.3), MOMENTUM: (0.1, 0.0), LOSS: (0.05, 0.0)}
"""Standard deviation between seeds once log2 norm has grown by so many octaves, in proportion before; of the loss in
nats. As seen at widths 16 and 32 (docs/log.md): what a study of few seeds cannot tell itself, with the weight of
``PRIOR`` degrees of freedom."""
PRIOR = 20.0
ALARMS = 0.05
"""Share of healthy runs that are called off the band at any time, at most."""


@dataclass(frozen=True)
class Band(Result):
    """What one run at the planned settings is expected to show; arrays over ``at``, ascending."""

    quantity: str
    """"input", "hidden", "output": log2 of the group's norm over log2 path; "momentum": log2 of its
    size over log2 path; "loss": nats over log2 tokens."""
    at: tuple[float, ...]
    value: tuple[float, ...]
    sd: tuple[float, ...]
    """Standard deviation of one run of another seed around ``value``: between seeds, and what a quadratic over rate and
    batch does not describe."""
    freedom: tuple[float, ...]
    """Degrees of freedom of ``sd``."""
    of_batch: tuple[float, ...]
    """Change per octave of batch at the same path or tokens; NaN where the study has one batch."""

    def expected(self, x: Array) -> tuple[Array, Array, Array]:
        """Value, standard deviation and degrees of freedom at ``x``; NaN outside of what was measured."""
        columns = (self.value, self.sd, self.freedom)
        value, sd, freedom = (np.interp(x, self.at, each, left=math.nan, right=math.nan) for each in columns)
        return value, sd, freedom

    @property
    def octaves(self) -> float:
        """Octaves that it spans."""
        return self.at[-1] - self.at[0]


def bands(courses: Sequence[Course], batch: float, rate: float) -> tuple[Band, ...]:
    """Bands of the study's runs around a batch and a peak rate, for every quantity that enough of them have.

    At each half octave of path (for the loss: of tokens) the runs that went past it are interpolated there, and a
    quadratic in log2 rate and log2 batch is fitted to them, runs nearer to the planned settings counting more (local
    regression; Fan & Gijbels 1996). Its intercept is the expectation, its weighted residuals are the spread of a run.

    Args:
        courses: Runs that are alike in all but rate, batch and seed; of the planned model size.
        batch: Tokens per step of the plan.
        rate: Peak rate of the plan.
    """
    near = [each for each in courses if _distance(each, batch, rate).max(initial=0.0) <= 1.0]
    found = []
    for quantity in ("input", "hidden", "output", MOMENTUM, LOSS):
        lines = [(each, *_line(each, quantity)) for each in near]
        band = _band(quantity, [(c, x, y) for c, x, y in lines if len(x) > 1], batch, rate)
        if band is not None:
            found.append(band)
    return tuple(found)


def named(quantity: str) -> str:
    """A quantity in words: "loss", "momentum", "hidden norm"."""
    return quantity if quantity in (LOSS, MOMENTUM) else f"{quantity} norm"


def along(course: Course, quantity: str) -> tuple[Array, Array, Array]:
    """Tokens, place in a band, and value of each point of a course that has them."""
    if quantity == LOSS:
        at, values = course.tokens, course.loss
    else:
        at = course.path
        values = _size(course) if quantity == MOMENTUM else course.group_norm(quantity)
    good = np.isfinite(at) & np.isfinite(values) & (at > 0) & (course.tokens > 0)
    if quantity != LOSS:
        good &= values > 0
    y = values[good] if quantity == LOSS else np.log2(values[good])
    return course.tokens[good], np.log2(at[good]), y


def _size(course: Course) -> Array:
    """Of the momentum; NaN where not all groups have one."""
    nothing = np.full(len(course.tokens), math.nan)
    sizes = [course.momenta.get(group, nothing) for group in ("input", "hidden", "output")]
    return np.asarray(np.prod(sizes, axis=0) ** (1 / len(sizes)))


def _line(course: Course, quantity: str) -> tuple[Array, Array]:
    _, x, y = along(course, quantity)
    keep = np.concatenate([np.diff(x) > 1e-9, [True]]) if len(x) else np.zeros(0, dtype=bool)
    return x[keep], y[keep]


def _distance(course: Course, batch: float, rate: float) -> Array:
    """Of a course from the plan, in units of ``NEAR``; infinite where it cannot be told."""
    if not (course.batch > 0 and course.rate > 0):
        return np.full(2, math.inf)
    return np.abs([math.log2(course.rate / rate), math.log2(course.batch / batch)]) / NEAR


def _band(quantity: str, lines: Sequence[tuple[Course, Array, Array]], batch: float, rate: float) -> Band | None:
    if len(lines) < FEWEST:
        return None
    first, last = min(x[0] for _, x, _ in lines), max(x[-1] for _, x, _ in lines)
    grid = np.arange(math.ceil(first / SPACING), math.floor(last / SPACING) + 1) * SPACING
    rows: list[tuple[float, ...]] = []
    for at in grid:
        there = [(c, float(np.interp(at, x, y))) for c, x, y in lines if x[0] <= at <= x[-1]]
        found = _expected(there, batch, rate, *CHANCE[quantity]) if len(there) >= FEWEST else None
        if found is not None:
            rows.append((float(at), *found))
    if len(rows) < 2:
        return None
    at, value, sd, freedom, of_batch = zip(*_together(rows), strict=True)
    return Band(quantity, at, value, sd, freedom, of_batch)


def _together(rows: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The longest part without a gap."""
    breaks = [i for i in range(1, len(rows)) if rows[i][0] - rows[i - 1][0] > 1.5 * SPACING]
    edges = [0, *breaks, len(rows)]
    parts = [rows[i:j] for i, j in itertools.pairwise(edges)]
    return max(parts, key=len)


def _expected(
    there: Sequence[tuple[Course, float]], batch: float, rate: float, chance: float, grown: float
) -> tuple[float, float, float, float] | None:
    """Expectation at the plan, standard deviation of one run, its degrees of freedom, and the slope over the batch.

    Runs of one seed stray together, so the residuals are seeds (random effects) and the rest. The variance between
    seeds is drawn towards the prior (moderated variance; Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3:3).
    """
    u = np.array([math.log2(c.rate / rate) for c, _ in there])
    b = np.array([math.log2(c.batch / batch) for c, _ in there])
    y = np.array([value for _, value in there])
    weight = np.exp(-0.5 * ((u / (0.4 * NEAR[0])) ** 2 + (b / (0.4 * NEAR[1])) ** 2))
    values = [len(np.unique(x)) for x in (u, b)]
    terms = [x**power for power in (2, 1) for x, many in zip((u, b), values, strict=True) if many > power]
    design = np.stack([np.ones_like(y), *terms], axis=1)
    count = float(weight.sum() ** 2 / (weight @ weight))
    if count - design.shape[1] < 1:
        return None
    root = np.sqrt(weight)[:, None]
    inverse = np.linalg.pinv((design * root).T @ (design * root), hermitian=True)
    solution = inverse @ (design.T @ (weight * y))
    missed = y - design @ solution
    _, seed = np.unique([c.seed for c, _ in there], return_inverse=True)
    means = np.bincount(seed, weight * missed) / np.bincount(seed, weight)
    rest = float(weight @ (missed - means[seed]) ** 2 / weight.sum()) * count / (count - design.shape[1])
    freedom = PRIOR + len(means) - 1
    chance *= min(abs(float(solution[0])) / grown, 1.0) if grown else 1.0
    between = (PRIOR * chance**2 + float(np.square(means - means.mean()).sum())) / freedom
    sd = math.sqrt(rest + between * (1 + 1 / len(means)) + ROUNDING**2)
    return float(solution[0]), sd, freedom, float(solution[-1]) if values[1] > 1 else math.nan


def threshold(band: Band, quantities: int, freedom: Array) -> Array:
    """Standard deviations beyond which a point is off the band, so that at most ``ALARMS`` of healthy runs ever are.

    Student's quantile for as many looks as there are octaves and quantities (Bonferroni): a run's deviation stays much
    the same over an octave.
    """
    looks = quantities * max(band.octaves, 1.0)
    return np.asarray(stats.t.ppf(1 - ALARMS / looks / 2, np.maximum(freedom, 1.0)))


def half_width(band: Band, quantities: int) -> Array:
    """Half the width of a band at its points, of ``quantities`` that are looked at."""
    return np.asarray(threshold(band, quantities, np.array(band.freedom)) * np.array(band.sd))
