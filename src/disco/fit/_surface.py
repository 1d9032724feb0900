"""One model of the loss over steps, batch, learning rate and parameters, fitted to every run at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from disco.errors import UserError
from disco.fit._result import Result

Array = NDArray[np.float64]
Interval = tuple[float, float]

PRIOR = (math.log(0.4), 0.5)
"""Mean and standard deviation, in logarithms, of the exponents of steps, batch and parameters: with few horizons the
runs barely tell an exponent from the floor of the loss. 0.2 to 0.8 lies within 1.4 deviations."""
SIZE = 2.0
"""Standard deviation of the logarithm of C, F and A about a share of the range of losses: a term that runs do not
show stays finite."""
FLOOR = (math.log(0.7), 0.3)
"""The same for the floor E as a share of the least loss that was measured."""
LOPSIDED = 0.5
"""Standard deviation of the prior of the bowl's asymmetry, per octave."""
SLOPE = 0.5
"""Standard deviation of the prior of the learning rate's exponents about 0; published ones are within 1."""
START_NOISE = (0.1, 1.0)
"""Noise that the descents start with, as shares of the lower quartile of all excesses."""
OUTSIDE = 1.0
"""Octaves that a best rate may lie outside those swept at its number of tokens."""
SPARE = 10
"""Runs beyond the number of parameters that the model needs."""
DRAWS = 200


@dataclass(frozen=True)
class JointPrediction(Result):
    """Best learning rate and batch for one run, and the loss there. Rates and batches are log2."""

    lr: float
    batch: float
    loss: float
    lr_interval: Interval | None
    batch_interval: Interval | None
    loss_interval: Interval | None


@dataclass(frozen=True)
class Surface(Result):
    """L = E + A N^-a + C K^-b + F B^-c + k(D, N) q(log2 lr - log2 lr*(B, D, N)); see ``surface``."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    """In the units of the fit: logarithms about ``centre``."""
    draws: tuple[tuple[float, ...], ...]
    """The values refitted to resamples of whole runs."""
    centre: tuple[float, float, float]
    """Mean log2 of batch, tokens and parameters (0 where one size only was swept)."""
    residual: float
    """Robust standard deviation of the losses around the model near the optima, in nats."""
    n: int
    """Losses in the fit."""
    runs: int
    warnings: tuple[str, ...]

    def value(self, name: str) -> float:
        """One parameter."""
        return self.values[self.names.index(name)]

    def exponent(self, name: str, confidence: float = 0.9) -> tuple[float, Interval | None]:
        """ "batch(tokens)", "lr(batch)", "lr(tokens)" (at fixed batch), "lr(parameters)", "lr(batch:tokens)",
        "lr(tokens), best batch" with the interval over the resamples."""
        every = np.array([self.values, *self.draws])
        column = _exponent(dict(zip(self.names, every.T, strict=True)), name)
        return float(column[0]), _interval(column[1:], confidence)

    def loss(self, lr: ArrayLike, batch: ArrayLike, tokens: ArrayLike, parameters: ArrayLike = 1.0) -> Array:
        """Loss in nats (all arguments plain numbers)."""
        logs = np.broadcast_arrays(*(np.log2(np.asarray(v, dtype=float)) for v in (lr, batch, tokens, parameters)))
        theta = dict(zip(self.names, self.values, strict=True))
        return _loss(theta, logs[0], logs[1] - self.centre[0], logs[2] - self.centre[1], logs[3] - self.centre[2])

    def optimum(
        self, tokens: float, batch: float | None = None, parameters: float = 1.0, confidence: float = 0.9
    ) -> JointPrediction:
        """Best learning rate for ``tokens``, at a given batch or at the best one.

        Raises:
            UserError: a value is not positive.
        """
        if not (tokens > 0 and parameters > 0 and (batch is None or batch > 0)):
            raise UserError(f"surface: needs positive numbers, got {tokens=}, {batch=}, {parameters=}")
        every = np.array([self.values, *self.draws])
        theta = dict(zip(self.names, every.T, strict=True))
        d, n = math.log2(tokens) - self.centre[1], math.log2(parameters) - self.centre[2]
        b = _best_batch(theta, d) if batch is None else np.full(len(every), math.log2(batch) - self.centre[0])
        rate = _best_lr(theta, b, d, n)
        loss = _loss(theta, rate, b, np.full_like(b, d), np.full_like(b, n))
        b = b + self.centre[0]
        return JointPrediction(
            lr=float(rate[0]),
            batch=float(b[0]),
            loss=float(loss[0]),
            lr_interval=_interval(rate[1:], confidence),
            batch_interval=_interval(b[1:], confidence) if batch is None else None,
            loss_interval=_interval(loss[1:], confidence),
        )


def _interval(values: Array, confidence: float) -> Interval | None:
    if len(values) < 20 or not np.isfinite(values).mean() > 0.95:
        return None
    low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _exponent(theta: dict[str, Array], name: str) -> Array:
    of_steps, of_batch = np.exp(theta["log b"]), np.exp(theta["log c"])
    best = of_steps / (of_steps + of_batch)
    if name == "batch(tokens)":
        return best
    if name == "lr(tokens), best batch":
        return theta["lr tokens"] + theta["lr batch"] * best
    keys = {f"lr({key.removeprefix('lr ')})": key for key in theta if key.startswith("lr ")}
    if name not in keys:
        raise UserError(f"surface: no exponent {name!r}; there are {', '.join(('batch(tokens)', *keys))}")
    return theta[keys[name]]


def _best_batch(theta: Mapping[str, Array | float], d: Array | float) -> Array:
    """Centred log2 of the batch where C K^-b + F B^-c is least at K B = D."""
    b, c = np.exp(theta["log b"]), np.exp(theta["log c"])
    level = (theta["log F"] + theta["log c"] - theta["log C"] - theta["log b"]) / math.log(2)
    return np.asarray((level + b * d) / (b + c))


def _best_lr(theta: Mapping[str, Array | float], b: Array, d: Array | float, n: Array | float) -> Array:
    rate = theta["lr"] + theta["lr batch"] * b + theta["lr tokens"] * d
    if "lr batch:tokens" in theta:
        rate = rate + theta["lr batch:tokens"] * b * d
    return np.asarray(rate + theta["lr parameters"] * n if "lr parameters" in theta else rate)


def _loss(theta: Mapping[str, Array | float], u: Array, b: Array, d: Array, n: Array) -> Array:
    """b, d, n: centred log2 of batch, tokens and parameters; steps are tokens over batch."""
    two = math.log(2)
    terms = np.exp(theta["log C"] - np.exp(theta["log b"]) * two * (d - b))
    terms = terms + np.exp(theta["log F"] - np.exp(theta["log c"]) * two * b)
    curvature = theta["log k"] + theta["k tokens"] * d
    if "log A" in theta:
        terms = terms + np.exp(theta["log A"] - np.exp(theta["log a"]) * two * n)
        curvature = curvature + theta["k parameters"] * n
    off = np.clip(u - _best_lr(theta, b, d, n), -30, 30)
    return np.asarray(np.exp(theta["log E"]) + terms + np.exp(curvature) * _lopsided(off, theta["skew"]))


def _lopsided(off: Array, skew: Array | float) -> Array:
    """off^2 for skew 0, steeper on the side of its sign: 2 (exp(s u) - 1 - s u) / s^2 (Varian's linex loss, 1975)."""
    z = np.clip(skew * off, -30, 30)
    small = np.abs(z) < 1e-3
    ratio = np.where(small, 1 + z / 3 + z**2 / 12, 2 * (np.expm1(z) - z) / np.where(small, 1.0, z) ** 2)
    return np.asarray(off**2 * ratio)


def surface(
    lr: ArrayLike,
    batch: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    parameters: ArrayLike | None = None,
    run: ArrayLike | None = None,
    bootstraps: int = DRAWS,
    seed: int = 0,
) -> Surface:
    """Fits one model of the loss to all runs, the bad ones too.

    Steps K = D / B and batch B enter as separate terms, so that runs at a batch that is not the best still tell how
    the best one scales: the three-term law L = E + A N^-a + C K^-b + F B^-c (Schaipp 2026, arXiv:2607.01487), from
    which B* ~ D^(b / (b + c)). Off the best learning rate a lopsided bowl in log2 lr is added, whose place is a plane
    in log2 B, log2 D, log2 N with the product of the first two, and whose width may change with D and N.

    A residual is divided by (1 + e / t)^2, where e is the run's excess over the least loss at the same tokens and
    parameters (as the model expects it where that is below 4 t) and t the lower quartile of all excesses: a run three
    t above the best counts, but little, and one that nearly diverged hardly. The loss of the residuals is soft-L1, and
    weak priors hold the exponents (``PRIOR``, ``SLOPE``) and the floor (``FLOOR``). It descends from several starts
    (``START_NOISE``), the best rate amid the runs kept near those swept, and takes the end with the least misfit.

    The intervals know the noise of the runs and some of the model's misfit, that between horizons; they are honest only
    as far as the form holds (see benchmarks/coverage/rules.py for a truth of another form).

    Args:
        lr: Learning rates; one entry per run and horizon, here and below.
        batch: In tokens.
        tokens: Horizons.
        loss: In nats; entries without a finite loss are left out.
        parameters: Model sizes, if several.
        run: Which run each entry belongs to; None means that every entry is a run of its own.
        bootstraps: Resamples of whole runs, and of horizons and sizes, behind the intervals.
        seed: Of the resamples.

    Raises:
        UserError: arrays of different length, a value that is not positive, fewer than two batches or tokens, too
            few runs for the number of parameters, or a fit whose best rates are mostly outside those swept.
    """
    columns = [np.asarray(values, dtype=float) for values in (lr, batch, tokens, loss)]
    columns.append(np.ones_like(columns[0]) if parameters is None else np.asarray(parameters, dtype=float))
    labels = np.arange(len(columns[0])) if run is None else np.asarray(run)
    if any(c.ndim != 1 or c.shape != columns[0].shape for c in (*columns, labels)):
        raise UserError(f"surface: all columns must be vectors of one length, got {[c.shape for c in columns]}")
    for name, column in zip(("lr", "batch", "tokens", "parameters"), (*columns[:3], columns[4]), strict=True):
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            raise UserError(f"surface: {name} must be positive, got {column[bad[0]]} at index {bad[0]}")
    keep = np.isfinite(columns[3])
    order = np.lexsort([c[keep] for c in (columns[3], columns[0], columns[1], columns[2], columns[4])])
    u, b, d, y, n = (c[keep][order] if i == 3 else np.log2(c[keep][order]) for i, c in enumerate(columns))
    _, clusters = np.unique(labels[keep][order], return_inverse=True)
    return _Fit(u, b, d, y, n, clusters).result(bootstraps, seed)


class _Fit:
    """The nonlinear least squares behind ``surface``."""

    def __init__(self, u: Array, b: Array, d: Array, y: Array, n: Array, clusters: NDArray[np.int_]) -> None:
        if min(len(np.unique(b)), len(np.unique(d))) < 2 or len(np.unique(u)) < 3:
            raise UserError("surface: needs two batches, two numbers of tokens and three learning rates at least")
        self.centre = (float(b.mean()), float(d.mean()), float(n.mean()) if np.ptp(n) > 0 else 0.0)
        self.u, self.b, self.d, self.n = u, b - self.centre[0], d - self.centre[1], n - self.centre[2]
        self.y, self.clusters = y, clusters
        _, self.cells = np.unique(np.stack([d, n], axis=1), axis=0, return_inverse=True)
        least = np.full(self.cells.max() + 1, math.inf)
        np.minimum.at(least, self.cells, y)
        self.least = least[self.cells]
        self.floor = max(float(self.least.min()), 1e-3)
        excess = y - self.least
        self.scale = max(float(np.quantile(excess, 0.25)), 1e-6)
        self.by_excess = (1 + excess / self.scale) ** -2.0
        self.names = self._parameters(len(np.unique(b)), len(np.unique(d)), bool(np.ptp(n) > 0))
        if len(np.unique(clusters)) < len(self.names) + SPARE:
            raise UserError(
                f"surface: {len(self.names)} parameters need at least {len(self.names) + SPARE} runs, "
                f"got {len(np.unique(clusters))}"
            )
        self.start = self._start()

    @staticmethod
    def _parameters(batches: int, horizons: int, sizes: bool) -> tuple[str, ...]:
        names = [
            "log E", "log C", "log b", "log F", "log c", "lr", "lr batch", "lr tokens", "log k", "k tokens", "skew",
        ]  # fmt: skip
        if batches > 2 and horizons > 2:
            names.append("lr batch:tokens")
        if sizes:
            names += ["log A", "log a", "lr parameters", "k parameters"]
        return tuple(names)

    def _start(self) -> dict[str, float]:
        near = self.y - self.least <= np.quantile(self.y - self.least, 0.15)
        design = np.stack([np.ones(near.sum()), self.b[near], self.d[near], self.n[near]], axis=1)
        line = np.linalg.lstsq(design, self.u[near])[0]
        spread = max(float(np.ptp(self.least)), 4 * self.scale)
        off = self.u - np.mean(self.u)
        start = {
            "log E": math.log(self.floor) + FLOOR[0],
            "log C": math.log(spread / 2), "log b": PRIOR[0], "log F": math.log(spread / 4), "log c": PRIOR[0],
            "lr": float(np.clip(line[0], self.u.min(), self.u.max())), "lr batch": float(line[1]),
            "lr tokens": float(line[2]), "lr parameters": float(line[3]),
            "log k": math.log(self.scale / max(float(np.mean(off**2)), 1e-3)), "log A": math.log(spread / 2),
            "log a": PRIOR[0],
        }  # fmt: skip
        return {name: start.get(name, 0.0) for name in self.names}

    def _residuals(self, values: Array) -> Array:
        theta = dict(zip(self.names, values, strict=True))
        predicted = _loss(theta, self.u, self.b, self.d, self.n)
        return np.asarray((predicted - self.y) * self.weight / self.noise)

    def _priors(self, values: Array) -> Array:
        theta = dict(zip(self.names, values, strict=True))
        floor = (theta["log E"] - math.log(self.floor) - FLOOR[0]) / FLOOR[1]
        each = [(theta[name] - PRIOR[0]) / PRIOR[1] for name in ("log a", "log b", "log c") if name in theta]
        slopes = [theta[name] for name in self.names if name in ("k tokens", "k parameters", "lr batch:tokens")]
        each += [(theta[name] - self.start[name]) / SIZE for name in ("log A", "log C", "log F") if name in theta]
        exponents = [theta[name] / SLOPE for name in ("lr batch", "lr tokens", "lr parameters") if name in theta]
        return np.array([floor, *each, theta["skew"] / LOPSIDED, *slopes, *exponents])

    def _solve(self, start: Array) -> Array:
        def both(values: Array) -> Array:
            residual = self._residuals(values)
            soft = np.sign(residual) * np.sqrt(
                2 * (np.sqrt(1 + residual**2) - 1)
            )  # soft-L1 of the runs, not the priors
            return np.concatenate([soft, self._priors(values)])

        low, high = np.full(len(start), -math.inf), np.full(len(start), math.inf)
        place = self.names.index("lr")  # further out it is no valley; so far, and ``_check`` tells
        low[place], high[place] = self.u.min() - 2 * OUTSIDE, self.u.max() + 2 * OUTSIDE
        return np.asarray(least_squares(both, start, bounds=(low, high), x_scale="jac", max_nfev=400).x)

    def _weigh(self, values: Array) -> None:
        """Near the optima by the excess that the model expects, lest a run count more for having been lucky."""
        predicted = _loss(dict(zip(self.names, values, strict=True)), self.u, self.b, self.d, self.n)
        least = np.full(self.cells.max() + 1, math.inf)
        np.minimum.at(least, self.cells, predicted)
        seen, near = self.y - self.least, 4 * self.scale
        excess = np.where(seen > near, seen, np.minimum(predicted - least[self.cells], near))
        self.weight = (1 + excess / self.scale) ** -2.0

    def _descend(self, noise: float) -> tuple[Array, float, Array]:
        """Values, noise and weights where the fit from the start ends."""
        values = np.array(list(self.start.values()))
        self.noise, self.weight = noise, self.by_excess
        for _ in range(40):  # the scale of the soft loss is that of the residuals themselves
            values = self._solve(values)
            self._weigh(values)
            spread = float(np.median(np.abs(self._residuals(values)))) * self.noise / 0.6745
            if abs(spread / self.noise - 1) < 1e-4:
                break
            self.noise = max(spread, 1e-9)
        return values, self.noise, self.weight

    def _misfit(self, values: Array, noise: float) -> float:
        """What ``_solve`` minimises, with the noise and weights that all ends are compared by."""
        self.noise, self.weight = noise, self.by_excess
        residual, prior = self._residuals(values), self._priors(values)
        return float(np.sum(2 * (np.sqrt(1 + residual**2) - 1)) + prior @ prior)

    def _check(self, values: Array) -> None:
        """Raises UserError where the best rates are far outside those swept: it describes flanks, not the valley."""
        theta = dict(zip(self.names, values, strict=True))
        outside = []
        for cell in range(self.cells.max() + 1):
            own = self.cells == cell
            b, d, n = self.b[own], self.d[own][:1], self.n[own][:1]
            best = _best_lr(theta, np.clip(_best_batch(theta, d), b.min(), b.max()), d, n)[0]
            outside.append(not self.u[own].min() - OUTSIDE <= best <= self.u[own].max() + OUTSIDE)
        if np.mean(outside) > 0.5:
            raise UserError(
                f"surface: the fit found no valley: its best rates are outside those swept at {sum(outside)} of "
                f"{len(outside)} horizons; sweep rates on both sides of the best one"
            )

    def result(self, bootstraps: int, seed: int) -> Surface:
        ends = [self._descend(share * self.scale) for share in START_NOISE]
        values, self.noise, self.weight = min(ends, key=lambda end: self._misfit(end[0], min(e[1] for e in ends)))
        self._check(values)
        draws = self._resample(values, bootstraps, seed)
        theta = dict(zip(self.names, values, strict=True))
        near = self.y - self.least <= self.scale
        off = (self.y - _loss(theta, self.u, self.b, self.d, self.n))[near]
        return Surface(
            names=self.names,
            values=tuple(map(float, values)),
            draws=tuple(tuple(map(float, row)) for row in draws),
            centre=self.centre,
            residual=float(np.median(np.abs(off)) / 0.6745),
            n=len(self.y),
            runs=int(self.clusters.max()) + 1,
            warnings=tuple(self._warnings(theta)),
        )

    def _resample(self, values: Array, bootstraps: int, seed: int) -> Array:
        """One Gauss-Newton step per resample (a score bootstrap: Kline & Santos 2012, J. Econom. Methods 1:23).

        Every run gets the weight of a multinomial draw, in all its horizons alike, on its score as it is without the
        run's own pull on the fit (the cluster jackknife's correction CR3; Bell & McCaffrey 2002): a dozen parameters
        rest on few runs near the optima. Every (tokens, parameters) gets an exponential weight on top: where the model
        does not fit, its misfit goes by horizon and size, and runs alone would not show it.
        """
        if not bootstraps:
            return np.empty((0, len(values)))
        residual, jacobian = self._residuals(values), _jacobian(self._residuals, values)
        of_prior = _jacobian(self._priors, values)
        # Score and curvature of soft-L1, r (1 + r^2)^-1/2 and (1 + r^2)^-3/2, written as those of least squares.
        spread = 1 + residual**2
        residual, jacobian = residual * spread**0.25, jacobian * spread[:, None] ** -0.75
        inverse = np.linalg.pinv(jacobian.T @ jacobian + of_prior.T @ of_prior, hermitian=True)
        runs, cells = int(self.clusters.max()) + 1, int(self.cells.max()) + 1
        by_run, by_cell = np.zeros((runs, len(values))), np.zeros((cells, len(values)))
        order = np.argsort(self.clusters, kind="stable")
        for run, rows in enumerate(np.split(order, np.cumsum(np.bincount(self.clusters))[:-1])):
            own = jacobian[rows]
            pull = own @ inverse @ own.T
            by_run[run] = own.T @ np.linalg.solve((1 + 1e-6) * np.eye(len(rows)) - pull, residual[rows])
        np.add.at(by_cell, self.cells, jacobian * residual[:, None])
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(runs, np.full(runs, 1 / runs), bootstraps) - 1.0
        extra = rng.standard_exponential((bootstraps, cells)) - 1.0
        return np.asarray(values - (drawn @ by_run + extra @ by_cell) @ inverse)

    def _warnings(self, theta: dict[str, float]) -> list[str]:
        warnings = []
        for key, word in (("log b", "steps"), ("log c", "batch"), ("log a", "parameters")):
            if key in theta and abs(theta[key] - PRIOR[0]) > 2 * PRIOR[1]:
                warnings.append(f"the exponent of {word}, {math.exp(theta[key]):.2f}, is far from those usually seen")
        best = _best_batch(theta, self.d)
        if np.mean((best < self.b.min()) | (best > self.b.max())) > 0.5:
            warnings.append("the best batch lies outside the grid for most runs: it is extrapolated")
        return warnings


def _jacobian(function: Callable[[Array], Array], values: Array) -> Array:
    columns = []
    for index, value in enumerate(values):
        step = np.zeros_like(values)
        step[index] = 1e-5 * max(1.0, abs(value))
        columns.append((function(values + step) - function(values - step)) / (2 * step[index]))
    return np.stack(columns, axis=1)
