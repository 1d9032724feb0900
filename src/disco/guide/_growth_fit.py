"""Fits the law of growth to the runs of a study: coefficients, deviations of runs, and errors for runs left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from disco.errors import UserError
from disco.guide._course import Course
from disco.guide._estimates import NORMAL
from disco.guide._growth_law import TERMS, Track, Walk, averaged, expected, prior, track, walk
from disco.guide._growth_model import Deviation, Growth, expectations
from disco.guide._own_course import own_course

Array = NDArray[np.float64]

FEWEST, MOST = 6, 120
"""Runs below which no growth is fitted, and beyond which more tell nothing new: then every second, third..."""
ROUNDS = 4
"""Gauss-Newton steps between two estimates of the deviations."""
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Of a run's tokens, from which runs left out are forecast."""
JUDGED = 0.05
"""That from which the growth is compared with runs' own slopes."""
POINTS = 4
"""Norms below which a run tells no growth."""
SEVERAL = 3
"""Conditions, or runs at high rates, that tell something."""
LOOSE = 0.2
"""Median error in octaves of norm, of runs left out, from which the law does not hold."""
ALLOWED = 0.95
"""Share of the forecasts of left-out runs inside the 90% intervals: the study's runs are alike in what no setting
tells, such as the text, and the next run may not be."""
LEAST_SCALE = 0.25
LAYERS = ("output", "hidden", "input")
SPANNED = ("batch", "momentum", "weight_decay", "width", "vocab")
"""Settings of which a growth keeps the least and the largest."""
BEYOND = 3
"""Octaves of norm beyond the largest seen for which the law has knots."""


def condition(course: Course) -> tuple[object, ...]:
    """What runs share that differ in rate and seed only."""
    return (course.family, course.batch, course.momentum, course.weight_decay, course.warmup, course.decay,
            course.width, course.depth, tuple(sorted(course.ratios.items())))  # fmt: skip


def growth(courses: Sequence[Course], layer: str = "output") -> Growth:
    """Fits the law of growth to the runs of a study, those of its most frequent optimizer.

    The coefficients are generalised least squares over all logged norms, by Gauss-Newton steps through the integrated
    law; the deviations are those that make the runs of conditions left out most likely; the scale of intervals is that
    with which ``ALLOWED`` of the forecasts of such runs come true. Runs at rates so high that the law fails (the
    turbulent region) are found by these forecasts and left out for good.

    Args:
        courses: Finished or not.
        layer: Layer group.

    Raises:
        UserError: fewer than ``FEWEST`` runs have norms of the layer and a path.
    """
    optimizer, own = _one_optimizer(courses)
    if len(own) < FEWEST:
        raise UserError(f"growth: {len(own)} runs with a known momentum and weight decay, fewer than {FEWEST}")
    centre = _centre(own)
    walks = [(course, walk(course, course.last, layer, centre)) for course in own]
    found = [(course, each) for course, each in walks if each is not None and len(each.seen) >= POINTS]
    found = found[:: math.ceil(len(found) / MOST)] if found else found
    if len(found) < FEWEST:
        raise UserError(f"growth: {len(found)} runs with norms of the {layer} layer and a path, fewer than {FEWEST}")
    head = Growth(layer=layer, optimizer=optimizer, centre=centre)
    fitted, errors = _fitted(head, _members(found))
    steady = _steady([each.fastest for _, each in found], errors)
    kept = [(course, each) for course, each in found if each.fastest < steady]
    if FEWEST <= len(kept) < len(found):
        fitted, _ = _fitted(head, _members(kept))
        return replace(fitted, steady=steady)
    return fitted


def growths(courses: Sequence[Course]) -> tuple[Growth, ...]:
    """That of every optimizer and layer group for which there are runs enough."""
    found = []
    for optimizer in dict.fromkeys(course.optimizer for course in courses):
        own = [course for course in courses if course.optimizer == optimizer]
        for layer in LAYERS:
            try:
                found.append(growth(own, layer))
            except UserError:  # too few runs
                continue
    return tuple(found)


def _fitted(head: Growth, members: Sequence[_Member]) -> tuple[Growth, Array]:
    """The growth of these runs, and the error of each one's forecast from ``JUDGED`` of its tokens, its condition left
    out."""
    top = max(float(member.along.observed.max()) for member in members)
    knots = np.concatenate([[0.0, 0.5], np.arange(1.0, math.ceil(top) + BEYOND + 1)])
    study = _Study(members, _terms(members), knots)
    deviation = Deviation()
    for _ in range(2):
        study.fit(deviation)
        deviation = study.deviation(deviation)
    study.fit(deviation)
    fitted = replace(
        head, knots=tuple(map(float, knots)), terms=study.terms,
        coefficients=_rows(study.coefficients.reshape(len(study.terms), -1)), covariance=_rows(study.covariance),
        deviation=deviation, ranges=_ranges(members), runs=len(members), conditions=len(set(study.conditions)),
    )  # fmt: skip
    return _checked(fitted, study)


def _steady(rates: Sequence[float], errors: Array) -> float:
    """Learning rate from which on runs do not follow the law: infinite if all do."""
    known = np.isfinite(errors)
    order = np.argsort(np.array(rates)[known])
    sorted_rates, off = np.array(rates)[known][order], np.abs(errors[known][order])
    for first in range(len(off) - SEVERAL + 1):
        if np.median(off[first:]) > LOOSE >= np.median(off[:first] if first else np.inf):
            return float(sorted_rates[first])
    return math.inf


Solution = tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]
"""Coefficients and their covariance."""


@dataclass(frozen=True)
class _Member:
    """A run of the study."""

    course: Course
    along: Walk
    condition: tuple[object, ...]


def _members(found: Sequence[tuple[Course, Walk]]) -> list[_Member]:
    """With what is left out at once: runs that differ in rate and seed only; of few conditions, those in seed only."""
    labels = [condition(course) for course, _ in found]
    if len(set(labels)) < SEVERAL:
        labels = [(*label, course.rate) for label, (course, _) in zip(labels, found, strict=True)]
    return [_Member(course, along, label) for (course, along), label in zip(found, labels, strict=True)]


class _Study:
    """The law fitted to runs: coefficients and their covariance, also without some of the runs."""

    def __init__(self, members: Sequence[_Member], terms: tuple[str, ...], knots: Array) -> None:
        self.members, self.terms, self.knots = members, terms, knots
        self.columns = [TERMS.index(term) for term in terms]
        self.precision = prior(terms, knots)
        self.middle = np.concatenate([expected(knots) if t == "norm" else np.zeros(len(knots)) for t in terms])
        self.coefficients = self.middle
        self.covariance = np.linalg.inv(self.precision)
        self.conditions = [member.condition for member in members]

    def fit(self, deviation: Deviation) -> None:
        """Generalised least squares at these deviations, a few Gauss-Newton steps."""
        for _ in range(ROUNDS):
            self.rows = self._rows()
            self.squares, self.rights = [], []
            for member, (now, at, design, off) in zip(self.members, self.rows, strict=True):
                target = np.column_stack([design, off + design @ self.coefficients])
                solved = np.linalg.solve(_spread(member.along, now, at, deviation), target)
                self.squares.append(design.T @ solved[:, :-1])
                self.rights.append(design.T @ solved[:, -1])
            before = self.coefficients
            self.coefficients, self.covariance = self.without(())
            if np.abs(self.coefficients - before).max() < 1e-3:
                break

    def without(self, out: Sequence[int]) -> Solution:
        """Coefficients and their covariance without some runs."""
        kept = [index for index in range(len(self.members)) if index not in out]
        covariance = np.linalg.inv(self.precision + sum(self.squares[index] for index in kept))
        return covariance @ (self.precision @ self.middle + sum(self.rights[index] for index in kept)), covariance

    def blind(self) -> list[Solution]:
        """For each run the solution without its condition."""
        found = {
            key: self.without([index for index, own in enumerate(self.conditions) if own == key])
            for key in dict.fromkeys(self.conditions)
        }
        return [found[key] for key in self.conditions]

    def _rows(self) -> list[tuple[Track, Array, Array, Array]]:
        """Each run under the law; gains and design at its observed norms, and how far these are from the law."""
        walks = [member.along for member in self.members]
        table = self.coefficients.reshape(len(self.terms), -1)
        own = [each.z[:, self.columns] for each in walks]
        tracks = track(walks, [z @ table for z in own], [np.zeros(len(z)) for z in own], self.knots)
        found = []
        for now, z, each in zip(tracks, own, walks, strict=True):
            at = now.gain[each.seen]
            found.append((now, at, at @ now.design(z), each.observed - now.log2[each.seen]))
        return found

    def deviation(self, first: Deviation) -> Deviation:
        """Most likely deviations of the runs from the law fitted without their conditions."""
        parts = []
        rows = zip(self.members, self.rows, self.blind(), strict=True)
        for member, (now, at, design, off), (coefficients, covariance) in rows:
            missed = off - design @ (coefficients - self.coefficients)
            parts.append((member, now, at, missed, design @ covariance @ design.T))

        def unlikely(logs: Array) -> float:
            trial, total = _deviation(logs), 0.0
            for member, now, at, missed, known in parts:
                whole = _spread(member.along, now, at, trial) + known
                total += float(missed @ np.linalg.solve(whole, missed) + np.linalg.slogdet(whole)[1]) / 2
            return total + float(np.sum(np.square((logs - np.log(_PLAUSIBLE)) / 1.5))) / 2

        start = np.log(list(vars(first).values()))
        best = optimize.minimize(unlikely, start, method="Nelder-Mead", options={"maxiter": 150, "fatol": 0.05})
        return _deviation(best.x)


def _spread(along: Walk, now: Track, at: Array, deviation: Deviation) -> Array:
    """Covariance of a run's observed norms under the law."""
    own = deviation.covariance(along.logs, now.disagreement)
    return np.asarray(at @ own @ at.T + deviation.noise**2 * np.eye(len(at)))


_PLAUSIBLE = np.array([0.1, 0.1, 2.0, 0.01, 0.2])
"""Prior medians of a ``Deviation``, within a factor of 4 or so."""


def _deviation(logs: Array) -> Deviation:
    return Deviation(*map(float, np.exp(np.clip(logs, -8, 2))))


def _checked(fitted: Growth, study: _Study) -> tuple[Growth, Array]:
    """With scale and scatter of the forecasts of left-out runs, and the errors of those from ``JUDGED``, the condition
    left out."""
    count = len(study.members)
    errors, sds = _left_out(fitted, study, study.blind())
    alone, alone_sds = _left_out(fitted, study, [study.without([index]) for index in range(count)])
    scores = (errors / sds, alone / alone_sds)
    apart = np.array([each.course.momentum != fitted.centre["momentum"] for each in study.members] * len(FRACTIONS))
    judged = errors[FRACTIONS.index(JUDGED) * count : (FRACTIONS.index(JUDGED) + 1) * count]
    scatter = float(np.nanmedian(np.abs(judged))) if np.isfinite(judged).any() else math.nan
    own = [_own_error(member.course, fitted.layer) for member in study.members]
    reason = ""
    if not scatter <= LOOSE:
        reason = (
            f"the norms of the study's {fitted.optimizer} runs are not one function of the path: those of runs left "
            f"out are {scatter:.2f} octaves off"
        )
    scale, scale_apart = (max(_scale(each, own) for each in scores) for own in (~apart, apart))
    return replace(
        fitted, scale=scale, scale_apart=scale_apart, scatter=scatter, reason=reason,
        own_scatter=float(np.median(np.nan_to_num(own, nan=np.inf))), left_out=int(np.isfinite(errors).sum()),
    ), judged  # fmt: skip


def _left_out(fitted: Growth, study: _Study, solutions: Sequence[Solution]) -> tuple[Array, Array]:
    """Errors of the forecasts of every run by its solution from ``FRACTIONS``, [fractions x runs], and their standard
    deviations."""
    fits = [
        replace(fitted, coefficients=_rows(at.reshape(len(study.terms), -1)), covariance=_rows(covariance))
        for at, covariance in solutions
    ]
    walks, truth = [], []
    for fraction in FRACTIONS:
        for member in study.members:
            early = member.course.until(fraction * member.course.last)
            walks.append(walk(early, member.course.last, fitted.layer, fitted.centre))
            truth.append(float(member.along.observed[-1]))
    errors, sds = np.full((2, len(walks)), math.nan)
    use = [index for index, each in enumerate(walks) if each is not None]
    found = expectations([fits[index % len(fits)] for index in use], [each for each in walks if each is not None])
    for index, each in zip(use, found, strict=True):
        errors[index], sds[index] = each.mean - truth[index], each.sd * math.sqrt(max(each.surprise, 1.0))
    return errors, sds


def _own_error(course: Course, layer: str) -> float:
    """Of the run's own course carried on from ``JUDGED``, without sign."""
    found = own_course(course.until(JUDGED * course.last), course.last, layer)[0]
    norm = course.group_norm(layer)
    return abs(found - math.log2(norm[np.isfinite(norm)][-1]))


def _scale(scores: Array, own: NDArray[np.bool_]) -> float:
    """By which intervals are widened for runs like ``own``; of all where these are too few."""
    own = own if own.sum() >= SEVERAL * len(FRACTIONS) else np.ones_like(own)
    return max(float(np.nanquantile(np.abs(scores[own]), ALLOWED)) / NORMAL, LEAST_SCALE)


def _one_optimizer(courses: Sequence[Course]) -> tuple[str, list[Course]]:
    if not courses:
        raise UserError("growth: no runs were given")
    known = [course for course in courses if math.isfinite(course.momentum + course.weight_decay)]
    name = Counter(course.optimizer for course in known or courses).most_common(1)[0][0]
    return name, [course for course in known if course.optimizer == name]


def _centre(courses: Sequence[Course]) -> dict[str, float]:
    """Where covariates are 0: geometric means, and the most frequent momentum."""
    return {
        "batch": float(np.exp(np.mean(np.log([averaged(course) for course in courses])))),
        **{name: _mean([getattr(course, name) for course in courses]) for name in ("width", "vocab")},
        "momentum": Counter(course.momentum for course in courses).most_common(1)[0][0],
    }


def _mean(values: Sequence[float]) -> float:
    """Geometric, of what is known."""
    known = [value for value in values if value > 0]
    return float(np.exp(np.mean(np.log(known)))) if known else math.nan


def _terms(members: Sequence[_Member]) -> tuple[str, ...]:
    """Those in which the runs differ."""
    z = np.concatenate([member.along.z for member in members])
    return tuple(term for term, column in zip(TERMS, z.T, strict=True) if term == "norm" or np.ptp(column) > 1e-6)


def _ranges(members: Sequence[_Member]) -> dict[str, tuple[float, ...]]:
    courses = [member.course for member in members]
    values = {name: [getattr(c, name) for c in courses] for name in SPANNED}
    values["rate"] = [member.along.fastest for member in members]
    values["norm"] = [float(member.along.observed.max()) for member in members]
    return {name: (float(min(each)), float(max(each))) for name, each in values.items()}


def _rows(table: NDArray[np.floating[Any]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in table)
