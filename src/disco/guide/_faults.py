"""Which fault a run's norms look like: each fault moves the layer groups in a pattern of its own. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from disco.fit import Result
from disco.guide._bands import LOSS, MOMENTUM, Array, Band, along, threshold
from disco.guide._course import Course
from disco.runs.units import two_to

EXPLAINS = 0.3
"""Share of the squared deviations that a pattern may leave unexplained, to be named."""
TOLERANCE = 0.03
"""Octaves by which patterns are wrong of themselves."""
SUBTLE, SUBTLE_COSTS = 0.5, 0.1
"""Octaves of steps below which a rate or ratio is hardly the reason, since such are off by factors; and the share of
the deviations that speaks against it."""
FORGOTTEN = 1.0
"""Octaves within which a group's steps are off by its ratio: beyond the band's end they are known no better."""
BATCHES = 5.0
"""Octaves by which a batch is thought to be another than the declared one, at most."""
SHARDS = 1.5
"""Octaves by which a normalisation per shard is thought to change the steps of matrices: the root of 8 shards."""
LAST = 4
"""Points of which the direction of a group's deviation is the median."""
CLEAR = 3.0
"""Standard deviations that make a direction clear."""
FINE = 1 / 16
"""Octaves of path between the increments of which a decaying norm is the sum."""
LATEST = 12
"""Points of a run whose pattern is looked at."""


@dataclass(frozen=True)
class Seen(Result):
    """One quantity of a run against its band, at the last point that the band reaches."""

    quantity: str
    """A layer group, "momentum" or "loss"."""
    tokens: float
    value: float
    """log2 of the norm, or nats."""
    expected: float
    low: float
    high: float
    """Ends of the band: beyond them is no healthy run of the study, but for ``_bands.ALARMS``."""

    @property
    def outside(self) -> bool:
        """Whether it is off the band."""
        return not self.low <= self.value <= self.high


@dataclass(frozen=True)
class _Line:
    """A layer group's points against its band, or those of the momentum."""

    group: str
    band: Band
    x: Array
    y: Array
    expected: Array
    sd: Array

    @property
    def off(self) -> Array:
        return self.y - self.expected

    @property
    def strays(self) -> float:
        """Standard deviations off the band of late."""
        return float(np.median(self.off[-LAST:] / self.sd[-LAST:]))

    @property
    def of_weights(self) -> bool:
        return self.group != MOMENTUM

    def shifted(self, octaves: float) -> Array:
        """Deviations if the path were longer by so many octaves."""
        return np.asarray(_beyond(self.x + octaves, self.band) - self.expected)

    def decayed(self, each_step: float) -> Array:
        """Deviations if weights shrank by ``each_step`` per unit of path (lambda): what was added is worn off since."""
        if not self.of_weights:
            return np.zeros_like(self.x)
        logs = np.arange(self.band.at[0], self.band.at[-1], FINE)
        path, norm = 2.0**logs, 2.0 ** np.interp(logs, self.band.at, self.band.value)
        added = np.diff(norm, prepend=0.0)
        ago = np.subtract.outer(2.0**self.x, path)
        worn = np.where(ago >= 0, np.exp(-each_step * np.maximum(ago, 0.0)), 0.0)
        return np.asarray(np.log2((worn @ added) / ((ago >= 0) @ added)))

    @property
    def knows_batch(self) -> bool:
        return all(map(math.isfinite, self.band.of_batch))

    def batched(self, octaves: float) -> Array:
        """Deviations if the batch were larger by so many octaves; none where the study has one batch."""
        if not self.knows_batch:
            return np.zeros_like(self.x)
        return np.asarray(octaves * np.interp(self.x, self.band.at, self.band.of_batch))


def seen(course: Course, bands: Sequence[Band]) -> tuple[Seen, ...]:
    """Every quantity at its last point inside its band."""
    found = []
    for band in bands:
        tokens, x, y = along(course, band.quantity)
        expected, sd, freedom = band.expected(x)
        inside = np.flatnonzero(np.isfinite(expected))
        if not inside.size:
            continue
        at = int(inside[-1])
        half = float(threshold(band, len(bands), freedom[at]) * sd[at])
        middle = float(expected[at])
        found.append(Seen(band.quantity, float(tokens[at]), float(y[at]), middle, middle - half, middle + half))
    return tuple(found)


def looks_like(course: Course, bands: Sequence[Band]) -> str:
    """The fault whose pattern the norms have, in words; "" if none of those known explains them.

    A pattern has one free number: how far the path of one group, or of all, is off; lambda; octaves of batch. The one
    that leaves least of the squared deviations is named, if that is little.
    """
    lines = [line for band in bands if band.quantity != LOSS for line in _lines(course, band)]
    if not lines:
        return ""
    best = min(_candidates(course, lines), key=lambda found: found[0])
    return best[1] if best[0] <= EXPLAINS else _agreement(lines)


def _lines(course: Course, band: Band) -> Iterator[_Line]:
    _, x, y = along(course, band.quantity)
    expected, sd, _ = band.expected(x)
    inside = np.flatnonzero(np.isfinite(expected))[-LATEST:]
    if inside.size:
        yield _Line(band.quantity, band, x[inside], y[inside], expected[inside], sd[inside])


def _candidates(course: Course, lines: Sequence[_Line]) -> Iterator[tuple[float, str]]:
    """Share left unexplained and what speaks against a fault beforehand, and the fault in words."""
    factors = np.linspace(-4, 4, 161)
    weights = [line for line in lines if line.of_weights]
    ratios = {line.group: course.ratios.get(line.group, 1.0) for line in lines}
    for line in weights:

        def alone(each: _Line, octaves: float, own: str = line.group) -> Array:
            return each.shifted(octaves) if each.group == own else np.zeros_like(each.x)

        left, octaves = _fit(lines, factors, alone)
        subtle = SUBTLE_COSTS if line.group != "hidden" and abs(octaves) < SUBTLE else 0.0
        yield left + subtle, _one_group(line.group, octaves, ratios[line.group])
    left, octaves = _fit(lines, factors, lambda each, f: each.shifted(f))
    subtle = SUBTLE_COSTS if abs(octaves) < SUBTLE else 0.0
    yield left + subtle, f"all groups step {two_to(octaves, 1)} times as far as the rate says: is it the logged one?"
    left, decay = _fit(lines, 2.0 ** np.linspace(-12, 2, 113), lambda each, f: each.decayed(f * ratios[each.group]))
    declared = f", declared is {course.weight_decay:g}" if course.weight_decay else ""
    yield left, f"weights decay, as with a weight decay of {decay:.2g} more than the study's runs have{declared}"
    if len(weights) < len(lines) and any(abs(line.strays) > CLEAR for line in weights):  # as by a batch they hardly do
        left, octaves = _fit(lines, factors, lambda each, f: np.full_like(each.x, 0.0 if each.of_weights else f))
        yield left, f"the momentum is {two_to(octaves, 1)} times as large: is its weight that of the old buffer?"
    if any(line.knows_batch for line in lines):
        left, octaves = _fit(lines, np.linspace(-BATCHES, BATCHES, 101), lambda each, f: each.batched(f))
        size = two_to(math.log2(course.batch) + octaves, 0)
        yield left, f"as with a batch of about {size} tokens: is the declared one in tokens, and of all devices?"


def _fit(lines: Sequence[_Line], values: Array, pattern: Callable[[_Line, float], Array]) -> tuple[float, float]:
    """Least share of the squared deviations that a pattern leaves, and the number at which it does."""
    weights = [1 / (line.sd**2 + TOLERANCE**2) for line in lines]
    whole = sum(float(weight @ line.off**2) for line, weight in zip(lines, weights, strict=True))

    def left(value: float) -> float:
        pairs = zip(lines, weights, strict=True)
        return sum(float(weight @ (line.off - pattern(line, value)) ** 2) for line, weight in pairs)

    found = [left(float(value)) for value in values]
    at = int(np.argmin(found))
    return (found[at] / whole if whole > 0 else math.inf), float(values[at])


def _one_group(group: str, octaves: float, ratio: float) -> str:
    if ratio != 1 and abs(octaves + math.log2(ratio)) <= FORGOTTEN:
        return f"the {group} group steps as if its ratio {two_to(math.log2(ratio))} were forgotten"
    if group == "hidden" and abs(octaves) <= SHARDS:
        return (
            f"only the hidden group is off, its steps {two_to(octaves, 1)} times as far: as if updates were normalised "
            "per shard, or its ratio were another"
        )
    return f"only the {group} group is off, its steps {two_to(octaves, 1)} times as far: is its ratio the declared one?"


def _agreement(lines: Sequence[_Line]) -> str:
    """Groups the same way, by no simple pattern: steps agree more, or less, with those before than they should."""
    clear = [line.strays for line in lines if line.of_weights]
    least, most = min(clear, default=0.0), max(clear, default=0.0)
    if most > CLEAR > -least:
        return "steps agree with one another more than they should: more momentum, or a larger batch, than declared"
    if -least > CLEAR > most:
        return "steps agree with one another less than they should: less momentum, or a smaller batch, than declared"
    worst = max(lines, key=lambda line: abs(line.strays))
    if not worst.of_weights:
        return "the momentum most: is the batch, or the weight of the momentum, another than declared?"
    return f"the {worst.group} group most; no pattern that is known"


def _beyond(x: Array, band: Band) -> Array:
    """The band's value, going on as at its ends."""
    at, value = np.array(band.at), np.array(band.value)
    low, high = (value[1] - value[0]) / (at[1] - at[0]), (value[-1] - value[-2]) / (at[-1] - at[-2])
    inner = np.interp(x, at, value)
    return np.asarray(inner + low * np.minimum(x - at[0], 0.0) + high * np.maximum(x - at[-1], 0.0))
