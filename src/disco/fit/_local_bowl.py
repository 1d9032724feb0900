"""Least squares of a log-quadratic over several axes to the runs near its minimum, with draws of its coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REACH = 1.5
"""Octaves from the minimum, on every axis, within which all runs join the bowl."""
NEAREST = 5
"""Fewest distinct values of an axis on which the bowl rests, where the grid has so many."""
SPARE = 4
"""Runs that the bowl needs beyond its terms."""
ENOUGH = 10
"""The same for a part of the runs that is fitted in place of all."""
SUPPORT = 1e-3
"""Part of a term's length that the other terms must leave unexplained for it to be told."""
LOPSIDED = 0.2
"""Standard deviation of the prior of a cubic's coefficient relative to the curvature, per octave: Step Law's scans
(arXiv:2503.04715) have 0.16 in the median and 0.40 at the 95% quantile."""
SHARES = (0.7, 0.5, 0.35, 0.25)
"""Parts of the runs within reach that are tried alone."""
SHARPER = 1.0
"""Fall of the summed log variances that a smaller part must bring: a small one is as often luck."""
TRIES = 12
SETTLED = 0.05
"""Octaves by which the minimum may still move when the search for it ends."""
TINY = 1e-8
"""Least noise in nats: losses without any must not make the prior vanish."""
DRAWS = 2000


@dataclass(frozen=True)
class LocalFit:
    """The coefficients about a centre: first the estimate, then draws from their Student's distribution."""

    slope: Array
    """K x d."""
    hessian: Array
    """K x d x d."""
    constant: Array
    """K."""
    centre: Array
    """d."""
    noise: float
    n: int
    pairs: tuple[tuple[int, int], ...]
    """Second-order terms that the runs tell."""

    @property
    def terms(self) -> int:
        return 1 + len(self.centre) + len(self.pairs)

    def has(self, i: int, j: int) -> bool:
        return (min(i, j), max(i, j)) in self.pairs


def local_bowl(x: Array, y: Array, names: list[str]) -> LocalFit | None:
    """The bowl over the runs near its own minimum; over all of them where those do not determine it."""
    centre, follow = x[int(np.argmin(y))], np.zeros(x.shape[1])
    before: tuple[int, ...] = ()
    all_runs = np.ones(len(x), dtype=bool)
    solved = _solve(x, y, all_runs, centre, names)
    if solved is None:
        return None
    pairs = solved.pairs
    for _ in range(TRIES):
        near = (_solve(x, y, _near(x, centre, follow, names, widen), centre, names) for widen in (1.0, 1.5))
        local = next((each for each in near if each and each.stands_for(pairs)), None)
        solved = local or _solve(x, y, all_runs, centre, names)
        assert solved is not None
        _, slope, hessian = solved.parts(solved.coefficients[None])
        vertex = _vertex(slope[0], hessian[0], names)
        if vertex is None or np.any(centre + vertex < x.min(axis=0)) or np.any(centre + vertex > x.max(axis=0)):
            break
        if solved.chosen == before and np.abs(vertex).max() < SETTLED:
            break
        before, centre, follow = solved.chosen, centre + vertex, np.zeros(x.shape[1])
        if names[-1] == "batch" and len(names) > 1:
            follow[:-1] = -np.linalg.solve(hessian[0, :-1, :-1], hessian[0, :-1, -1])
    return _narrowed(x, y, solved, names).drawn(np.random.default_rng(0))


def _narrowed(x: Array, y: Array, wide: _Solved, names: list[str]) -> _Solved:
    """The fit to that share of the runs, those of the least fitted loss, that places the minimum most sharply.

    Octaves are no fair measure of near: two off cost much in a sensitive group, where the bowl is no bowl any more,
    and nothing in another. Where the misfit exceeds the noise, fewer runs say more.
    """
    _, _, (whole,) = wide.parts(wide.coefficients[None])
    if not np.linalg.eigvalsh(whole).min() > 0:
        return wide
    best, sharpest = wide, wide.blur(whole, names)
    for _ in range(2):  # the second time about the minimum that the first one found
        _, (slope,), (hessian,) = best.parts(best.coefficients[None])
        vertex = _vertex(slope, hessian, names)
        if vertex is None or not np.linalg.eigvalsh(hessian).min() > 0:
            return best
        centre = np.clip(best.centre + vertex, x.min(axis=0), x.max(axis=0))
        excess = np.einsum("ni,ij,nj->n", x - centre, hessian, x - centre)
        order = np.array(wide.chosen)[np.argsort(excess[list(wide.chosen)], kind="stable")]
        before = best
        for share in SHARES:
            use = np.zeros(len(x), dtype=bool)
            use[order[: round(share * len(order))]] = True
            solved = _solve(x, y, use, centre, names)
            if solved and solved.stands_for(wide.pairs) and (blur := solved.blur(whole, names)) < sharpest - SHARPER:
                best, sharpest = solved, blur
        if best is before:
            break
    return best


def _near(x: Array, centre: Array, follow: Array, names: list[str], widen: float) -> NDArray[np.bool_]:
    """Runs within reach of the centre in the batch, and in the own rate of every group of the best one at their batch.

    ``follow``: octaves that the best value on each axis moves per octave of the last.
    """
    away = x - centre
    away -= np.outer(away[:, -1], follow)
    use = np.ones(len(x), dtype=bool)
    for column in _own(away, names).T:
        distance = np.sort(np.abs(np.unique(np.round(column, 1))))
        reach = max(distance[min(NEAREST, len(distance)) - 1] + 0.1, REACH)
        use &= np.abs(column) <= reach * widen
    return use


def _own(x: Array, names: list[str]) -> Array:
    """The groups' own rates in place of their ratios to the reference, whose rate is "lr"."""
    shared = x[:, :1] if names[0] == "lr" else np.zeros((len(x), 1))
    return np.asarray(np.where([name in ("lr", "batch") for name in names], x, x + shared))


@dataclass(frozen=True)
class _Solved:
    """Least squares before the draws."""

    coefficients: Array
    root: Array
    """Of their covariance."""
    freedom: float
    noise: float
    centre: Array
    pairs: tuple[tuple[int, int], ...]
    chosen: tuple[int, ...]

    def parts(self, coefficients: Array) -> tuple[Array, Array, Array]:
        """Constant, slope and second derivatives of K sets of coefficients."""
        d = len(self.centre)
        hessian = np.zeros((len(coefficients), d, d))
        for column, (i, j) in enumerate(self.pairs, start=1 + d):
            hessian[:, i, j] += coefficients[:, column]
            hessian[:, j, i] += coefficients[:, column]
        return coefficients[:, 0], coefficients[:, 1 : 1 + d], hessian

    def stands_for(self, pairs: tuple[tuple[int, int], ...]) -> bool:
        """Whether this fit to a part of the runs tells what all of them do, with runs to spare."""
        terms = 1 + len(self.centre) + len(pairs)
        return set(pairs) <= set(self.pairs) and len(self.chosen) >= terms + ENOUGH

    def blur(self, hessian: Array, names: list[str]) -> float:
        """Sum of the logarithms of the variances of the minimum's rates, for curvatures given: those of few runs would
        make them sharp by luck."""
        d = len(self.centre)
        rates = np.arange(d - 1 if names[-1] == "batch" and d > 1 else d)
        root = np.linalg.solve(hessian[np.ix_(rates, rates)], self.root[1 + rates])
        return float(np.sum(np.log(np.sum(root**2, axis=1) + 1e-300)))

    def drawn(self, rng: np.random.Generator) -> LocalFit:
        stretch = np.sqrt(self.freedom / rng.chisquare(self.freedom, (DRAWS, 1)))
        normal = rng.standard_normal((DRAWS, self.root.shape[1])) @ self.root.T
        constant, slope, hessian = self.parts(
            np.concatenate([self.coefficients[None], self.coefficients + stretch * normal])
        )
        return LocalFit(slope, hessian, constant, self.centre, self.noise, len(self.chosen), self.pairs)


def _solve(x: Array, y: Array, use: NDArray[np.bool_], centre: Array, names: list[str]) -> _Solved | None:
    """The bowl over some runs; None where they are too few or do not even tell the slopes.

    Flanks differ in steepness, so a cubic in each group's own rate and in the batch joins, with a prior on its size
    relative to the curvature. It vanishes at ``centre`` up to the second order: there the bowl is read off.
    """
    s, d = x[use] - centre, x.shape[1]
    columns: list[Array] = []
    basis: list[Array] = []

    def told(column: Array) -> bool:
        rest = column.copy()
        for _ in range(2):  # once more, against rounding
            for unit in basis:
                rest -= (unit @ rest) * unit
        length = float(np.linalg.norm(rest))
        if length <= SUPPORT * float(np.linalg.norm(column)):
            return False
        basis.append(rest / length)
        columns.append(column)
        return True

    if not len(s) or not all(told(column) for column in (np.ones(len(s)), *s.T)):
        return None
    order = [(i, i) for i in range(d)] + list(combinations(range(d), 2))
    pairs = tuple((i, j) for i, j in order if told(s[:, i] * s[:, j]))
    if len(s) - len(columns) < SPARE:
        return None
    design, target = np.stack(columns, axis=1), y[use]
    plain = np.linalg.lstsq(design, target)[0]
    variance = float(np.sum((target - design @ plain) ** 2)) / (len(s) - len(columns))

    variance = max(variance, TINY**2)
    curved = {i: plain[1 + d + k] for k, (i, j) in enumerate(pairs) if i == j}
    size = LOPSIDED * np.abs([curved.get(i, 0.0) for i in range(d)])
    cubes = _own(s, names) ** 3 * size  # coefficients of unit prior deviation
    whole = np.concatenate([design, cubes], axis=1)
    for _ in range(3):  # the prior weighs by the noise, which the cubic lowers
        prior = np.diag(np.r_[np.zeros(design.shape[1]), np.full(d, math.sqrt(variance))])
        q, r = np.linalg.qr(np.concatenate([whole, prior]))
        inverse = np.linalg.inv(r)
        coefficients = inverse @ (q.T @ np.r_[target, np.zeros(len(prior))])
        taken = float(np.sum((whole @ inverse) ** 2))  # effective number of parameters
        freedom = max(len(s) - taken, 1.0)
        variance = max(float(np.sum((target - whole @ coefficients) ** 2)) / freedom, TINY**2)
    keep = slice(0, design.shape[1])
    noise = math.sqrt(variance)
    chosen = tuple(map(int, np.flatnonzero(use)))
    return _Solved(coefficients[keep], noise * inverse[keep], freedom, noise, centre, pairs, chosen)


def _vertex(slope: Array, hessian: Array, names: list[str]) -> Array | None:
    """The minimum, relative to the centre; where the batch has none, that of the rest at the centre's batch."""
    whole = np.arange(len(slope))
    for free in (whole, whole[:-1] if names[-1] == "batch" else whole):
        block = hessian[np.ix_(free, free)]
        if len(free) and np.linalg.eigvalsh(block).min() > 1e-12:
            result = np.zeros(len(slope))
            result[free] = -np.linalg.solve(block, slope[free])
            return result
    return None
