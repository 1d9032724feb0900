"""A log-quadratic of the loss over learning rate, ratios and batch at once, with draws for its intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from disco.fit._local_bowl import LocalFit, local_bowl

Array = NDArray[np.float64]
Axes = NDArray[np.intp]
"""Indices of axes."""
Interval = tuple[float, float]
Quantity = tuple[float, Interval | None]
"""A value and its interval."""

NOTHING: Quantity = (math.nan, None)


@dataclass(frozen=True)
class Axis:
    """One coordinate of the runs: log2 of the learning rate ("lr"), of a group's ratio, or of the "batch"."""

    name: str
    values: Array


def ratio_bowl(axes: Sequence[Axis], loss: Array, confidence: float) -> RatioBowl:
    """Fits the bowl to the runs near its minimum.

    Args:
        axes: "lr" first, "batch" last, ratios between them; an axis on which the runs do not differ takes no part.
        loss: Nats, finite.
        confidence: Level of the intervals.
    """
    used = [axis for axis in axes if np.ptp(axis.values) > 1e-6]
    x = np.stack([axis.values for axis in used], axis=1) if used else np.empty((len(loss), 0))
    names = [axis.name for axis in used]
    tried = {axis.name: len(np.unique(np.round(axis.values, 6))) for axis in used}
    fit = None
    if used and tried.get("lr", 3) >= 3:
        fit = local_bowl(x, loss, names)
    return RatioBowl(names, x, loss, fit, float(axes[-1].values[int(np.argmin(loss))]), confidence)


class RatioBowl:
    """The bowl and what follows from it. An axis whose minimum is not told, or lies beyond the runs, is held fixed."""

    def __init__(
        self, names: list[str], x: Array, loss: Array, fit: LocalFit | None, batch: float, confidence: float
    ) -> None:
        self.names, self.confidence, self.batch = names, confidence, batch
        self.flags: tuple[str, ...] = () if "lr" in names else ("one-rate",)
        self.known = fit is not None
        """Whether there is a minimum to speak of."""
        self._of: dict[str, tuple[str, ...]] = {}
        self.noise = self.loss = math.nan
        self.n = self.terms = 0
        self.assumed: tuple[str, ...] = ()
        if fit is None:
            self.flags += ("few-points",)
            return
        self.fit, self.n, self.terms, self.noise = fit, fit.n, fit.terms, fit.noise
        pairs = combinations(range(len(names)), 2)
        self.assumed = tuple(f"{names[i]} x {names[j]}" for i, j in pairs if not fit.has(i, j))
        self._settle(x, x[int(np.argmin(loss))])
        if self.known:
            self.loss = float(self._value(self.best)[0])
        if "batch" in names and self.known:
            self.batch = self.at("batch")

    def _settle(self, x: Array, lowest: Array) -> None:
        """Finds the minimum; holds axes fixed, one by one, until the others have one among the runs."""
        fit, d = self.fit, len(self.names)
        held = np.full(d, math.nan)
        low, high = x.min(axis=0) - fit.centre, x.max(axis=0) - fit.centre
        home = np.clip(lowest - fit.centre, low, high)
        for i in range(d):
            if not fit.has(i, i):
                held[i] = home[i]
                if self.names[i] == "lr":
                    return self._give_up("few-points")
                if self.names[i] != "batch":
                    self._of[self.names[i]] = ("few-points",)
        while True:
            free = np.flatnonzero(np.isnan(held))
            told = {i: float(np.mean(self._stiffness(i) > 0)) for i in map(int, free)}
            sure = self._minimum(free)
            self._valid = sure
            if self.names[0] == "lr" and told.get(0, 0.0) < self.confidence:
                return self._give_up("no-minimum")
            others = {i: part for i, part in told.items() if self.names[i] != "lr"}
            if not sure[0] or sure.mean() < self.confidence:
                if not others:
                    return self._give_up("no-minimum")
                worst = min(others, key=lambda i: (self.names[i] != "batch" or others[i] >= self.confidence, others[i]))
                held[worst] = home[worst]
                if self.names[worst] != "batch":
                    self._of[self.names[worst]] = ("flat" if self._stiffness(worst)[0] > 0 else "no-minimum",)
                continue
            best = self._solve(held)
            beyond = np.maximum(low - best[0], best[0] - high) / (high - low)
            beyond[~np.isnan(held)] = -1
            outer = [i for i in free if beyond[i] > 1e-9]
            if not outer:
                self.best, self.free = best, {int(i) for i in free}
                return None
            inner = [i for i in outer if self.names[i] != "lr"]
            side = max(inner or outer, key=lambda i: beyond[i])
            edge = "edge-low" if best[0, side] < low[side] else "edge-high"
            if self.names[side] == "lr":
                return self._give_up(f"{edge}-lr")
            if self.names[side] == "batch":
                self.flags += (f"{edge}-batch",)
            else:
                self._of[self.names[side]] = (edge,)
            held[side] = low[side] if edge == "edge-low" else high[side]

    def _give_up(self, flag: str) -> None:
        self.known = False
        self.flags += (flag,)

    def _minimum(self, free: Axes) -> NDArray[np.bool_]:
        """Per draw: whether the free axes have a minimum."""
        block = self.fit.hessian[:, free[:, None], free]
        return np.linalg.eigvalsh(block).min(axis=1) > 0 if len(free) else np.ones(len(block), dtype=bool)

    def _solve(self, held: Array) -> Array:
        """K x d: the minimum over the axes that are not held (NaN), in draws that have none of no meaning."""
        fit = self.fit
        free, fixed = np.flatnonzero(np.isnan(held)), np.flatnonzero(~np.isnan(held))
        result = np.broadcast_to(held, fit.slope.shape).copy()
        if len(free):
            pull = fit.slope[:, free] + fit.hessian[:, free[:, None], fixed] @ held[fixed]
            block = np.where(self._minimum(free)[:, None, None], fit.hessian[:, free[:, None], free], np.eye(len(free)))
            result[:, free] = -np.linalg.solve(block, pull[:, :, None])[:, :, 0]
        return result

    def _value(self, z: Array) -> Array:
        """K: the bowl at one point per draw."""
        fit = self.fit
        return fit.constant + np.sum(fit.slope * z, axis=1) + np.einsum("ki,kij,kj->k", z, fit.hessian, z) / 2

    def _stiffness(self, i: int) -> Array:
        """K: nats per octave squared of one axis, the learning rate tuned anew."""
        h = self.fit.hessian
        if i == 0 or self.names[0] != "lr":
            return np.asarray(h[:, i, i] / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(h[:, 0, 0] > 0, h[:, i, i] - h[:, 0, i] ** 2 / h[:, 0, 0], math.nan) / 2)

    def _quantity(self, values: Array, valid: NDArray[np.bool_]) -> Quantity:
        """The estimate and its interval; no interval where too few draws have the quantity."""
        if not valid[0]:
            return NOTHING
        drawn = values[1:][valid[1:]]
        if valid[1:].mean() < self.confidence:
            return float(values[0]), None
        low, high = np.quantile(drawn, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return float(values[0]), (float(low), float(high))

    def flags_of(self, name: str) -> tuple[str, ...]:
        """What is wrong with one ratio."""
        own = self._of.get(name, ())
        others = (flag for other, flags in self._of.items() if other != name for flag in flags)
        beside = ("beside-edge",) if name != "lr" and any(flag.startswith("edge") for flag in others) else ()
        return own or beside

    def optimum(self, name: str) -> Quantity:
        """Where the minimum is on one axis; nothing where that is not told or lies beyond the runs."""
        if not self.known or name not in self.names or self.names.index(name) not in self.free:
            return NOTHING
        i = self.names.index(name)
        return self._quantity(self.fit.centre[i] + self.best[:, i], self._valid)

    def at(self, name: str) -> float:
        """Where the minimum is on one axis, or where that was held."""
        i = self.names.index(name)
        return float(self.fit.centre[i] + self.best[0, i])

    def curvature(self, name: str) -> Quantity:
        """Nats per octave squared of a group's own rate. Of "lr": that of the reference alone, for which all ratios
        to it fall as it rises."""
        if self.n == 0 or name not in self.names or "few-points" in self.flags_of(name):
            return NOTHING
        along = np.array([float(axis == name) for axis in self.names])
        if name == "lr":
            along -= np.array([float(axis not in ("lr", "batch")) for axis in self.names])
        values: Array = np.einsum("i,kij,j->k", along, self.fit.hessian, along) / 2
        return self._quantity(values, np.ones(len(values), dtype=bool))

    def retuned(self, name: str) -> Quantity:
        """Nats per octave squared of a ratio, the learning rate tuned anew."""
        if not self.known or name not in self.names or "few-points" in self.flags_of(name):
            return NOTHING
        values = self._stiffness(self.names.index(name))
        return self._quantity(values, np.isfinite(values))

    def over_batch(self, name: str) -> Quantity:
        """Octaves that a best ratio moves per octave of batch, all rates tuned anew."""
        if not self.known or "batch" not in self.names or name not in self.names:
            return NOTHING
        i, b = self.names.index(name), self.names.index("batch")
        rates = np.array(sorted(self.free - {b}))
        if i not in self.free or not self.fit.has(i, b):
            return NOTHING
        return self._response(rates, b, int(np.flatnonzero(rates == i)[0]))

    def batch_shift(self, name: str) -> Quantity:
        """Octaves that the best batch moves per octave of a ratio, the learning rate tuned anew."""
        if not self.known or "batch" not in self.names or name not in self.names:
            return NOTHING
        i, b = self.names.index(name), self.names.index("batch")
        if not self.fit.has(b, b) or not self.fit.has(i, b):
            return NOTHING
        axes = np.array([0, b] if self.names[0] == "lr" else [b])
        return self._response(axes, i, len(axes) - 1)

    def _response(self, axes: Axes, mover: int, of: int) -> Quantity:
        """How far the minimum over ``axes`` moves, on the one at ``of``, per octave of another axis."""
        sure = self._minimum(axes)
        block = np.where(sure[:, None, None], self.fit.hessian[:, axes[:, None], axes], np.eye(len(axes)))
        moved = np.linalg.solve(block, self.fit.hessian[:, axes, mover][:, :, None])[:, of, 0]
        return self._quantity(np.asarray(-moved, dtype=float), sure)

    @property
    def batch_stiffness(self) -> float:
        """Nats per octave squared of batch, the learning rate tuned anew; NaN where that is not told."""
        b = self.names.index("batch") if self.known and "batch" in self.names else -1
        return float(self._stiffness(b)[0]) if b >= 0 and self.fit.has(b, b) else math.nan

    def cost_of(self, ratios: Mapping[str, float]) -> Quantity:
        """Nats that other ratios lose against the best ones, each at its best learning rate; ratios that are not told
        to matter (flat) are left where they were held."""
        if not self.known or all({"flat", "no-minimum", "few-points"} & set(self.flags_of(name)) for name in ratios):
            return NOTHING
        rates = [i for i in self.free if self.names[i] == "lr"]
        moved = self.best.copy()
        for name, value in ratios.items():
            i = self.names.index(name) if name in self.names else -1
            if i >= 0 and not {"flat", "no-minimum", "few-points"} & set(self.flags_of(name)):
                moved[:, i] = value - self.fit.centre[i]
        for i in rates:
            rest = moved.copy()
            rest[:, i] = 0
            pull = self.fit.slope[:, i] + np.einsum("kj,kj->k", self.fit.hessian[:, i], rest)
            moved[:, i] = -pull / np.where(self._valid, self.fit.hessian[:, i, i], 1.0)
        return self._quantity(self._value(moved) - self._value(self.best), self._valid)
