"""Optima of the cells of a study, (family, model, batch, tokens), and the best batch for each number of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from disco.errors import UserError
from disco.fit._noise import Contrasts, Noise, pooled, pooled_noise, within_groups
from disco.fit._optimum import Optimum, contrasts, optimum
from disco.fit._result import Result

Columns = Mapping[str, np.ndarray]

NORMS = "norm/"
"""Prefix of the columns that are norms."""
REQUIRED = ("model", "batch", "lr", "tokens", "loss")
OPTIONAL = {
    "family": "",
    "width": math.nan,
    "depth": math.nan,
    "parameters": math.nan,
    "seed": 0,
    "sigma": math.nan,
    "loss_start": math.nan,
    "diverged": False,
}


@dataclass(frozen=True)
class Point(Result):
    """One learning rate of a cell, its seeds pooled: log2 norm and loss are means over the seeds that lived."""

    lr: float
    """log2 of the learning rate."""
    norm: float
    """log2 of the norm; NaN where it was not measured."""
    loss: float
    """NaN when every seed diverged."""
    sigma: float
    seeds: int
    """Seeds that lived."""
    lost: int
    """Seeds that diverged."""

    @property
    def diverged(self) -> bool:
        """Whether every seed diverged."""
        return not self.seeds


@dataclass(frozen=True)
class Cell(Result):
    """All runs of one model at one batch and horizon, and their optimum. Rates and norms are log2."""

    family: str
    model: str
    width: float
    depth: float
    parameters: float
    batch: int
    tokens: int
    points: tuple[Point, ...]
    lr: Optimum
    """Over log2 learning rate, log-quadratic. ``nearest`` indexes ``points``, here and below."""
    norm: Optimum | None
    """Over log2 norm, log-quadratic; None where no norm was measured."""
    paper: Optimum | None
    """Over log2 norm by the paper's recipe; None without a norm or a loss at step 0."""
    noise: float
    """Spread of the loss within the window of one run, in nats, pooled over the cell's runs."""
    seed_noise: float
    """Spread of the loss between seeds; NaN with one seed."""
    norms: dict[str, Optimum] = field(default_factory=dict)
    """The same as ``norm`` for every logged norm, by column."""
    run_noise: Noise | None = None
    """Standard deviation of the loss of one run, pooled over the cells of the model; the optima's intervals rest on it.
    None: each cell's own points only."""

    @property
    def usable(self) -> bool:
        """Whether the learning rate has an optimum here."""
        return self.lr.usable

    @property
    def lowest(self) -> Point:
        """The point of lowest loss that was measured."""
        return min(self.points, key=lambda point: math.inf if math.isnan(point.loss) else point.loss)

    @property
    def loss(self) -> float:
        """Loss at the optimum; the lowest measured one, an upper bound, where there is no optimum."""
        return self.lr.y if self.usable else self.lowest.loss

    @property
    def log2_norm(self) -> float:
        """The optimal norm; NaN where there is none."""
        return self.norm.x if self.norm is not None and self.norm.usable else math.nan

    def rate(self, recipe: str = "quadratic") -> float:
        """log2 of the optimal learning rate: the vertex, or by the paper's recipe that of the run nearest to the
        vertex in norm; NaN where there is no optimum."""
        if recipe == "quadratic":
            return self.lr.x if self.usable else math.nan
        if self.paper is None or not self.paper.usable or self.paper.nearest is None:
            return math.nan
        return self.points[self.paper.nearest].lr


@dataclass(frozen=True)
class Horizon(Result):
    """The best batch of one model for one number of tokens, and the optimum there. Rates and norms are log2."""

    family: str
    model: str
    width: float
    depth: float
    parameters: float
    tokens: int
    batch: int
    """Best batch of the grid, in tokens."""
    loss: float
    lr: float
    """Optimal learning rate at that batch; NaN where the cell has no optimum."""
    norm: float
    smooth_batch: float
    """log2 of the best batch between those of the grid: the vertex of loss over log2 batch; without one, the grid's."""
    smooth_lr: float
    """Optimal learning rate there, interpolated between the batches of the grid. Rules use these three."""
    smooth_norm: float
    batches: tuple[int, ...]
    over_batch: Optimum | None
    """Loss over log2 batch, log-quadratic; None with fewer than two optima."""
    flags: tuple[str, ...]
    """"edge-low", "edge-high" (the best batch is the smallest or largest), "one-batch", "no-optimum" (the best batch's
    own learning rates have no optimum)."""
    norms: dict[str, float] = field(default_factory=dict)
    """log2 of every logged norm's optimum, by column, as ``smooth_norm``; NaN where there is none."""
    curvatures: dict[str, float] = field(default_factory=dict)
    """Nats per octave of that norm squared, at the best batch of the grid; NaN likewise."""

    @property
    def at_edge(self) -> bool:
        """Whether a batch outside the grid may be better."""
        return "edge-low" in self.flags or "edge-high" in self.flags


def complete(columns: Columns, norm: str) -> dict[str, np.ndarray]:
    """The columns a fit needs, with missing optional ones filled in, and rows without an outcome left out.

    Raises:
        UserError: a required column is missing, lengths differ, or a rate, batch or horizon is not positive.
    """
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise UserError(f"fit: the table has no column {', '.join(missing)}; it has {', '.join(sorted(columns))}")
    n = len(columns["lr"])
    table = {name: np.asarray(columns.get(name, np.full(n, default))) for name, default in OPTIONAL.items()}
    table |= {name: np.asarray(columns[name]) for name in REQUIRED}
    table["norm"] = np.asarray(columns.get(norm, np.full(n, math.nan)), dtype=float)
    table |= {name: np.asarray(values, dtype=float) for name, values in columns.items() if name.startswith(NORMS)}
    for name, values in table.items():
        if len(values) != n:
            raise UserError(f"fit: column {name} has {len(values)} rows and lr has {n}; they must match")
    for name in ("lr", "batch", "tokens"):
        values = table[name].astype(float)
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise UserError(f"fit: column {name} must be positive, got {values[bad[0]]} in row {bad[0]}")
    table["diverged"] = table["diverged"].astype(bool)
    table["loss"] = np.where(table["diverged"], math.nan, table["loss"].astype(float))
    keep = np.flatnonzero(np.isfinite(table["loss"]) | table["diverged"])
    order = keep[np.lexsort([table[name][keep] for name in ("loss", "seed", "lr")])]  # whatever the order of the rows
    return {name: values[order] for name, values in table.items()}


def split(table: Columns, *names: str) -> Iterator[dict[str, np.ndarray]]:
    """The table in pieces of equal values of ``names``, in their order."""
    rows: dict[tuple[object, ...], list[int]] = {}
    for row, key in enumerate(zip(*(table[name].tolist() for name in names), strict=True)):
        rows.setdefault(key, []).append(row)
    for key in sorted(rows):
        yield {name: values[rows[key]] for name, values in table.items()}


def fit_cells(table: Columns) -> tuple[Cell, ...]:
    """All cells of a ``complete`` table, in the order of ``split``.

    The noise of a run is pooled over the cells of one family and model first, since the few points of a cell cannot
    tell it from their curve; see ``pooled_noise``.
    """
    pieces = list(split(table, "family", "model", "tokens", "batch"))
    groups: dict[tuple[str, str], list[int]] = {}
    for index, rows in enumerate(pieces):
        groups.setdefault((str(rows["family"][0]), str(rows["model"][0])), []).append(index)
    noise: list[Noise | None] = [None] * len(pieces)
    for indices in groups.values():
        some = [pieces[index] for index in indices]
        batch, tokens = ([float(rows[name][0]) for rows in some] for name in ("batch", "tokens"))
        windows = [pooled(rows["sigma"].astype(float)) for rows in some]
        found = pooled_noise([_contrasts(rows) for rows in some], batch, tokens, batch, windows)
        for index, known in zip(indices, found, strict=True):
            noise[index] = known
    return tuple(fit_cell(rows, known) for rows, known in zip(pieces, noise, strict=True))


def _contrasts(rows: Columns) -> Contrasts | None:
    return contrasts(
        np.log2(rows["lr"].astype(float)), np.where(rows["diverged"], math.inf, rows["loss"].astype(float))
    )


def fit_cell(rows: Columns, noise: Noise | None = None) -> Cell:
    """The optimum of one cell; see ``optimum`` for the recipes and the noise.

    Seeds are separate points of the fit over the learning rate; over the norm they are pooled by learning rate, since
    their norms differ a little and the grid's edges are those of the learning rate.
    """
    points = tuple(_point(piece) for piece in split(rows, "lr"))
    rates = np.array([point.lr for point in points])
    log2_lr = np.log2(rows["lr"].astype(float))
    losses = np.where(rows["diverged"], math.inf, rows["loss"].astype(float))
    over_lr = optimum(log2_lr, losses, noise=noise)
    if over_lr.nearest is not None:
        over_lr = replace(over_lr, nearest=int(np.argmin(np.abs(rates - log2_lr[over_lr.nearest]))))

    start = rows["loss_start"].astype(float)
    anchor = float(np.mean(start[np.isfinite(start)])) if np.isfinite(start).any() else math.nan
    norm = np.array([point.norm for point in points])
    over_norm = _over_norm(points, norm, noise)
    paper = None
    if over_norm is not None and math.isfinite(anchor):
        sigma = np.array([point.sigma for point in points])
        paper = optimum(*_on_norm(points, norm), sigma, "paper", anchor)
    others = {name: _mean_norm(rows, name) for name in rows if name.startswith(NORMS)}
    norms = {name: _over_norm(points, values, noise) for name, values in others.items()}
    first = {name: rows[name][0] for name in ("family", "model", "width", "depth", "parameters", "batch", "tokens")}
    return Cell(
        family=str(first["family"]),
        model=str(first["model"]),
        width=float(first["width"]),
        depth=float(first["depth"]),
        parameters=float(first["parameters"]),
        batch=int(first["batch"]),
        tokens=int(first["tokens"]),
        points=points,
        lr=over_lr,
        norm=over_norm,
        paper=paper,
        noise=pooled(rows["sigma"].astype(float)),
        seed_noise=within_groups(rows["loss"].astype(float), rows["lr"].astype(float)),
        norms={name: found for name, found in norms.items() if found is not None},
        run_noise=noise,
    )


def _on_norm(points: Sequence[Point], norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log2 norm and loss; a diverged point lies at infinity on its side of the best one."""
    rates = np.array([point.lr for point in points])
    loss = np.array([math.inf if point.diverged else point.loss for point in points])
    beyond = np.where(rates > rates[int(np.argmin(loss))], math.inf, -math.inf)
    return np.where(np.isinf(loss), beyond, norm), loss


def _over_norm(points: Sequence[Point], norm: np.ndarray, noise: Noise | None) -> Optimum | None:
    if not np.isfinite(norm).any():
        return None
    seeds = np.array([max(point.seeds, 1) for point in points])
    alive = np.array([point.seeds for point in points if point.seeds])
    sigma = None if len(set(alive)) < 2 else seeds**-0.5
    of_mean = None if noise is None else Noise(noise.sd / math.sqrt(float(alive.mean())), noise.freedom)
    return optimum(*_on_norm(points, norm), sigma, noise=of_mean)


def _mean_norm(rows: Columns, name: str) -> np.ndarray:
    """log2 of a norm's geometric mean over the seeds that lived, for each learning rate."""
    return np.array([_log2_mean(piece[name], np.isfinite(piece["loss"].astype(float))) for piece in split(rows, "lr")])


def _log2_mean(norm: np.ndarray, alive: np.ndarray) -> float:
    values = norm[alive & np.isfinite(norm) & (norm > 0)]
    return float(np.mean(np.log2(values))) if len(values) else math.nan


def _point(rows: Columns) -> Point:
    alive = np.isfinite(rows["loss"].astype(float))
    return Point(
        lr=math.log2(float(rows["lr"][0])),
        norm=_log2_mean(rows["norm"], alive),
        loss=float(rows["loss"][alive].astype(float).mean()) if alive.any() else math.nan,
        sigma=pooled(rows["sigma"][alive].astype(float)),
        seeds=int(alive.sum()),
        lost=int((~alive).sum()),
    )


def fit_horizon(cells: Sequence[Cell]) -> Horizon:
    """The best batch among the cells of one model and horizon."""
    cells = sorted(cells, key=lambda cell: cell.batch)
    losses = np.array([math.inf if math.isnan(cell.loss) else cell.loss for cell in cells])
    index = int(np.argmin(losses))
    best = cells[index]
    flags = []
    if len(cells) == 1:
        flags.append("one-batch")
    elif index in (0, len(cells) - 1):
        flags.append("edge-low" if index == 0 else "edge-high")
    if not best.usable:
        flags.append("no-optimum")
    measured = [cell for cell in cells if cell.usable]
    batches = np.log2([cell.batch for cell in measured])
    over = (
        optimum(batches, [cell.loss for cell in measured], noise=_noise_of_loss(measured))
        if len(measured) > 1
        else None
    )
    smooth = over.x if over is not None and over.usable else math.log2(best.batch)
    return Horizon(
        family=best.family,
        model=best.model,
        width=best.width,
        depth=best.depth,
        parameters=best.parameters,
        tokens=best.tokens,
        batch=best.batch,
        loss=best.loss,
        lr=best.rate(),
        norm=best.log2_norm,
        smooth_batch=smooth,
        smooth_lr=_between(smooth, batches, [cell.rate() for cell in measured]),
        smooth_norm=_between(smooth, batches, [cell.log2_norm for cell in measured]),
        batches=tuple(cell.batch for cell in cells),
        over_batch=over,
        flags=tuple(flags),
        norms={
            name: _between(smooth, batches, [_usable_x(cell.norms.get(name)) for cell in measured])
            for name in best.norms
        },
        curvatures={name: found.curvature if found.usable else math.nan for name, found in best.norms.items()},
    )


def _usable_x(found: Optimum | None) -> float:
    return found.x if found is not None and found.usable else math.nan


def _noise_of_loss(cells: Sequence[Cell]) -> Noise | None:
    """Standard error of the loss at the optima; None where the cells have no pooled noise."""
    found = [(cell.lr.y_interval, cell.run_noise) for cell in cells]
    widths = [interval[1] - interval[0] for interval, noise in found if interval is not None and noise is not None]
    if len(widths) < len(cells) or not np.all(np.array(widths) > 0):
        return None
    freedom = min(noise.freedom for _, noise in found if noise is not None)
    normal = 2 * 1.6449  # standard errors in a 90% interval
    return Noise(float(np.sqrt(np.mean(np.square(widths)))) / normal, freedom)


def _between(x: float, grid: np.ndarray, values: Sequence[float]) -> float:
    """Linear interpolation; NaN outside the grid or beside a missing value."""
    return float(np.interp(x, grid, values, left=math.nan, right=math.nan)) if len(grid) else math.nan
