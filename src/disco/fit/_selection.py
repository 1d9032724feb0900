"""Which rows of a table are near the best of their cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from disco.errors import UserError


def near_minimum(y: ArrayLike, within: float, by: Sequence[ArrayLike] = ()) -> np.ndarray:
    """Rows whose loss is at most ``1 + within`` times the least of their cell.

    Args:
        y: Positive losses, n values; a row that is not finite is not near.
        within: Fraction, 0.0025 for a quarter of a percent.
        by: Columns of n values; rows that agree in all of them form a cell. None: one cell.

    Returns:
        n booleans.

    Raises:
        UserError: lengths differ, ``within`` is not a positive fraction, or a loss is not positive.
    """
    losses = np.asarray(y, dtype=float)
    if not (math.isfinite(within) and within > 0):
        raise UserError(f"near_minimum: within must be a positive fraction such as 0.0025, got {within}")
    if losses.ndim != 1 or any(np.shape(column) != losses.shape for column in by):
        shapes = ", ".join(str(np.shape(column)) for column in (losses, *by))
        raise UserError(f"near_minimum: losses and cells must be vectors of one length, got shapes {shapes}")
    known = np.isfinite(losses)
    if np.any(losses[known] <= 0):
        raise UserError(f"near_minimum: a fraction of a loss needs positive losses, got {losses[known].min()}")
    keys = zip(*(np.asarray(column).tolist() for column in by), strict=True) if by else [()] * len(losses)
    cells: dict[tuple[object, ...], int] = {}
    index = np.array([cells.setdefault(tuple(key), len(cells)) for key in keys], dtype=int)
    least = np.full(len(cells), math.inf)
    np.minimum.at(least, index[known], losses[known])
    return np.asarray(known & (losses <= (1 + within) * least[index]) if len(losses) else known)
