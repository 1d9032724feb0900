"""Is the optimal norm the same at every scale? A test that can answer yes, no, or cannot tell."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from disco.errors import UserError
from disco.fit._result import Result
from disco.fit._rules import power_law

Array = NDArray[np.float64]
Verdict = Literal["transfers", "drifts", "cannot tell"]

POWER = 0.8
"""Chance of a firm verdict that counts as "would tell"."""
CORRELATION = 0.5
"""Correlation of the errors of optima an octave apart that come from the same runs, where it is not known."""
MOST = 1000
"""Optima beyond which no number is given: the slope is too near to the margin."""


@dataclass(frozen=True)
class Needed(Result):
    """What would turn "cannot tell" into a verdict, were the slope and the scatter as estimated."""

    verdict: Verdict
    """The verdict to expect: "transfers" if the estimated slope lies inside the margin, else "drifts"."""
    optima: int | None
    """Optima in all, over the same range of scales; None: more than a thousand."""
    octaves: float | None
    """Or octaves of scale in all, optima spaced as now; None likewise."""
    runs: int | None
    """Runs behind the additional ``optima``; None where the runs of one optimum are not known."""
    power: float


@dataclass(frozen=True)
class Transfer(Result):
    """Slope of log2 norm* against log2 scale, and what follows from it."""

    slope: float
    """Octaves of norm per octave of scale; NaN with fewer than two scales."""
    interval: tuple[float, float] | None
    """Confidence interval of the slope; None with fewer than three points."""
    margin: float
    """Slope, up or down, that would not matter."""
    verdict: Verdict
    n: int
    error: float = math.nan
    """Standard error of the slope, correlation counted."""
    scatter: float = math.nan
    """Standard deviation of log2 norm* around the line, in octaves."""
    needed: Needed | None = None
    """With "cannot tell": what would tell; None if there are too few points to say."""
    correlation: float = math.nan
    """That was assumed of the errors of optima an octave apart; NaN where none was, as with ``degrees``."""
    freedom: float = math.nan
    """Degrees of freedom behind ``interval``: fewer than optima minus two where errors are correlated."""

    @property
    def strain(self) -> float:
        """Farthest end of the interval over the margin: below 1 it transfers. Comparable between norms, whose margins
        differ, and so a rank of which transfers best; NaN without an interval."""
        return max(map(abs, self.interval)) / self.margin if self.interval else math.nan

    @property
    def constant(self) -> bool:
        """Whether a slope of 0 lies within the interval (weaker than "transfers")."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]


def norm_transfer(
    scale: ArrayLike, norm: ArrayLike, margin: float, confidence: float = 0.9, *, error: float | None = None,
    degrees: float | None = None, runs: float | None = None, shared: ArrayLike | None = None,
    correlation: float = CORRELATION,
) -> Transfer:  # fmt: skip
    """Tests whether an optimal norm stays put as a scale (tokens, width, depth) grows.

    An equivalence test: "transfers" when the whole interval of the slope lies inside plus or minus ``margin`` (two
    one-sided tests at (1 - confidence) / 2 each; Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657), "drifts" when
    it lies wholly outside, otherwise "cannot tell", with what would tell. Not seeing a slope is no proof of none.

    Horizons of one sweep share its runs, and their errors go up and down together: the scatter around the line is then
    too small and the slope too uncertain for the textbook's interval. A few optima cannot tell how much, so it is
    assumed (``shared``, ``correlation``) and the standard error and its degrees of freedom are corrected for it.

    Args:
        scale: Positive values, one per optimum.
        norm: Optimal norms there (not their logarithms).
        margin: Largest slope, in octaves of norm per octave of scale, that would not matter; see ``margin_for``.
        confidence: Level of the interval.
        error: Standard error of the slope by other means, such as resampling whole runs. The larger one counts, unless
            ``degrees`` says how well this one is known.
        degrees: Degrees of freedom of ``error``, which then stands alone: it is to know correlation and scatter, as the
            errors of resampled rules do (``PowerLaw.degrees``).
        runs: Runs behind one optimum, to say how many more runs would tell.
        shared: One label per optimum; those of equal label come from the same runs. None: any may that are at
            different scales (the first of every scale together, the second, and so on), which errs on the wide side;
            ``range(n)``: each has runs of its own, as models of different width have, and nothing is corrected.
        correlation: Of the errors of two optima of the same runs one octave apart, from 0 to below 1; d octaves apart
            it is that to the power of d. ``Noise.correlation`` of a study's cells is an estimate.

    Raises:
        UserError: margin or degrees are not positive, the correlation is not in [0, 1), labels do not match the optima,
            or the arrays cannot be fitted (see ``power_law``).
    """
    if not (math.isfinite(margin) and margin > 0):
        raise UserError(f"norm_transfer: margin must be a positive slope, got {margin}")
    if not 0 <= correlation < 1:
        raise UserError(f"norm_transfer: correlation must be at least 0 and below 1, got {correlation}")
    if degrees is not None and not degrees > 0:
        raise UserError(f"norm_transfer: degrees of freedom must be positive, got {degrees}")
    octaves = np.log2(np.asarray(scale, dtype=float)) if len(np.asarray(scale)) else np.zeros(0)
    n = len(octaves)
    if shared is not None and np.shape(shared) != (n,):
        raise UserError(f"norm_transfer: shared must have a label for each of {n} optima, got shape {np.shape(shared)}")
    if n < 2 or len(np.unique(octaves)) < 2:
        return Transfer(math.nan, None, margin, "cannot tell", n)
    law = power_law(norm, {"scale": scale})
    slope = law.exponents["scale"]
    if law.freedom < 1:
        return Transfer(slope, None, margin, "cannot tell", n)
    labels = _occurrence(octaves) if shared is None else np.asarray(shared)
    wider, freedom = _correlated(octaves, labels, correlation)
    spread = max(law.standard_errors["scale"] * wider, error or 0.0)
    known = correlation if correlation and len(np.unique(labels)) < n else math.nan
    if error is not None and degrees is not None:
        spread, freedom, known = error, degrees, math.nan
    half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * spread
    low, high = slope - half, slope + half
    verdict: Verdict = "cannot tell"
    needed = None
    if -margin <= low and high <= margin:
        verdict = "transfers"
    elif low > margin or high < -margin:
        verdict = "drifts"
    else:
        needed = _needed(octaves, slope, spread, margin, confidence, runs, freedom)
    return Transfer(slope, (low, high), margin, verdict, n, spread, law.scatter, needed, known, freedom)


def _occurrence(octaves: Array) -> NDArray[np.intp]:
    """0 for the first optimum at each scale, 1 for the second, and so on."""
    seen: Counter[float] = Counter()
    labels = []
    for x in np.round(octaves, 6).tolist():
        labels.append(seen[x])
        seen[x] += 1
    return np.array(labels, dtype=np.intp)


def _correlated(octaves: Array, labels: NDArray[Any], correlation: float) -> tuple[float, float]:
    """By what the standard error of a slope by least squares is to be multiplied, and its degrees of freedom.

    With V the correlation matrix of the errors, P the projection onto the residuals and c the slope's weights, the
    variance of the slope is c'Vc, and the mean square of the residuals has the expectation tr(PV) / (n - 2), in units
    of the variance of one error. Of its distribution the first two moments count (Satterthwaite 1946, Biometrics Bull.
    2:110).
    """
    n = len(octaves)
    apart = np.abs(np.subtract.outer(octaves, octaves))
    together = (labels[:, None] == labels) & (apart > 1e-9) | np.eye(n, dtype=bool)
    errors = np.where(together, np.power(correlation, apart), 0.0)
    design = np.stack([np.ones(n), octaves - octaves.mean()], axis=1)
    weights = np.linalg.pinv(design)
    left = (np.eye(n) - design @ weights) @ errors
    of_slope = float(weights[1] @ errors @ weights[1] / (weights[1] @ weights[1]))
    trace = float(np.trace(left))
    return math.sqrt(of_slope * (n - 2) / trace), trace**2 / float(np.trace(left @ left))


def transfers(
    scale: ArrayLike, norms: Mapping[str, ArrayLike], curvatures: Mapping[str, float], tolerance: float,
    planned: Sequence[float] = (), confidence: float = 0.9, runs: float | None = None,
    correlation: float = CORRELATION,
) -> dict[str, Transfer]:  # fmt: skip
    """The same test for several norms side by side, those that transfer best first (see ``Transfer.strain``).

    Args:
        scale: Positive values, one per optimum.
        norms: By name, log2 of the optimal norm at each scale; NaN where there is none, which is left out.
        curvatures: By name, nats per octave of norm squared around the optimum; norms without a positive one are
            left out, since nothing says what a drift of theirs would cost.
        tolerance: Nats that reusing the norm may cost.
        planned: Scales of runs to come, over which the norm is to be reused as well.
        confidence, runs, correlation: As for ``norm_transfer``, with the runs shared.
    """
    scales = np.asarray(scale, dtype=float)
    found = {}
    for name, values in norms.items():
        log2 = np.asarray(values, dtype=float)
        use, curvature = np.isfinite(log2), curvatures.get(name, math.nan)
        if use.sum() < 2 or not curvature > 0:
            continue
        margin = margin_for(curvature, tolerance, octaves_between(scales[use], planned))
        found[name] = norm_transfer(scales[use], 2 ** log2[use], margin, confidence, runs=runs, correlation=correlation)
    return dict(sorted(found.items(), key=lambda item: (math.isnan(item[1].strain), item[1].strain)))


def margin_for(curvature: float, tolerance: float, octaves: float) -> float:
    """Slope of norm* whose drift over ``octaves`` of scale costs ``tolerance`` nats.

    Args:
        curvature: Nats per octave of norm squared around the optimum (``Optimum.curvature``).
        tolerance: Nats that would not matter.
        octaves: Range of the scale over which the norm is to be reused; see ``octaves_between``.

    Raises:
        UserError: one of them is not positive.
    """
    if not (curvature > 0 and tolerance > 0 and octaves > 0):
        given = f"curvature {curvature}, tolerance {tolerance}, octaves {octaves}"
        raise UserError(f"margin_for: all three must be positive, got {given}")
    return math.sqrt(tolerance / curvature) / octaves


def octaves_between(fitted: ArrayLike, planned: Sequence[float] = ()) -> float:
    """Octaves that the fitted and the planned scales span together; without planned ones, one doubling beyond."""
    logs = np.log2(np.append(np.asarray(fitted, dtype=float), np.asarray(planned, dtype=float)))
    return float(np.ptp(logs)) + (0.0 if len(planned) else 1.0)


def _needed(
    octaves: np.ndarray, slope: float, error: float, margin: float, confidence: float, runs: float | None,
    freedom: float,
) -> Needed | None:  # fmt: skip
    if not error > 0:
        return None
    n, spread = len(octaves), float(np.var(octaves))
    sigma = error * math.sqrt(n * spread)
    distinct, span = len(np.unique(octaves)), float(np.ptp(octaves))
    step, per_scale = span / (distinct - 1), n / distinct

    def tells(optima: int, variance: float) -> bool:
        spread_of_slope = sigma / math.sqrt(optima * variance)
        return _power(abs(slope), spread_of_slope, margin, freedom / (n - 2) * (optima - 2), confidence) >= POWER

    more = _first(n + 1, lambda count: tells(count, spread))
    scales = _first(distinct + 1, lambda count: tells(round(per_scale * count), step**2 * (count**2 - 1) / 12))
    return Needed(
        verdict="transfers" if abs(slope) < margin else "drifts",
        optima=more,
        octaves=None if scales is None else span + step * (scales - distinct),
        runs=None if more is None or runs is None else math.ceil((more - n) * runs),
        power=POWER,
    )


def _first(least: int, tells: Callable[[int], bool]) -> int | None:
    """Smallest count from ``least`` to ``MOST`` that tells: more always tell better."""
    if least > MOST or not tells(MOST):
        return None
    return least + bisect.bisect_left(range(least, MOST), True, key=tells)


def _power(slope: float, error: float, margin: float, freedom: float, confidence: float) -> float:
    """Chance of a firm verdict when the true slope is this: of two one-sided t tests that both reject (an integral over
    the chi distribution of the estimated error, as in Phillips 1990, J. Pharmacokinet. Biopharm. 18:137), or of the
    one-sided test beyond the margin (noncentral t)."""
    critical = float(special.stdtrit(freedom, (1 + confidence) / 2))
    if slope > margin:
        return float(stats.nct.sf(critical, freedom, (slope - margin) / error))
    ratio = np.sqrt(2 * special.gammaincinv(freedom / 2, (np.arange(64) + 0.5) / 64) / freedom)  # chi, over its size
    upper = (margin - slope) / error - critical * ratio
    lower = -(margin + slope) / error + critical * ratio
    return float(np.mean(np.maximum(special.ndtr(upper) - special.ndtr(lower), 0.0)))
