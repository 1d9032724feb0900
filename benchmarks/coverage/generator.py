"""Loss curves and studies with a known optimum, none of them of the form that is fitted.

A bowl is a curve over octaves with its minimum at 0 and, at the minimum, (mean) curvature 2, so that being d octaves
off costs about d^2. Steepness "r" compares the flanks: for "exponential" and "quartic" the loss one octave to the right
over that one octave to the left, for "logcosh" the slopes far out, for "pieces" the curvatures, which jump at the
minimum. The published scans (Step Law, arXiv:2503.04715) have a cubic coefficient of 0.16 in the median and 0.40 at the
95% quantile, relative to the quadratic one; "exponential" has 0.20 at r = 1.5 and 0.34 at r = 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

Array = np.ndarray
Bowl = Callable[[Array], Array]

SHAPES: tuple[tuple[str, float], ...] = (
    ("parabola", 1.0),
    ("exponential", 1.5), ("exponential", 2.0),
    ("logcosh", 1.5), ("logcosh", 2.0),
    ("quartic", 1.5), ("quartic", 2.0),
    ("pieces", 1.5), ("pieces", 2.0),
)  # fmt: skip
HELD_OUT: tuple[tuple[str, float], ...] = (("sharp", 1.5), ("sharp", 2.0), ("plateau", 1.0), ("root", 1.0))
"""Shapes that played no part in choosing the constants of ``disco.fit._smooth``, which were chosen by the coverage on
``SHAPES``. "sharp" is "logcosh" with slopes that level off within one octave; "plateau" levels off to the left, "root"
becomes linear there, and both are parabolas to the right."""


def bowl(name: str, ratio: float) -> Bowl:
    """The curve of that name, steeper to the right."""
    if name == "parabola":
        return lambda u: np.asarray(u) ** 2
    if name == "exponential":
        k = brentq(lambda k: (math.exp(k) - k - 1) - ratio * (math.exp(-k) + k - 1), 1e-3, 3)
        return lambda u: 2 * (np.exp(k * u) - k * u - 1) / k**2
    if name == "plateau":
        return lambda u: np.where(np.asarray(u) > 0, np.asarray(u) ** 2, 4 * (1 - np.exp(-(np.asarray(u) ** 2) / 4)))
    if name == "root":
        return lambda u: np.where(np.asarray(u) > 0, np.asarray(u) ** 2, 2 * (np.sqrt(1 + np.asarray(u) ** 2) - 1))
    if name in ("logcosh", "sharp"):
        s = 0.45 if name == "logcosh" else 0.8  # slopes level off within some two octaves, or one
        return lambda u: (
            2 / (ratio * s * s) * (np.logaddexp(math.log(ratio) - s * u, ratio * s * u) - math.log(ratio + 1))
        )
    if name == "quartic":
        quartic = 0.06
        cubic = (1 + quartic) * (ratio - 1) / (ratio + 1)
        return lambda u: u**2 + cubic * u**3 + quartic * u**4
    if name == "pieces":
        return lambda u: np.where(np.asarray(u) > 0, ratio, 1.0) * np.asarray(u) ** 2 * 2 / (1 + ratio)
    raise ValueError(f"no bowl {name!r}; there are {', '.join(sorted({shape for shape, _ in SHAPES}))}")


@dataclass(frozen=True)
class Scan:
    """Runs over a grid of log2 learning rates, one per grid point and seed."""

    x: Array
    y: Array
    """Infinite where the run diverged."""
    truth: float
    attainable: float
    """Width of the 90% interval of an estimator that knows the shape, its scale and the noise: only where it lies, and
    how high, is unknown."""


def scan(
    rng: np.random.Generator,
    shape: Bowl,
    truth: float,
    spacing: float,
    points: int,
    noise: float,
    seeds: int = 1,
    mirrored: bool = False,
    diverged: float = math.inf,
) -> Scan:
    """One scan, its grid centred on 0.

    Args:
        truth: Where the minimum is.
        noise: Standard deviation of one run, in units of the curvature.
        mirrored: Steeper to the left.
        diverged: Octaves above the minimum beyond which runs diverge.
    """
    grid = (np.arange(points) - (points - 1) / 2) * spacing
    x = np.repeat(grid, seeds)
    side = -1.0 if mirrored else 1.0

    def clean(at: Array) -> Array:
        return np.asarray(shape(side * (at - truth)))

    y = clean(x) + rng.normal(0, noise, len(x))
    lives = x - truth <= diverged
    slope = (clean(x + 1e-4) - clean(x - 1e-4))[lives] / 2e-4
    information = float(np.sum((slope - slope.mean()) ** 2)) / noise**2 if noise else math.inf
    width = 2 * 1.6449 / math.sqrt(information) if information > 0 else math.inf
    return Scan(x, np.where(lives, y, math.inf), truth, width)


def along_runs(rng: np.random.Generator, octaves: Sequence[float], memory: float, runs: int) -> Array:
    """Standard normal noise of shape (runs, horizons) whose correlation halves with every ``memory`` octaves of tokens:
    the horizons of one run are not independent."""
    distance = np.abs(np.subtract.outer(octaves, octaves))
    root = np.linalg.cholesky(0.5 ** (distance / memory) + 1e-12 * np.eye(len(octaves)))
    return np.asarray(rng.normal(size=(runs, len(octaves))) @ root.T)


@dataclass(frozen=True)
class Truth:
    """Rules that a study follows, in log2 of batch and tokens: lr* and batch* are 2^-4 and 2^11 at 2^20 tokens."""

    lr_batch: float = 0.6
    lr_tokens: float = -0.5
    batch_tokens: float = 0.5
    norm: float = 6.0
    norm_tokens: float = 0.0
    curvature: float = 0.06
    """Nats per octave of learning rate squared."""
    batch_curvature: float = 0.02

    def lr(self, batch: float, tokens: float) -> float:
        """log2 of the best learning rate."""
        return -4 + self.lr_batch * (math.log2(batch) - 11) + self.lr_tokens * (math.log2(tokens) - 20)

    def batch(self, tokens: float) -> float:
        """log2 of the best batch."""
        return 11 + self.batch_tokens * (math.log2(tokens) - 20)

    def loss(self, tokens: float) -> float:
        """Loss at the best batch and learning rate."""
        return 1.0 + 1.2 * 2.0 ** (-0.1 * (math.log2(tokens) - 20))


def study(
    rng: np.random.Generator,
    truth: Truth,
    rates: Sequence[float],
    shape: Bowl,
    batch_shape: Bowl | None = None,
    batches: Sequence[int] = (512, 1024, 2048, 4096, 8192),
    horizons: Sequence[int] = (2**18, 2**19, 2**20, 2**21),
    seeds: int = 1,
    noise: float = 0.006,
    memory: float = 1.0,
    diverged: float = math.inf,
) -> dict[str, Array]:
    """A table for ``disco.fit.fit_table``: every run is evaluated at all horizons, its noise correlated along it.

    Args:
        rates: log2 of the learning rates of the grid.
        shape: Over the learning rate; ``batch_shape`` over the batch (the same shape if None).
        noise: Standard deviation of one run at one horizon, in nats; half of it shows up in ``sigma``, as the spread of
            a window does.
        memory: Octaves of tokens over which the correlation of the noise halves.
        diverged: Octaves above the best learning rate of a horizon beyond which a run has diverged by then, for good.
    """
    octaves = [math.log2(tokens) for tokens in horizons]
    rows = []
    for batch in batches:
        for rate in rates:
            errors = noise * along_runs(rng, octaves, memory, seeds)
            for seed in range(seeds):
                dead = False
                for tokens, error in zip(horizons, errors[seed], strict=True):
                    off = rate - truth.lr(batch, tokens)
                    away = math.log2(batch) - truth.batch(tokens)
                    dead = dead or off > diverged
                    loss = truth.loss(tokens) + truth.curvature * float(shape(np.float64(off)))
                    loss += truth.batch_curvature * float((batch_shape or shape)(np.float64(away)))
                    norm = truth.norm + truth.norm_tokens * (math.log2(tokens) - 20) + 0.8 * off
                    rows.append({
                        "run": f"b{batch}-r{rate}-s{seed}", "model": "d32-L2", "family": "scion", "width": 32,
                        "depth": 2, "parameters": 24576, "seed": seed, "batch": batch, "lr": 2.0**rate,
                        "tokens": tokens, "sigma": noise / 2 * math.sqrt(rng.chisquare(2) / 2), "points": 3,
                        "loss": math.nan if dead else loss + error, "diverged": dead, "loss_start": math.log(256),
                        "norm/output/rms_to_inf": math.nan if dead else 2.0**norm,
                    })  # fmt: skip
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
