"""How the optima of a study move when its runs are resampled, each as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disco.fit._basin import NODES
from disco.fit._cells import Cell, Horizon
from disco.fit._joint import joint_moves
from disco.fit._optimum import Optimum, window
from disco.fit._smooth import bases

Array = NDArray[np.float64]
Columns = Mapping[str, np.ndarray]

KNOTS = 48


@dataclass(frozen=True)
class Resamples:
    """Optima in R resamples, by cell and by horizon in the order of the study. Rates, batches, norms are log2."""

    rate: Array
    """R x cells; NaN where a resample has no minimum."""
    side: NDArray[np.int_]
    """R x cells: +1 or -1 where it lies beyond the grid on that side (``rate`` is then the bound)."""
    norm: Array
    """R x cells."""
    smooth_batch: Array
    """R x horizons, and so below."""
    smooth_lr: Array
    smooth_norm: Array
    joint_lr: Array
    joint_batch: Array
    degrees: float
    """Degrees of freedom of the residuals that are resampled: points minus coefficients, horizons counted once."""
    seed: int


def resample(
    columns: Columns, norm: str, cells: Sequence[Cell], horizons: Sequence[Horizon], bootstraps: int, seed: int
) -> Resamples:
    """Refits every optimum to ``bootstraps`` resamples of the runs.

    A wild bootstrap over clusters (Cameron, Gelbach & Miller 2008, Rev. Econ. Stat. 90:414): learning rates are a
    design, not a sample, so they stay, and each run's residuals, divided by sqrt(1 - leverage), keep or change their
    sign, in all its horizons alike. Drawing runs with replacement instead would take a third of the learning rates
    from each cell, and with five left a fit is mostly chance. As the design stays, a cell's refits are one product of
    matrices.

    Args:
        columns: As for ``fit_table``. A column "run" says which rows are of one run; without it, those of one family,
            model, batch, learning rate and seed are, which errs on the wide side if they are not.
        norm: Column of the norm.
        cells: Of the study; rows are matched by family, model, tokens and batch.
        horizons: Of the study.
        bootstraps: Number R of resamples.
        seed: Of the signs.
    """
    rows = _Rows(columns, norm)
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1.0, 1.0]), size=(bootstraps, rows.runs))
    rate, norms, loss = (np.full((bootstraps, len(cells)), math.nan) for _ in range(3))
    side = np.zeros((bootstraps, len(cells)), dtype=int)
    spare: dict[tuple[str, str, int], list[float]] = {}
    for index, cell in enumerate(cells):
        at = rows.of.get((cell.family, cell.model, cell.tokens, cell.batch))
        if at is None:
            continue
        if cell.usable:
            low, high = rows.lr[at].min(), rows.lr[at].max()
            least, vertex, value = _resampled(rows, at, rows.lr[at], cell.lr, signs)
            moved = cell.lr.x + vertex
            side[:, index] = np.where(moved > high, 1, np.where(moved < low, -1, 0))
            rate[:, index], loss[:, index] = np.clip(moved, low, high), cell.loss + value
            spare.setdefault((cell.family, cell.model, cell.batch), []).append(least.spare)
        if cell.norm is not None and cell.norm.usable:
            known = at[np.isfinite(rows.norm[at])]
            norms[:, index] = cell.norm.x + _resampled(rows, known, rows.norm[known], cell.norm, signs)[1]
    smooth = [_horizon(item, cells, rate, norms, loss) for item in horizons]
    # Flanks bend at all horizons and sizes of a family alike, which moves their optima together.
    families = dict.fromkeys(item.family for item in horizons)
    bends = {family: rng.standard_normal((bootstraps, 2 * NODES)) for family in families}
    for item, moves in zip(horizons, smooth, strict=True):
        own = [at for key, at in rows.of.items() if key[:3] == (item.family, item.model, item.tokens)]
        at = np.concatenate(own) if own else np.empty(0, dtype=int)
        moves.extend(
            joint_moves(rows.lr[at], rows.batch[at], rows.loss[at], signs[:, rows.run[at]], bends[item.family])
        )
    degrees = float(sum(np.mean(each) for each in spare.values()))
    batch, lr, norm_there, joint_lr, joint_batch = (np.stack(part, axis=1) for part in zip(*smooth, strict=True))
    return Resamples(rate, side, norms, batch, lr, norm_there, joint_lr, joint_batch, max(degrees, 1.0), seed)


def _resampled(
    rows: _Rows, at: NDArray[np.int_], x: Array, found: Optimum, signs: Array
) -> tuple[_Minimum, Array, Array]:
    least = _Minimum(x, rows.loss[at], found)
    return least, *least.moves(signs[:, rows.run[at[least.use]]] * least.residual)


class _Rows:
    """The rows that lived, with their cell and their run."""

    def __init__(self, columns: Columns, norm: str) -> None:
        n = len(columns["lr"])
        loss = np.asarray(columns["loss"], dtype=float)
        gone = np.asarray(columns.get("diverged", np.zeros(n)), dtype=bool)
        keep = np.flatnonzero(np.isfinite(loss) & ~gone)
        # Whatever the order of the rows, runs get their signs in one order.
        names = ("family", "model", "batch", "lr", "seed")
        plain = {name: np.asarray(columns.get(name, np.full(n, "" if name == "family" else 0))) for name in names}
        keys = list(zip(*(plain[name][keep].tolist() for name in names), strict=True))
        order = sorted(range(len(keep)), key=lambda i: (keys[i], columns["tokens"][keep[i]], loss[keep[i]]))
        keep, keys = keep[order], [keys[i] for i in order]
        labels = np.asarray(columns["run"])[keep].tolist() if "run" in columns else keys
        number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        self.run = np.array([number[label] for label in labels], dtype=int)
        self.runs = len(number)
        self.lr, self.batch = (np.log2(np.asarray(columns[name], dtype=float)[keep]) for name in ("lr", "batch"))
        self.loss = loss[keep]
        self.norm = np.full(len(keep), math.nan)
        if norm in columns:
            with np.errstate(invalid="ignore", divide="ignore"):
                self.norm = np.log2(np.asarray(columns[norm], dtype=float)[keep])
        of: dict[tuple[str, str, int, int], list[int]] = {}
        for index, (row, key) in enumerate(zip(keep, keys, strict=True)):
            cell = (str(key[0]), str(key[1]), int(columns["tokens"][row]), int(columns["batch"][row]))
            of.setdefault(cell, []).append(index)
        self.of = {key: np.array(rows) for key, rows in of.items()}


class _Minimum:
    """A minimum found by ``optimum`` as a function of the losses, to first order.

    The curve is linear in the losses for the smoothness and the noise that the fit had, and its minimum moves by the
    change of slope there over the curvature (one Newton step).
    """

    def __init__(self, x: Array, y: Array, found: Optimum) -> None:
        grid = np.unique(x)
        self.use = np.flatnonzero(np.isin(x, grid[window(grid, found.x)]))
        x, y = x[self.use], y[self.use]
        low, high = x.min(), x.max()
        step = (high - low) / KNOTS
        knots = np.linspace(low, high, KNOTS, endpoint=False)
        cubic = found.model == "cubic"
        (polynomial, *_), (walk, *_) = bases(x, knots, step, found.x, cubic)
        null_at, walk_at = bases(np.array([found.x]), knots, step, found.x, cubic)
        sigma = found.sigma if found.sigma > 0 else 0.0
        square = max(sigma, 1e-6 * float(np.ptp(y)), 1e-12) ** 2
        scale = found.curvature**2
        inverse = np.linalg.inv(scale * walk @ walk.T + square * np.eye(len(x)))
        solve = np.linalg.pinv(polynomial.T @ inverse @ polynomial) @ polynomial.T @ inverse
        rest = np.eye(len(x)) - polynomial @ solve
        weights = scale * walk.T @ inverse @ rest
        self._value, self._slope, self._bend = (
            (a @ solve + b @ weights)[0] for a, b in zip(null_at, walk_at, strict=True)
        )
        missed = rest - walk @ weights
        square_of = missed @ missed.T
        self.spare = float(np.trace(square_of) ** 2 / max(np.trace(square_of @ square_of), 1e-300))
        """Degrees of freedom of the residuals (Satterthwaite)."""
        norm = np.sqrt(np.sum(missed**2, axis=1))
        self.residual = np.where(norm > 1e-6, missed @ y / np.maximum(norm, 1e-6), 0.0)
        """Residuals, scaled so that independent noise keeps its variance."""
        self.curvature, self.low, self.high = found.curvature, low - found.x, high - found.x

    def moves(self, changes: Array) -> tuple[Array, Array]:
        """Change of the minimum, NaN where there is none any more, and of the loss there, for changes of y (R x n)."""
        bend = 2 * self.curvature + changes @ self._bend
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = np.where(bend > 0.2 * self.curvature, -(changes @ self._slope) / bend, math.nan)
        return np.asarray(vertex), np.asarray(changes @ self._value)


def _horizon(item: Horizon, cells: Sequence[Cell], rate: Array, norms: Array, loss: Array) -> list[Array]:
    """Best batch, and the rate and norm there, in each resample."""
    own = [
        index
        for index, cell in enumerate(cells)
        if cell.usable and (cell.family, cell.model, cell.tokens) == (item.family, item.model, item.tokens)
    ]
    own.sort(key=lambda index: cells[index].batch)
    batches = np.log2([cells[index].batch for index in own])
    best = np.full(len(rate), item.smooth_batch)
    if item.over_batch is not None and item.over_batch.usable:
        grid = np.array([cells[index].loss for index in own])
        least = _Minimum(batches, grid, item.over_batch)
        vertex, _ = least.moves((loss[:, own] - grid)[:, least.use])
        best = item.smooth_batch + np.clip(vertex, least.low, least.high)
    return [best, _between(best, batches, rate[:, own]), _between(best, batches, norms[:, own])]


def _between(x: Array, grid: Array, values: Array) -> Array:
    """Linear interpolation of each row of ``values`` over ``grid`` at its own x; NaN outside, as for the study."""
    if len(grid) < 2:
        inside = np.isfinite(x) & (np.abs(x - grid[0]) < 1e-9) if len(grid) else np.zeros(len(x), dtype=bool)
        return np.where(inside, values[:, 0] if len(grid) else math.nan, math.nan)
    right = np.clip(np.searchsorted(grid, np.nan_to_num(x, nan=grid[0])), 1, len(grid) - 1)
    row = np.arange(len(x))
    share = (x - grid[right - 1]) / (grid[right] - grid[right - 1])
    low, high = values[row, right - 1], values[row, right]
    mixed = np.where(share == 0, low, np.where(share == 1, high, low + share * (high - low)))
    return np.where((x >= grid[0] - 1e-9) & (x <= grid[-1] + 1e-9), mixed, math.nan)
