"""The final norm of a run from its course so far, and how far from the optimum that is in octaves of learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from disco.fit import Result
from disco.guide._course import Course
from disco.guide._estimates import NORMAL
from disco.guide._growth_law import walk
from disco.guide._growth_model import Growth, expectations
from disco.guide._own_course import own_course, own_slope
from disco.runs.units import two_to

MARGIN = 2.0
"""Factor by which batch, rate, width and vocabulary may lie outside a study's before it is mentioned."""
STRANGE = 25.0
"""Mean squared distance of a run's norms from what the study expects, in its own units, from which the run is taken to
grow by another law."""
LEAST = 0.1
"""Least octaves of norm per octave of learning rate: where the norm tells less, it tells nothing."""


@dataclass(frozen=True)
class Forecast(Result):
    """log2 of a norm at a number of tokens."""

    tokens: float
    log2: float
    """NaN where nothing can be said."""
    low: float
    high: float
    """90% interval for this run."""
    source: str
    """"growth" (of a study), "own course" (the run extrapolated) or "none"."""
    reason: str
    """Why this source, and what it rests on."""

    @property
    def sd(self) -> float:
        """Standard deviation that would give the interval to a normal variable, in octaves."""
        return (self.high - self.low) / 2 / NORMAL


@dataclass(frozen=True)
class Distance(Result):
    """How far a run will be from the optimum, in octaves of learning rate: positive where its rate is too high."""

    octaves: float
    low: float
    high: float
    """90% interval."""


def distance(found: Forecast, target: float, error: float, slope: float) -> Distance:
    """Translates the difference of a forecast from the optimal norm into octaves of learning rate.

    Args:
        found: Of the norm at the end.
        target: log2 of the optimal norm there.
        error: Its standard error, in octaves of norm.
        slope: Octaves of final norm per octave of learning rate (``slope_of``); above 0.
    """
    if not (math.isfinite(found.log2) and math.isfinite(target) and slope > 0):
        return Distance(math.nan, math.nan, math.nan)
    middle = (found.log2 - target) / slope
    half = NORMAL * math.hypot(found.sd, error if math.isfinite(error) else 0.0) / slope
    return Distance(middle, middle - half, middle + half)


def forecast(course: Course, tokens: float, growth: Growth | None = None, layer: str = "output") -> Forecast:
    """The norm of ``layer`` after ``tokens`` tokens, if the run goes on at ``course.rate`` and its schedule.

    From the growth of a study where there is one that holds for this run, conditioned on the run's norms so far; else
    the run's own course carried on, and ``reason`` says why.

    Args:
        course: What is known of the run.
        tokens: At which the norm is wanted; at or before the last point it is what was measured.
        growth: Of the layer.
        layer: Layer group.
    """
    norm = course.group_norm(layer)
    known = np.isfinite(norm) & (norm > 0) & np.isfinite(course.path)
    if not known.any():
        return _nothing(tokens, f"no norm of the {layer} layer was logged yet")
    if tokens <= course.tokens[known][-1]:
        at = float(np.interp(tokens, course.tokens[known], np.log2(norm[known])))
        return Forecast(tokens, at, at, at, "own course", "measured")
    why = against(course, growth, layer)
    if growth is not None and not why:
        found, why = _grown(course, tokens, growth)
        if found is not None:
            return found
    middle, sd, lacking = own_course(course, tokens, layer)
    if lacking:
        return _nothing(tokens, f"{why}; {lacking}")
    return Forecast(tokens, middle, middle - NORMAL * sd, middle + NORMAL * sd, "own course", why)


def against(course: Course, growth: Growth | None, layer: str = "output") -> str:
    """Why a study's growth says nothing about a run before its norms are looked at; empty where it does."""
    if growth is None:
        return "no study tells how norms grow"
    if growth.layer != layer:
        return f"the growth of the study is that of the {growth.layer} layer"
    if not growth.usable:
        return growth.reason
    if course.optimizer != growth.optimizer:
        return f"the run's optimizer is {course.optimizer}, the study's {growth.optimizer}"
    if not (math.isfinite(course.momentum) and math.isfinite(course.weight_decay)):
        return "the run's momentum or weight decay is not known"
    rate = course.rate * course.ratios.get(layer, 1.0)
    if rate >= growth.steady:
        return f"from {two_to(math.log2(growth.steady))} on the study's runs did not follow one law of growth"
    return ""


def outside(course: Course, growth: Growth) -> tuple[str, ...]:
    """Settings of a run that the study's runs do not span, in words."""
    found = []
    rate = course.rate * course.ratios.get(growth.layer, 1.0)
    settings = {"batch": course.batch, "rate": rate, "width": course.width, "vocab": course.vocab}
    for name, value in settings.items():
        low, high = growth.ranges.get(name, (0.0, 0.0))
        if value > 0 and low > 0 and not low / MARGIN <= value <= high * MARGIN:
            called = {"rate": "learning rate", "vocab": "vocabulary"}.get(name, name)
            found.append(f"{called} {two_to(math.log2(value))}")
    low, high = growth.ranges["momentum"]
    if not low - 1e-9 <= course.momentum <= high + 1e-9:
        found.append(f"momentum {course.momentum:g}")
    return tuple(found)


def _grown(course: Course, tokens: float, growth: Growth) -> tuple[Forecast | None, str]:
    """By the growth of a study; or why the run does not follow it."""
    along = walk(course, tokens, growth.layer, growth.centre)
    if along is None:
        return None, "the learning rate is 0 from here on"
    (found,) = expectations([growth], [along])
    if found.surprise > STRANGE:
        times = math.sqrt(found.surprise)
        return None, f"its norms are {times:.1f} times as far from the study's growth as other runs' are"
    half = NORMAL * found.sd * growth.widening(course.momentum) * math.sqrt(max(found.surprise, 1.0))
    strange = outside(course, growth)
    why = f"growth of {growth.runs} runs, from which runs left out were {growth.scatter:.2f} octaves off"
    if strange:
        why += f"; outside these runs: {', '.join(strange)}"
    return Forecast(tokens, found.mean, found.mean - half, found.mean + half, "growth", why), ""


def _nothing(tokens: float, why: str) -> Forecast:
    return Forecast(tokens, math.nan, math.nan, math.nan, "none", why)


def planned(course: Course, tokens: float, growth: Growth | None, rate: float) -> Forecast:
    """The output norm after ``tokens`` tokens of a new run like this one but for its rate, by the study's growth."""
    why = against(course, growth)
    if growth is None or why:
        return _nothing(tokens, why)
    fresh = replace(
        course, tokens=np.zeros(1), path=np.zeros(1), lr=np.full(1, math.nan), loss=np.full(1, math.nan),
        norm=np.ones(1), norms={}, momenta={}, rate=rate,
    )  # fmt: skip
    found, why = _grown(fresh, tokens, growth)
    return found or _nothing(tokens, why)


def slope_of(course: Course, tokens: float, growth: Growth | None = None) -> float:
    """Octaves of the output norm at ``tokens`` per octave of the learning rate of the whole run: about 0.5 late in it.

    By the study's growth; without one that holds, by the run's own course; NaN without either, and at least ``LEAST``.
    """
    low, high = (planned(course, tokens, growth, course.rate * 2**octaves).log2 for octaves in (-0.5, 0.5))
    slope = high - low if math.isfinite(high - low) else own_slope(course, tokens)
    return max(slope, LEAST)  # NaN stays
