"""How norms grow in a study, and what that says of a run's norm to come given those so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from disco.fit import Result
from disco.guide._growth_law import TERMS, Track, Walk, prior, track

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Deviation(Result):
    """How a run's speed of growth deviates from the law: a Gaussian process over log2 path, octaves of dn/dS.

    Its standard deviation is in proportion to how much steps disagree (``Track.disagreement``), plus ``floor``: while
    all add up, runs cannot differ.
    """

    constant: float = 0.1
    """Standard deviation of the part that stays, where steps hardly agree."""
    varying: float = 0.1
    """That of the part that passes."""
    length: float = 2.0
    """Octaves of path over which it does (exponential correlation)."""
    noise: float = 0.01
    """Standard deviation of a logged norm around the law, octaves of norm."""
    floor: float = 0.2

    def covariance(self, logs: Array, disagreement: Array) -> Array:
        """Of the speeds in pieces at these log2 paths."""
        apart = np.abs(np.subtract.outer(logs, logs))
        part = self.floor + disagreement
        shape = self.constant**2 + self.varying**2 * np.exp(-apart / self.length)
        return np.asarray(np.multiply.outer(part, part) * shape)


@dataclass(frozen=True)
class Growth(Result):
    """Growth of one layer group's norm in the runs of a study."""

    layer: str
    optimizer: str
    centre: dict[str, float]
    """Where covariates are 0: "batch", "width", "momentum", "vocab"."""
    knots: tuple[float, ...] = ()
    """log2 norms."""
    terms: tuple[str, ...] = ()
    """Those of ``TERMS`` in which the runs differ."""
    coefficients: tuple[tuple[float, ...], ...] = ()
    """[terms, knots]."""
    covariance: tuple[tuple[float, ...], ...] = ()
    """Of the coefficients, flattened."""
    deviation: Deviation = field(default_factory=Deviation)
    ranges: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Least and largest batch, rate of the layer, momentum, weight decay, width, vocab, and log2 norm of the runs."""
    runs: int = 0
    conditions: int = 0
    """Groups of runs that were left out together: alike but for rate and seed."""
    scale: float = 1.0
    """By which intervals are widened, so that 95% of the forecasts of left-out runs at the centre's momentum hold."""
    scale_apart: float = 1.0
    """The same for runs at other momenta, whose growth differs more from one condition to the next."""
    scatter: float = math.nan
    """Median absolute error of these forecasts from 5% of the tokens, octaves of norm."""
    own_scatter: float = math.nan
    """The same of the runs' own courses carried on."""
    left_out: int = 0
    """Forecasts of runs left out."""
    steady: float = math.inf
    """Learning rate of the layer from which on runs did not follow the law; infinite if all did."""
    reason: str = ""
    """Why the growth is not to be used; empty where it is."""

    def widening(self, momentum: float) -> float:
        """By which the interval of a run with this momentum is to be widened."""
        return self.scale if momentum == self.centre["momentum"] else self.scale_apart

    @property
    def usable(self) -> bool:
        """Whether one law fits the runs of the study."""
        return not self.reason


@dataclass(frozen=True)
class Expectation:
    """Of the log2 norm at the end of a walk given what was observed on it."""

    mean: float
    sd: float
    surprise: float
    """Mean squared distance of the observations from what the study expects, in units of its own spread: about 1."""
    evidence: float
    """Log likelihood of the observations, up to a constant."""


def expectations(fits: Sequence[Growth], walks: Sequence[Walk]) -> list[Expectation]:
    """What is to be expected at the end of each walk.

    A run's deviation is conditioned on the observations through the law linearised about it (kriging).

    Args:
        fits: One for each walk, of the same knots and terms.
        walks: With covariates around the growth's centre.
    """
    knots, terms, others = np.array(fits[0].knots), *_split(fits[0].terms)
    own = [each.z[:, terms] for each in walks]
    tables = [z @ np.array(fit.coefficients) for z, fit in zip(own, fits, strict=True)]
    speeds = [np.zeros(len(each.z)) for each in walks]
    spreads: list[Array] = []
    surprises: list[float] = []
    evidences: list[float] = []
    for step in range(3):
        tracks = track(walks, tables, speeds, knots)
        for r, (now, each, fit) in enumerate(zip(tracks, walks, fits, strict=True)):
            if step == 0:
                design = now.design(own[r])
                among = fit.deviation.covariance(each.logs, now.disagreement)
                spreads.append(
                    among + design @ np.array(fit.covariance) @ design.T + _unknown(now, each, others, knots)
                )
            at = now.gain[each.seen]
            off = each.observed - now.log2[each.seen] + at @ speeds[r]
            spread = at @ spreads[r] @ at.T + fit.deviation.noise**2 * np.eye(len(off))
            solved = np.linalg.solve(spread, off)
            if step == 0:
                surprises.append(float(off @ solved) / max(len(off), 1))
                evidences.append(-0.5 * (float(off @ solved) + float(np.linalg.slogdet(spread)[1])))
            speeds[r] = spreads[r] @ at.T @ solved
    found = []
    pairs = zip(tracks, walks, fits, spreads, surprises, evidences, strict=True)
    for now, each, fit, spread, surprise, evidence in pairs:
        at, end = now.gain[each.seen], now.gain[-1]
        known = at @ spread @ at.T + fit.deviation.noise**2 * np.eye(len(at))
        shared = at @ spread @ end
        left = float(end @ spread @ end - shared @ np.linalg.solve(known, shared))
        sd = math.sqrt(max(left, 0.0) + fit.deviation.noise**2)
        found.append(Expectation(float(now.log2[-1]), sd, surprise, evidence))
    return found


def _split(terms: Sequence[str]) -> tuple[list[int], list[int]]:
    """Numbers of the terms that a growth has, and of the others."""
    own = [TERMS.index(term) for term in terms]
    return own, [index for index in range(len(TERMS)) if index not in own]


def _unknown(now: Track, along: Walk, others: Sequence[int], knots: Array) -> Array | float:
    """Covariance of the speeds for covariates in which only this run differs from the study's: their prior."""
    if not np.any(along.z[:, others]):
        return 0.0
    design = now.design(along.z[:, others])
    return np.asarray(design @ np.linalg.inv(prior([TERMS[index] for index in others], knots)) @ design.T)
