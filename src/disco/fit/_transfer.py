"""Is the optimal norm the same at every scale? A test that can answer yes, no, or cannot tell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from disco.errors import UserError
from disco.fit._result import Result
from disco.fit._rules import power_law

Verdict = Literal["transfers", "drifts", "cannot tell"]


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

    @property
    def constant(self) -> bool:
        """Whether a slope of 0 lies within the interval (weaker than "transfers")."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]


def norm_transfer(scale: ArrayLike, norm: ArrayLike, margin: float, confidence: float = 0.9) -> Transfer:
    """Tests whether an optimal norm stays put as a scale (tokens, width, depth) grows.

    An equivalence test: "transfers" when the whole interval of the slope lies inside plus or minus ``margin`` (two
    one-sided tests at (1 - confidence) / 2 each; Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657), "drifts" when
    it lies wholly outside, otherwise "cannot tell". Not seeing a slope is no proof of none.

    Args:
        scale: Positive values, one per optimum.
        norm: Optimal norms there (not their logarithms).
        margin: Largest slope, in octaves of norm per octave of scale, that would not matter; see ``margin_for``.
        confidence: Level of the interval.

    Raises:
        UserError: the margin is not positive, or the arrays cannot be fitted (see ``power_law``).
    """
    if not (math.isfinite(margin) and margin > 0):
        raise UserError(f"norm_transfer: margin must be a positive slope, got {margin}")
    n = len(np.asarray(scale))
    if n < 2 or len(np.unique(np.asarray(scale, dtype=float))) < 2:
        return Transfer(math.nan, None, margin, "cannot tell", n)
    law = power_law(norm, {"scale": scale})
    if law.freedom < 1:
        return Transfer(law.exponents["scale"], None, margin, "cannot tell", n)
    low, high = law.interval("scale", confidence)
    verdict: Verdict = "cannot tell"
    if -margin <= low and high <= margin:
        verdict = "transfers"
    elif low > margin or high < -margin:
        verdict = "drifts"
    return Transfer(law.exponents["scale"], (low, high), margin, verdict, n)


def margin_for(curvature: float, tolerance: float, octaves: float) -> float:
    """Slope of norm* whose drift over ``octaves`` of scale costs ``tolerance`` nats.

    Args:
        curvature: Nats per octave of norm squared around the optimum (``Optimum.curvature``).
        tolerance: Nats that would not matter.
        octaves: Range of the scale over which the norm is to be reused.
    """
    return math.sqrt(tolerance / curvature) / octaves
