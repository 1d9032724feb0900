"""What the runs so far say about the loss over learning rate, batch and tokens, and how sure that is. No torch.

    L = E + C K^-b (1 + g) + F B^-c + k(B, D) q(u - r),   r = a + alpha log2 B + delta log2 D + omega log2 B log2 D + h

with u = log2 of the rate, K = D / B steps, q a bowl that may be lopsided (Varian's linex loss, 1975), and g, h Gaussian
processes over (log2 B, log2 D) that let the levels and the optimal rate stray from their laws: what short horizons say
of long ones is worth less the farther they are. All parameters have priors, so a handful of runs will do; the
posterior is Gaussian about its mode (Laplace).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Place = tuple[float, float]
"""(log2 batch, log2 tokens)."""

LAWS = (
    "log E",
    "log C",
    "log b",
    "log F",
    "log c",
    "a",
    "alpha",
    "delta",
    "omega",
    "log k",
    "k batch",
    "k tokens",
    "skew",
)

EXPONENT = (math.log(0.4), 0.5)
"""Mean and standard deviation of log b and log c; see ``fit.surface``."""
OF_BATCH, OF_TOKENS = (0.5, 0.3), (-0.4, 0.25)
"""The same of alpha and delta: about what is published."""
CURVATURE = (math.log(0.015), 1.2)
"""The same of the logarithm of the curvature in nats per octave squared."""
STRAY_LEVEL, STRAY_RATE = 0.05, 0.2
"""Standard deviations of g (a share of C K^-b) and h (octaves)."""
FAR = 3.0
"""Octaves of batch or tokens over which the correlation of g and of h falls to 1/e."""
MISFIT = 0.25
"""Standard deviation of the bowl's misfit, as a share of a run's excess over the best of its cell: a run far off the
optimum tells little about where it is."""
ROBUST = 3.0
"""Residuals beyond so many standard deviations are made to count as so many."""
MEMORY = 0.5
"""Correlation of the noise of one run at horizons one doubling apart."""


@dataclass(frozen=True)
class Runs:
    """Losses of runs at horizons, one entry each; rate, batch and tokens in log2."""

    rate: Array
    batch: Array
    tokens: Array
    loss: Array
    noise: Array
    """Standard deviation of the loss of one run, in nats."""


class Belief:
    """The posterior.

    Args:
        runs: with finite losses, one at least.
        guess: (log2 rate, log2 batch, log2 tokens): about where the optimum is expected, to three octaves.
        places: where predictions will be asked for, besides those of the runs.
    """

    def __init__(self, runs: Runs, guess: tuple[float, float, float], places: Iterable[Place]) -> None:
        self.runs = runs
        seen = set(zip(runs.batch.tolist(), runs.tokens.tolist(), strict=True))
        self.places = sorted(seen | set(places))
        self._index = {place: i for i, place in enumerate(self.places)}
        self._at = np.array([self._index[p] for p in zip(runs.batch.tolist(), runs.tokens.tolist(), strict=True)])
        self.centre = (float(runs.batch.mean()), float(runs.tokens.mean()))
        self._grid = np.array(self.places) - np.array(self.centre)
        apart = np.abs(self._grid[:, None] - self._grid[None]).sum(axis=-1)
        self._root = np.linalg.cholesky(np.exp(-apart / FAR) + 1e-9 * np.eye(len(self.places)))
        least = np.full(len(self.places), math.inf)
        np.minimum.at(least, self._at, runs.loss)
        self._sd = np.hypot(runs.noise, MISFIT * (runs.loss - least[self._at]))
        self._whiten = self._whitening()
        self._mean, self._spread = self._prior(guess)
        self.mode = min((self._solve(start) for start in self._starts()), key=self._misfit)
        for _ in range(max(1, len(runs.loss) // 8)):  # the worst first: it makes its neighbours look bad
            outlier = np.abs(self._residuals()[0])
            worst = int(np.argmax(outlier))
            if outlier[worst] <= ROBUST:
                break
            self._whiten[worst] *= ROBUST / outlier[worst]
            self.mode = min((self._solve(start) for start in (self.mode, *self._starts())), key=self._misfit)
        residuals, freedom = self._residuals()
        self.excess = max(1.0, math.sqrt(float(residuals @ residuals) / len(residuals))) if freedom >= 3 else 1.0
        """How much larger the residuals are than the noise, 1 at least (Birge's ratio)."""
        jacobian = self._whiten @ self._model(self.mode)[1]
        self.covariance = np.linalg.inv(jacobian.T @ jacobian / self.excess**2 + np.diag(self._spread**-2.0))

    def _prior(self, guess: tuple[float, float, float]) -> tuple[Array, Array]:
        low, high = float(self.runs.loss.min()), float(np.quantile(self.runs.loss, 0.8))
        spread = max(high - low, 0.05 * low)
        (alpha, of_batch), (delta, of_tokens) = OF_BATCH, OF_TOKENS
        a = guess[0] + alpha * (self.centre[0] - guess[1]) + delta * (self.centre[1] - guess[2])
        laws = {
            "log E": (math.log(0.7 * low), 0.3), "log C": (math.log(0.3 * low), 1.5), "log b": EXPONENT,
            "log F": (math.log(0.5 * spread), 1.5), "log c": EXPONENT,
            "a": (a, 3.0), "alpha": (alpha, of_batch), "delta": (delta, of_tokens), "omega": (0.0, 0.05),
            "log k": CURVATURE, "k batch": (0.0, 0.2), "k tokens": (0.0, 0.2), "skew": (0.0, 0.4),
        }  # fmt: skip
        stray = len(self.places)
        mean = np.array([laws[name][0] for name in LAWS] + [0.0] * 2 * stray)
        return mean, np.array([laws[name][1] for name in LAWS] + [1.0] * 2 * stray)

    def _whitening(self) -> Array:
        """Turns residuals into independent ones of variance 1; the horizons of one run share noise."""
        same = (self.runs.rate[:, None] == self.runs.rate) & (self.runs.batch[:, None] == self.runs.batch)
        apart = np.abs(self.runs.tokens[:, None] - self.runs.tokens)
        cov = np.where(same, MEMORY**apart, 0.0) * np.outer(self._sd, self._sd)
        return np.asarray(np.linalg.inv(np.linalg.cholesky(cov)))

    def _model(self, values: Array) -> tuple[Array, Array]:
        """Losses of the runs and their derivatives."""
        return self._losses(values, self.runs.rate, self._at)

    def _losses(self, values: Array, rate: Array, at: NDArray[np.intp]) -> tuple[Array, Array]:
        """Losses at rates and indices of places, and their derivatives by the parameters."""
        level, by_level = self._levels(values, at)
        ridge, by_ridge = self._ridge(values, at)
        theta = dict(zip(LAWS, values, strict=False))
        v, t = self._grid[at].T
        k = np.exp(theta["log k"] + theta["k batch"] * v + theta["k tokens"] * t)
        q, slope, by_skew = _linex(rate - ridge, theta["skew"])
        jacobian = by_level - (k * slope)[:, None] * by_ridge
        for name, column in (("log k", k * q), ("k batch", k * q * v), ("k tokens", k * q * t), ("skew", k * by_skew)):
            jacobian[:, LAWS.index(name)] += column
        return level + k * q, jacobian

    def _levels(self, values: Array, at: NDArray[np.intp]) -> tuple[Array, Array]:
        """Losses at the best rate of each place."""
        theta = dict(zip(LAWS, values, strict=False))
        v, t = self._grid[at].T
        b, c = math.exp(theta["log b"]), math.exp(theta["log c"])
        steps = np.exp(theta["log C"] - b * math.log(2) * (t - v))
        stray = STRAY_LEVEL * self._root[at]
        g = stray @ values[len(LAWS) : len(LAWS) + len(self.places)]
        noise = np.exp(theta["log F"] - c * math.log(2) * v)
        jacobian = np.zeros((len(at), len(values)))
        jacobian[:, 0] = math.exp(theta["log E"])
        jacobian[:, 1] = steps * (1 + g)
        jacobian[:, 2] = -b * math.log(2) * (t - v) * steps * (1 + g)
        jacobian[:, 3] = noise
        jacobian[:, 4] = -c * math.log(2) * v * noise
        jacobian[:, len(LAWS) : len(LAWS) + len(self.places)] = steps[:, None] * stray
        return math.exp(theta["log E"]) + steps * (1 + g) + noise, jacobian

    def _ridge(self, values: Array, at: NDArray[np.intp]) -> tuple[Array, Array]:
        """log2 of the best rate of each place; linear in the parameters."""
        v, t = self._grid[at].T
        jacobian = np.zeros((len(at), len(values)))
        first = LAWS.index("a")
        jacobian[:, first : first + 4] = np.stack([np.ones_like(v), v, t, v * t], axis=1)
        jacobian[:, len(LAWS) + len(self.places) :] = STRAY_RATE * self._root[at]
        return jacobian @ values, jacobian

    def _starts(self) -> list[Array]:
        """Where the search for the mode begins: the prior's mean, and the same on a ridge through the lowest runs."""
        lowest: dict[int, tuple[float, float]] = {}
        for rate, at, loss in zip(self.runs.rate, self._at, self.runs.loss, strict=True):
            lowest[at] = min(lowest.get(at, (loss, rate)), (loss, rate))
        places = np.array(list(lowest))
        off = np.array([rate for _, rate in lowest.values()]) - self._ridge(self._mean, places)[0]
        other = self._mean.copy()
        other[LAWS.index("a")] += float(np.median(off))
        return [self._mean, other]

    def _misfit(self, values: Array) -> float:
        """Minus twice the logarithm of the posterior."""
        residual = self._whiten @ (self.runs.loss - self._model(values)[0])
        prior = (values - self._mean) / self._spread
        total = float(residual @ residual + prior @ prior)
        return total if math.isfinite(total) else math.inf

    def _solve(self, start: Array) -> Array:
        """A mode, by damped Gauss-Newton (Levenberg-Marquardt)."""
        values, damping, total = start, 1e-2, self._misfit(start)
        for _ in range(200):
            predicted, jacobian = self._model(values)
            whitened = self._whiten @ jacobian
            gradient = whitened.T @ (self._whiten @ (self.runs.loss - predicted))
            gradient -= (values - self._mean) / self._spread**2
            matrix = whitened.T @ whitened + np.diag(self._spread**-2.0)
            while damping < 1e8:
                step = np.clip(np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), gradient), -1, 1)
                found = self._misfit(values + step)
                if found < total:
                    break
                damping *= 5
            else:
                return values
            gain, values, total, damping = total - found, values + step, found, damping / 5
            if gain < 1e-6:
                return values
        return values

    def _residuals(self) -> tuple[Array, float]:
        """Independent residuals over their standard deviations after the fit, and their degrees of freedom."""
        predicted, jacobian = self._model(self.mode)
        whitened = self._whiten @ jacobian
        hat = whitened @ np.linalg.solve(whitened.T @ whitened + np.diag(self._spread**-2.0), whitened.T)
        left = np.maximum(1 - np.diag(hat), 1e-3)
        return self._whiten @ (self.runs.loss - predicted) / np.sqrt(left), float(left.sum())

    def _where(self, places: Sequence[Place]) -> NDArray[np.intp]:
        return np.array([self._index[place] for place in places], dtype=np.intp)

    def rate(self, place: Place) -> tuple[float, float]:
        """log2 of the best rate, and its standard deviation."""
        value, by = self._ridge(self.mode, self._where([place]))
        return float(value[0]), _sd(by[0], self.covariance)

    @property
    def curved(self) -> float:
        """Curvature of the bowl over its standard deviation."""
        index = LAWS.index("log k")
        return float(self.covariance[index, index] ** -0.5)

    def best(self, places: Sequence[Place]) -> int:
        """Index of the place with the least loss at its best rate."""
        return int(np.argmin(self._levels(self.mode, self._where(places))[0]))

    def behind(self, places: Sequence[Place]) -> Array:
        """By how many standard deviations the best loss of each place is above that of the best place."""
        values, by = self._levels(self.mode, self._where(places))
        first = int(np.argmin(values))
        return np.array(
            [
                _ratio(v - values[first], _sd(row - by[first], self.covariance))
                for v, row in zip(values, by, strict=True)
            ]
        )

    def after(self, target: Place, more: Sequence[tuple[float, Place]], noise: float) -> float:
        """Standard deviation of the best rate at ``target`` with more runs, (rate, place), of this noise."""
        row = self._ridge(self.mode, self._where([target]))[1][0]
        covariance = self.covariance
        for rate, place in more:
            where = self._where([place])
            value, by = self._losses(self.mode, np.array([rate]), where)
            sd = self.excess * math.hypot(noise, MISFIT * float(value[0] - self._levels(self.mode, where)[0][0]))
            told = covariance @ by[0]
            covariance = covariance - np.outer(told, told) / (sd**2 + by[0] @ told)
        return _sd(row, covariance)


def _sd(row: NDArray[Any], covariance: NDArray[Any]) -> float:
    return math.sqrt(max(float(row @ covariance @ row), 0.0))


def _ratio(difference: float, sd: float) -> float:
    return difference / sd if sd > 0 else (math.inf if difference > 0 else 0.0)


def _linex(off: Array, skew: float) -> tuple[Array, Array, Array]:
    """2 (exp(s o) - 1 - s o) / s^2 and its derivatives by o and s; o^2 where s is 0."""
    o = np.clip(off, -12, 12)
    z = np.clip(skew * o, -8, 8)
    small = np.abs(z) < 1e-3
    safe = np.where(small, 1.0, z)
    e = np.expm1(safe)
    ratio = np.where(small, 1 + z / 3 + z**2 / 12, 2 * (e - safe) / safe**2)
    slope = 2 * o * np.where(small, 1 + z / 2 + z**2 / 6, e / safe)
    by_skew = o**3 * np.where(small, 1 / 3 + z / 6, 2 * (e * safe - 2 * (e - safe)) / safe**3)
    return o**2 * ratio, slope, by_skew
