"""Where a loss curve has its minimum, how sure that is, and when there is none to report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from disco.errors import UserError
from disco.fit._flags import bounds, edges, too_low, valleys
from disco.fit._noise import Array, Contrasts, Noise, effective, weights
from disco.fit._parabola import Parabola
from disco.fit._result import Result
from disco.fit._smooth import Curve, curve

Indices = NDArray[np.intp]
Recipe = Literal["paper", "quadratic"]

PAPER_POINTS = 7
"""Runs in the paper's fit: those nearest in log2 norm to the lowest loss (arXiv:2510.03871)."""
LOCAL_POINTS = 5
"""Fewest distinct abscissae of the local fit, where the grid has so many."""
LOCAL_REACH = 1.5
"""Octaves on either side of the minimum within which all points join the local fit."""
LOCAL_FAR, LOCAL_ENOUGH = 2.1, 9
"""Points up to so many octaves away join as well, until there are so many distinct abscissae."""
FEW = 4
"""Fewest distinct abscissae with a finite loss; with less the curve cannot contradict the parabola."""


@dataclass(frozen=True)
class Optimum(Result):
    """Minimum of a loss over log2 learning rate or log2 norm."""

    x: float
    """Abscissa of the minimum (log2), NaN where there is none to report."""
    y: float
    """Loss at the minimum in nats, NaN likewise."""
    nearest: int | None
    """Index of the data point nearest to the minimum; without a minimum, of the lowest point."""
    interval: tuple[float, float] | None
    """Confidence interval of ``x``; None where the data do not bound it."""
    y_interval: tuple[float, float] | None
    """Confidence interval of ``y``."""
    curvature: float
    """Coefficient of x^2: being d octaves off the minimum costs curvature d^2 nats."""
    flags: tuple[str, ...]
    """Reasons not to take ``x`` for an optimum; empty when there are none. See ``optimum``."""
    n: int
    """Points in the fit."""
    effective: float
    """Their effective number after weighting (Kish)."""
    recipe: str
    model: str = "quadratic"
    """Polynomial of the fit: "cubic" when Akaike's criterion asks for it. The quadratic allows for lopsidedness too."""
    sigma: float = math.nan
    """Standard deviation of the noise of one run, as the fit sees it (nats); NaN with recipe "paper"."""

    @property
    def usable(self) -> bool:
        """Whether this is an optimum at all: a number without a flag."""
        return not self.flags and math.isfinite(self.x)


def optimum(
    x: ArrayLike,
    y: ArrayLike,
    sigma: ArrayLike | None = None,
    recipe: Recipe = "quadratic",
    anchor: float | None = None,
    *,
    confidence: float = 0.9,
    noise: float | Noise | None = None,
) -> Optimum:
    """Finds the minimum of a loss curve from a few noisy runs.

    Args:
        x: log2 of learning rate or of a norm, in any order, repeats allowed (seeds). A point without x is left out.
        y: Loss in nats. Not finite means that the run diverged: it takes no part in the fit but bounds the grid on
            its side, so the lowest loss next to it is not at an edge. Where such a run has no norm, x = inf or -inf
            says on which side it is.
        sigma: Standard deviation of each loss, used as relative weights; None or all 0: equal weights.
        recipe: "paper" is that of arXiv:2510.03871: least squares y = a x^2 + b x + anchor, weights 1/sigma^2, over
            the seven runs nearest to the lowest. It is a recipe, not an estimator: the fixed constant pulls the
            vertex, so its interval does not promise to cover the true minimum. "quadratic" has a free constant and
            is local: all points within 1.5 octaves of the minimum, up to 2.1 while there are fewer than nine distinct
            x, and at least the five nearest to it. Its
            polynomial is a parabola, or a cubic where AICc asks for it (Hurvich & Tsai 1989, Biometrika 76:297), and
            its interval allows for a curve that is neither, such as one with a flank steeper than the other, as far
            as published curves go. Points more than 3 standard deviations off the curve through the others lose
            weight. It has no x when its vertex lies outside the grid.
        anchor: Loss at x = 0, measured at step 0, where all norms are 1. Needed by "paper" and used by it only.
        confidence: Level of the intervals. "paper": Fieller's for x (a ratio of two estimates; Fieller 1954, J. R.
            Stat. Soc. B 16:175), Student's t by the residuals for y. "quadratic": posterior, see ``_smooth``.
        noise: Standard deviation of the loss of one run in nats, from outside these points, such as pooled over a
            study, with its degrees of freedom as ``Noise(sd, freedom)`` (a number: taken as exact). With five to
            seven points it makes the difference between an interval and a guess. Not used by "paper".

    Returns:
        The minimum. Its flags: "edge-low", "edge-high": the lowest distinct x is the first or last, or the vertex lies
        outside (with the optimum less than a spacing inside, that is often so by chance, and cannot be told from one
        outside: the interval then reaches beyond the end as well); "flat": the points do not bound the minimum at this
        confidence (or it opens downward by no more than the noise); "multi-modal": two local minima, with
        a barrier between them that the noise does not explain; "few-points": fewer than four distinct x; "no-minimum":
        the curve opens downward (or has too few points), or its vertex lies between the last run and one that diverged,
        or ("quadratic") so low that the runs beside it rule it out, as where losses jump (``_flags.too_low``).

    Raises:
        UserError: arrays of different length, an unknown recipe, the paper's without its anchor, or noise that is not
            positive.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    spread = None if sigma is None else np.asarray(sigma, dtype=float)
    if xs.ndim != 1 or ys.shape != xs.shape or (spread is not None and spread.shape != xs.shape):
        shapes = ", ".join(str(a.shape) for a in (xs, ys, spread) if a is not None)
        raise UserError(f"optimum: x, y and sigma must be vectors of one length, got shapes {shapes}")
    if recipe not in ("paper", "quadratic"):
        raise UserError(f"optimum: recipe must be 'paper' or 'quadratic', got {recipe!r}")
    if recipe == "paper" and (anchor is None or not math.isfinite(anchor)):
        raise UserError(f"optimum: recipe 'paper' needs anchor, the loss at step 0, got {anchor!r}")
    known = _known(noise)

    finite = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    if not len(finite):
        return _nothing(recipe, None, ("few-points", "no-minimum"))
    points = _Points(xs[finite], ys[finite], None if spread is None else spread[finite])
    low, high = bounds(points.grid, xs[~np.isnan(xs) & ~np.isfinite(ys)])
    flags = edges(points.lowest, points.grid, low, high)
    best = int(finite[np.argmin(ys[finite])])
    if len(points.grid) < FEW:
        flags.append("few-points")
    if len(points.grid) < (2 if recipe == "paper" else 3):
        return _nothing(recipe, best, (*flags, "no-minimum"))
    if recipe == "paper":
        found = _paper(points, xs[best], anchor, confidence)
    else:
        found, outliers = _local(points, known, confidence)
        rest = np.delete(np.arange(len(points.grid)), outliers)
        scan = points.grid[rest], points.mean[rest], points.runs[rest]
        flags += valleys(*scan, found.sigma, known)
        if found.curvature > 0 and too_low(*scan, (found.x, found.y), found.sigma, known):
            flags.append("no-minimum")
    flags += found.flags
    side = "edge-low" if found.x < points.grid[0] else "edge-high"
    inside = points.grid[0] <= found.x <= points.grid[-1]
    if not found.curvature > 0:
        flags.append("no-minimum")
    elif not low <= found.x <= high:
        flags += [side] if side not in flags else []
    elif not inside and side not in flags:
        flags.append("no-minimum")  # it lies between the last run and a diverged one: bracketed, but not measured
    found = replace(found, flags=tuple(flags), nearest=best)
    if not found.curvature > 0 or (recipe == "quadratic" and (not inside or "no-minimum" in flags)):
        return replace(found, x=math.nan, y=math.nan, interval=None, y_interval=None)
    distance = np.abs(xs[finite] - found.x)
    return replace(found, nearest=int(finite[np.lexsort((ys[finite], distance))[0]]))


def variants(
    x: ArrayLike, y: ArrayLike, sigma: ArrayLike | None = None, anchor: float | None = None,
    lr: ArrayLike | None = None, *, confidence: float = 0.9,
) -> dict[str, Optimum]:  # fmt: skip
    """The fit variants of arXiv:2510.03871 side by side, to see how much the choice matters.

    Each is a parabola by least squares: "<constant>, <weights>, <points>", such as "anchor, 1/sigma^2, 7 points", which
    is ``recipe="paper"``. Constants: "anchor" (fixed at the loss of step 0; only where that is given) and "free".
    Weights: "1/sigma^2" (only where a sigma is positive) and "equal". Points: the 5 or 7 nearest to the lowest, or all.
    Last comes "local", the default recipe. With ``lr`` (log2, beside the log2 norms ``x``) come those with a free
    constant again over the learning rate, named "lr: ...", their x being a log2 learning rate.

    Raises:
        UserError: arrays of different length.
    """
    spread = None if sigma is None else np.asarray(sigma, dtype=float)
    weighted = spread is not None and bool(np.any(spread > 0))
    result = {}
    axes: dict[str, tuple[ArrayLike, float | None]] = {"": (x, anchor)}
    if lr is not None:
        axes["lr: "] = (lr, None)
    for axis, (values, constant) in axes.items():
        for fixed in (constant, None) if constant is not None and math.isfinite(constant) else (None,):
            for weight in (spread, None) if weighted else (None,):
                for count in (5, PAPER_POINTS, None):
                    name = (
                        f"{axis}{'free' if fixed is None else 'anchor'}, "
                        f"{'equal' if weight is None else '1/sigma^2'}, {count or 'all'} points"
                    )
                    result[name] = _variant(values, y, weight, fixed, count, confidence)
        result[f"{axis}local"] = optimum(values, y, sigma, confidence=confidence)
    return result


def _nothing(recipe: str, nearest: int | None, flags: tuple[str, ...]) -> Optimum:
    return Optimum(math.nan, math.nan, nearest, None, None, math.nan, flags, 0, 0.0, recipe)


def _known(noise: float | Noise | None) -> Noise | None:
    if noise is None:
        return None
    known = noise if isinstance(noise, Noise) else Noise(float(noise), math.inf)
    if not (math.isfinite(known.sd) and known.sd > 0 and known.freedom > 0):
        raise UserError(f"optimum: noise must be a positive standard deviation, got {noise!r}; leave it out if unknown")
    return known


class _Points:
    """Finite points, and the means over runs of equal x."""

    def __init__(self, x: Array, y: Array, sigma: Array | None, floor: bool = True) -> None:
        self.x, self.y, self.sigma = x, y, sigma
        self.weight = weights(sigma, len(x), floor=floor)
        self.grid, self.index = np.unique(x, return_inverse=True)
        self.runs: Array = np.bincount(self.index, self.weight).astype(float)
        self.mean = np.bincount(self.index, self.weight * y) / self.runs
        self.squares = np.bincount(self.index, self.weight * (y - self.mean[self.index]) ** 2)
        self.repeats = np.bincount(self.index) - 1.0

    @property
    def lowest(self) -> int:
        return int(np.argmin(np.bincount(self.index, self.y) / np.bincount(self.index)))

    @property
    def constant(self) -> bool:
        """No curve at all, only rounding."""
        return bool(np.ptp(self.y) <= 1e-12 * np.max(np.abs(self.y)))


def _paper(points: _Points, centre: float, anchor: float | None, confidence: float) -> Optimum:
    near = np.argsort(np.abs(points.x - centre), kind="stable")[:PAPER_POINTS]
    sigma = None if points.sigma is None else points.sigma[near]
    return _of_parabola(Parabola(points.x[near], points.y[near], sigma, anchor), "paper", confidence)


def _of_parabola(fit: Parabola, recipe: str, confidence: float) -> Optimum:
    interval, flat = fit.interval(confidence)
    flags = ("flat",) if flat else ()
    value = fit.value_interval(confidence)
    return Optimum(fit.vertex, fit.value, None, interval, value, fit.a, flags, fit.n, fit.effective, recipe)


def _variant(
    x: ArrayLike, y: ArrayLike, sigma: Array | None, anchor: float | None, count: int | None, confidence: float
) -> Optimum:
    """One parabola over the ``count`` points nearest to the lowest, flagged as ``optimum`` does."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    whole = optimum(xs, ys, sigma)  # for the edges, which are of the grid
    finite = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    if len(finite) < (3 if anchor is None else 2):
        return replace(whole, recipe="variant")
    best = finite[np.argmin(ys[finite])]
    near = finite[np.argsort(np.abs(xs[finite] - xs[best]), kind="stable")[:count]]
    weight = None if sigma is None else sigma[near]
    found = _of_parabola(Parabola(xs[near], ys[near], weight, anchor), "variant", confidence)
    edges = [flag for flag in whole.flags if flag in ("edge-low", "edge-high", "few-points")]
    if not found.curvature > 0:
        return replace(found, x=math.nan, y=math.nan, interval=None, y_interval=None, flags=(*edges, "no-minimum"))
    nearest = int(finite[np.argmin(np.abs(xs[finite] - found.x))])
    return replace(found, nearest=nearest, flags=(*edges, *found.flags))


def contrasts(x: ArrayLike, y: ArrayLike) -> Contrasts | None:
    """What a scan says about the noise of its runs, for ``pooled_noise``; None where it has no minimum."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    finite = np.isfinite(xs) & np.isfinite(ys)
    points = _Points(xs[finite], ys[finite], None)
    if len(points.grid) < FEW or points.constant:
        return None
    found = _walk(points, None, 0.9)[0]
    return found.contrasts if math.isfinite(found.x) else None


def _local(points: _Points, known: Noise | None, confidence: float) -> tuple[Optimum, Indices]:
    """The local fit, its flags not complete, and the grid points that lost weight as outliers."""
    if points.constant:
        nothing = _nothing("quadratic", None, ("flat",))
        return replace(nothing, curvature=0.0, n=len(points.x), effective=len(points.x)), np.zeros(0, dtype=np.intp)
    found, cubic, use = _walk(points, known, confidence)
    turned = math.isfinite(found.x)
    x = found.x
    if found.curvature > 0 and not turned:  # it falls through all points: the minimum is beyond the last
        x = math.copysign(math.inf, -found.slope)
    if found.curvature > 0:
        inside = turned and points.grid[0] <= x <= points.grid[-1]
        flat = inside and found.interval is None and (known is not None or len(use) >= FEW)
    else:  # it opens downward, by more than the noise or not
        flat = len(use) >= FEW and Parabola(points.grid[use], points.mean[use], None).interval(confidence)[1]
    rows = np.isin(points.index, use)
    weight = points.weight[rows] * (found.weight / points.runs[use])[np.searchsorted(use, points.index[rows])]
    result = Optimum(
        x=x,
        y=found.y,
        nearest=None,
        interval=found.interval,
        y_interval=found.y_interval,
        curvature=found.curvature,
        flags=("flat",) if flat else (),
        n=int(rows.sum()),
        effective=effective(weight),
        recipe="quadratic",
        model="cubic" if cubic else "quadratic",
        sigma=found.sigma,
    )
    return result, use[found.weight < 0.99 * points.runs[use]]


def window(grid: Array, centre: float) -> Indices:
    """Indices of the sorted distinct x that join the local fit around ``centre``."""
    distance = np.abs(grid - centre)
    near = np.append(np.sort(distance), math.inf)
    reach = max(
        LOCAL_REACH, min(near[min(LOCAL_ENOUGH, len(grid)) - 1], LOCAL_FAR), near[min(LOCAL_POINTS, len(grid)) - 1]
    )
    return np.flatnonzero(distance <= reach + 1e-9)


def _walk(points: _Points, known: Noise | None, confidence: float) -> tuple[Curve, bool, Indices]:
    """The fit around its own vertex: it starts at the lowest point and moves until its points do not change. With it,
    whether it is a cubic, and the indices of its points in the grid."""
    grid, centre, seen = points.grid, float(points.grid[points.lowest]), []
    while True:
        use = window(grid, centre)
        found, cubic = _fit(points, use, known, confidence)
        ends = (int(use[0]), int(use[-1]))
        vertex = found.x if math.isfinite(found.x) else float(grid[use[0] if found.slope > 0 else use[-1]])
        if ends in seen or not found.curvature > 0 or not grid[0] <= vertex <= grid[-1]:
            return found, cubic, use
        seen.append(ends)
        centre = vertex


def _fit(points: _Points, use: Indices, known: Noise | None, confidence: float) -> tuple[Curve, bool]:
    x, y, runs = points.grid[use], points.mean[use], points.runs[use]
    within = float(points.squares[use].sum()), float(points.repeats[use].sum())
    outside = None if known is None else (known.sd, known.freedom)
    if _asks_for_cubic(x, y, runs, within, known):
        found = curve(x, y, runs, within, outside, True, confidence)
        if _asks_for_cubic(x, y, found.weight, within, known):  # not for the sake of one bad run
            return found, True
    return curve(x, y, runs, within, outside, False, confidence), False


def _asks_for_cubic(x: Array, y: Array, runs: Array, within: tuple[float, float], known: Noise | None) -> bool:
    """Whether AICc prefers a cubic to a parabola; with a known noise, whether AIC does."""
    if len(x) < 5:
        return False
    u, root = x - x.mean(), np.sqrt(runs)
    square = []
    for degree in (2, 3):
        design = np.vander(u, degree + 1) * root[:, None]
        residual = y * root - design @ np.linalg.lstsq(design, y * root)[0]
        square.append(float(residual @ residual))
    if known is not None:
        return square[0] - square[1] > 2 * known.sd**2 * (1 + 2 / known.freedom)
    n = len(x) + within[1]
    floor = 1e-24 * float(y @ y)
    criterion = [
        n * math.log((rss + within[0] + floor) / n) + 2 * k * n / (n - k - 1) if n > k + 1 else math.inf
        for rss, k in zip(square, (4, 5), strict=True)
    ]
    return criterion[1] < criterion[0]
