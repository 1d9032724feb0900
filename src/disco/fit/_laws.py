"""Laws fitted to optima that are known in log2, some from one side only: errors, interaction, held-out horizons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from disco.errors import UserError
from disco.fit._regression import least_squares, tobit
from disco.fit._resample import Resamples
from disco.fit._result import Result
from disco.fit._rules import PowerLaw, power_law

Array = NDArray[np.float64]
Interval = tuple[float, float]

MIN_HORIZONS = 3
"""Numbers of tokens that a rule over tokens needs: with two, nothing can contradict it."""
MIN_CELLS = 5
"""Cells that a rule in batch and tokens needs: three parameters and two to tell the scatter."""
SIZES = ("parameters", "width", "depth")


@dataclass(frozen=True)
class Interaction(Result):
    """Change of the exponent of the batch per doubling of tokens: 0 where lr(batch, tokens) is a plane."""

    value: float
    standard_error: float
    interval: Interval
    """90%."""
    p_value: float
    """Of no interaction, two-sided, by Student's t."""


@dataclass(frozen=True)
class HeldOut(Result):
    """A rule fitted without one number of tokens, and how it predicts the optima there."""

    tokens: float
    n: int
    """Optima held out."""
    bias: float
    """Mean of measured minus predicted log2; NaN where the rest carries no rule."""
    error: float
    """Root mean square of the same, in octaves."""
    exponents: dict[str, float]
    """Of the rule without them."""


@dataclass(frozen=True)
class Rows:
    """Optima to fit: y and columns are log2, one entry per cell or horizon."""

    y: Array
    x: dict[str, Array]
    side: NDArray[np.int_]
    """0 measured, +1 or -1 known to lie above or below y."""
    draws: Array | None = None
    """Resamples of y, R x n."""
    draw_sides: NDArray[np.int_] | None = None

    @property
    def measured(self) -> Rows:
        return self.take(self.side == 0)

    def take(self, keep: NDArray[np.bool_]) -> Rows:
        draws = None if self.draws is None else self.draws[:, keep]
        sides = None if self.draw_sides is None else self.draw_sides[:, keep]
        return Rows(self.y[keep], {name: x[keep] for name, x in self.x.items()}, self.side[keep], draws, sides)

    def only(self, names: Iterable[str]) -> Rows:
        return replace(self, x={name: self.x[name] for name in names})


def rows_of(y: Sequence[float], x: Mapping[str, Sequence[float]], side: Sequence[int] | None = None) -> Rows:
    sides = np.zeros(len(y), dtype=int) if side is None else np.array(side, dtype=int)
    return Rows(np.array(y, dtype=float), {n: np.log2(np.asarray(c, dtype=float)) for n, c in x.items()}, sides)


def fit_rows(rows: Rows, interactions: bool = False) -> PowerLaw:
    """The law of optima given in log2."""
    x = {name: 2.0**column for name, column in rows.x.items()}
    if interactions:
        x = {name: x[name] for name in ("batch", "tokens")}
    return power_law(2.0**rows.y, x, interactions=interactions, censored=rows.side)


def with_resamples(
    law: PowerLaw, rows: Rows, resamples: Resamples | None, product: bool = False
) -> tuple[PowerLaw, Array | None]:
    """The law with standard errors from resampled runs, and the resampled coefficients (NaN: no rule).

    The optima of a resample differ by the noise of the runs, correlated between horizons as the runs make it. What
    scatter around the law remains beyond that (the law's misfit, lopsided bowls) is added to each optimum anew.
    """
    if resamples is None or rows.draws is None or len(rows.draws) < 20:
        return law, None
    columns = [rows.x[name] for name in (("batch", "tokens") if product else rows.x)]
    if product:
        columns.append(columns[0] * columns[1])
    design = np.stack([np.ones(len(rows.y)), *columns], axis=1)
    seen = rows.side == 0
    moved = rows.draws[:, seen] - rows.y[seen]
    noise = least_squares(design[seen], moved)[1]
    noise = noise[np.isfinite(noise)]
    explained = float(np.mean(np.sort(noise)[: max(1, int(0.98 * len(noise)))])) if len(noise) else 0.0
    misfit = math.sqrt(max(law.scatter**2 - explained, 0.0))
    rng = np.random.default_rng([resamples.seed, 1])
    draws = rows.draws + misfit * rng.standard_normal(rows.draws.shape) * seen
    sides = np.zeros(draws.shape, dtype=int) if rows.draw_sides is None else rows.draw_sides
    censored = np.any(sides != 0) and law.censored > 0
    coefficients = tobit(design, draws, sides)[0] if censored else least_squares(design, draws)[0]
    found = np.isfinite(coefficients).all(axis=1)
    if found.mean() < 0.9:
        note = "too many resamples carry no rule; standard errors are from the scatter of the points"
        return replace(law, warnings=(*law.warnings, note)), None
    covariance = np.cov(coefficients[found].T)
    chance = np.linalg.pinv(design[seen].T @ design[seen], hermitian=True)
    share = float(np.mean(np.diag(misfit**2 * chance)[1:] / np.diag(covariance)[1:]))
    # Satterthwaite (1946, Biometrics Bull. 2:110): the two parts of the variance know their own size differently well.
    share = min(share, 1.0)
    degrees = 1 / (share**2 / max(law.freedom, 0.5) + (1 - share) ** 2 / resamples.degrees)
    error = np.sqrt(np.diag(covariance))
    resampled = replace(
        law,
        standard_errors={name: float(value) for name, value in zip(law.exponents, error[1:], strict=True)},
        intercept_error=float(error[0]),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        misfit=misfit,
        bootstraps=int(found.sum()),
        degrees=degrees,
    )
    return resampled, coefficients


def interaction(rows: Rows, resamples: Resamples | None) -> Interaction | None:
    """Of batch and tokens, other columns left out; None where the optima do not form a grid that tells it."""
    if len(rows.measured.y) < MIN_CELLS + 1 or set(rows.x) != {"batch", "tokens"}:
        return None
    try:
        law = fit_rows(rows, interactions=True)
    except UserError:
        return None
    if not all(map(math.isfinite, law.standard_errors.values())):
        return None
    law, _ = with_resamples(law, rows, resamples, product=True)
    value, error = law.exponents["batch:tokens"], law.standard_errors["batch:tokens"]
    ratio = abs(value) / error if error > 0 else math.inf
    return Interaction(
        value,
        error,
        law.interval("batch:tokens"),
        float(2 * stats.t.sf(ratio, law.freedom if math.isnan(law.degrees) else law.degrees)),
    )


def held_out(rows: Rows) -> Iterator[HeldOut]:
    tokens = rows.x["tokens"]
    for out in np.unique(np.round(tokens[rows.side == 0], 6)):
        inside = np.abs(tokens - out) < 1e-5
        gone = rows.take(inside).measured
        rest = rows.take(~inside)
        if len({*np.round(rest.x["tokens"], 6)}) < 2 or len(rest.measured.y) <= len(rows.x) + 1:
            continue
        try:
            law = fit_rows(rest)
        except UserError:
            continue
        slopes = sum(law.exponents[name] * column for name, column in gone.x.items())
        off = gone.y - (law.intercept + slopes)
        yield HeldOut(2.0**out, len(off), float(off.mean()), float(np.sqrt(np.mean(off**2))), law.exponents)


def not_enough(rows: Rows, total: int) -> str:
    """Why these optima do not carry a rule in tokens, or in batch and tokens; empty when they do."""
    horizons = _distinct(rows.x, "tokens")
    if horizons >= MIN_HORIZONS and np.ptp(rows.y) < 1e-9:
        return f"not enough: all {len(rows.y)} optima are at the same grid point, too coarse to tell an exponent"
    sizes = len(set(rows.x) & set(SIZES))
    if "batch" not in rows.x:
        found = f"not enough: {horizons} of {total} horizons have an optimum and a best batch inside the grids"
        if horizons < MIN_HORIZONS:
            return f"{found}; needed: {MIN_HORIZONS}"
        need = MIN_HORIZONS + sizes
        return f"not enough: {len(rows.y)} optima over the models; needed: {need}" if len(rows.y) < need else ""
    batches = _distinct(rows.x, "batch")
    if len(rows.y) >= MIN_CELLS + sizes and batches > 1 and horizons >= MIN_HORIZONS:
        return ""
    found = (
        f"{len(rows.y)} of {total} cells have an optimum inside the grid, at {batches} batches and {horizons} horizons"
    )
    return f"not enough: {found}; needed: {MIN_CELLS + sizes} at 2 batches and {MIN_HORIZONS} horizons"


def _distinct(x: Mapping[str, Array], name: str) -> int:
    return len(np.unique(np.round(x[name], 9)))
