"""The learning rate that a run's norms show, whatever its record says. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from disco.fit import Result
from disco.guide._course import Course
from disco.guide._estimates import NORMAL
from disco.guide._forecast import Forecast, against, slope_of
from disco.guide._growth_law import FIRST, RATIO, walk
from disco.guide._growth_model import Expectation, Growth, expectations

SPAN = 4.0
"""Octaves around the recorded rate that are searched."""
OTHER = 0.25
"""Octaves beyond which the interval lies where the rate is clearly another than the recorded one."""
WIDER = 0.3
"""Standard deviation, in octaves for each octave of width (taken as much: of vocabulary) beyond the study, of the rate
that such a run seems to have: as 60 runs twice as wide as two studies had (docs/log.md)."""
ODD = 6.0
"""Surprise from which the norms are those of no rate. In runs of another width than the study's it is 1 to 2."""
APART = 1.0001 * RATIO
"""Ratio of path between two norms that are looked at: ``walk`` keeps them whatever the rounding."""
GRID = (0.5, 0.0625)
"""Octaves between the rates of the search, and of the closer one around its best."""


@dataclass(frozen=True)
class Shown(Result):
    """log2 of the rate that a run's norms show over the recorded one, with its 90% interval."""

    octaves: float
    low: float
    high: float

    @property
    def other(self) -> bool:
        """Whether it is clearly another rate."""
        return max(self.low, -self.high) > OTHER


def shown_rate(course: Course, growth: Growth | None) -> Shown | None:
    """The factor on all learning rates so far at which the norms are likeliest under a study's growth.

    Norms grow with the path that was really walked, in every run of a study within a few percent, so a rate that is not
    the recorded one shows long before the end. The interval is that of the likelihood's curvature at its maximum,
    widened as the growth's own intervals are, and for a width or vocabulary that the study does not have.

    Args:
        course: The run so far.
        growth: Of the study.

    Returns:
        None where the growth says nothing of a run at the recorded or the shown rate, the norms follow it at neither,
        there are none yet from a path of 1 on, or the maximum lies ``SPAN`` octaves off.
    """
    if growth is None or against(course, growth, growth.layer):
        return None
    same, best = _with_the_same_points(course, growth), 0.0
    shifts = np.arange(-SPAN, SPAN + GRID[0] / 2, GRID[0])
    for spacing in GRID:
        shifts = shifts if spacing == GRID[0] else best + spacing * np.arange(-8, 9)
        found = _expectations(same, shifts, growth)
        if not found:
            return None
        evidence = np.array([each.evidence for each in found])
        at = int(np.argmax(evidence))
        if at in (0, len(shifts) - 1):
            return None
        best = float(shifts[at])
    before, there, after = evidence[at - 1 : at + 2]
    curvature = (2 * there - before - after) / spacing**2
    surprise = found[at].surprise
    if not curvature > 0 or surprise > ODD or against(rescaled(course, best), growth, growth.layer):
        return None
    middle = best + (after - before) / (2 * curvature * spacing)
    widening = growth.widening(course.momentum) * math.sqrt(max(surprise, 1.0))
    half = NORMAL * math.hypot(widening / math.sqrt(curvature), WIDER * _beyond(course, growth))
    return Shown(float(middle), float(middle - half), float(middle + half))


def _with_the_same_points(course: Course, growth: Growth) -> Course:
    """Only those norms that ``walk`` keeps at every shift: the likelihoods of different data do not compare."""
    layer = growth.layer
    norm, path = course.group_norm(layer), course.path * course.ratios.get(layer, 1.0)
    known = np.flatnonzero(np.isfinite(norm) & (norm > 0) & np.isfinite(path))
    kept, bound = set(known[:1].tolist()), math.inf
    for index in known[::-1].tolist():
        if FIRST * 2**SPAN < path[index] < bound:
            kept.add(index)
            bound = path[index] / APART
    norm = np.where([index in kept for index in range(len(norm))], norm, math.nan)
    return replace(course, norm=norm) if layer == "output" else replace(course, norms={**course.norms, layer: norm})


def _beyond(course: Course, growth: Growth) -> float:
    """Octaves of width and of vocabulary from those of the study."""
    found = 0.0
    for name, value in (("width", course.width), ("vocab", course.vocab)):
        low, high = growth.ranges.get(name, (0.0, 0.0))
        if value > 0 and low > 0:
            found += max(math.log2(low / value), math.log2(value / high), 0.0)
    return found


def rescaled(course: Course, octaves: float) -> Course:
    """The course with all its learning rates, past and to come, ``octaves`` higher."""
    factor = 2.0**octaves
    return replace(course, rate=course.rate * factor, lr=course.lr * factor, path=course.path * factor)


def widened(found: Forecast, shown: Shown, course: Course, growth: Growth | None) -> Forecast:
    """The forecast of a rescaled course, whose own rate is known as well as ``shown`` only; what was measured stays."""
    if course.last >= found.tokens:
        return found
    half = (shown.high - shown.low) / 2 * slope_of(course, found.tokens, growth)
    half = math.hypot(half, (found.high - found.low) / 2)
    return replace(found, low=found.log2 - half, high=found.log2 + half)


def _expectations(course: Course, shifts: np.ndarray, growth: Growth) -> list[Expectation]:
    """Of the norms so far, at each shift; nothing where there are none after the first."""
    walks = [walk(rescaled(course, float(u)), course.last, growth.layer, growth.centre) for u in shifts]
    some = [each for each in walks if each is not None and len(each.seen)]
    return expectations([growth] * len(some), some) if len(some) == len(walks) else []
