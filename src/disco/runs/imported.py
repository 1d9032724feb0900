"""What a record of an imported run has besides, and how its results are cut from it. No torch.

Its config.json has a table "imported": the table it came from, the name of the run there, and the form. "results" has
a line per horizon, each a result as it stands. "series" has a line per evaluation, at whatever steps there were any.
Its model has a name, and perhaps no width and depth; "parameters" may be null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from disco.runs.horizons import WINDOW
from disco.runs.reader import Array, Run
from disco.runs.schema import Metric

Form = Literal["results", "series"]

IMPORTED = "imported"
"""Key in the configuration."""
LOSS_STD = "loss/valid_std"
"""Key of a line: standard deviation of the held-out loss, where the table gave it, in nats."""
NEAR = 1e-3
"""Relative difference in tokens below which an evaluation is at a horizon."""
WIDEST = 0.5
"""Octaves of tokens between two evaluations between which the loss is still interpolated: a milli-nat or less off."""


def horizons(run: Run) -> list[int]:
    """The horizons (tokens) of an imported run: those of the table's rows; of a series its own, the last evaluation,
    and at a constant rate the powers of two before it at which ``cell`` has a result. A run that diverged has the
    horizons of its kind up to the largest of the table; those after its last evaluation are without a result."""
    facts, own = run.config[IMPORTED], int(run.config["horizon"])
    if facts["form"] == "results":
        return [int(tokens) for tokens in facts.get("horizons") or [own]]
    at = run.column(Metric.TOKENS)[np.isfinite(run.column(Metric.LOSS_VALID))]
    last = float(at.max()) if at.size else 0.0
    if (run.config.get("schedule") or {}).get("decay"):
        return [own]
    powers = (2**power for power in range(math.ceil(math.log2(run.config["batch"])), own.bit_length()))
    return sorted({own, *(n for n in powers if n < own and (n > last or _loss(run, n, Metric.LOSS_VALID)))})


def cell(run: Run, tokens: int, loss: str, norms: Mapping[str, Array]) -> dict[str, Any]:
    """What was measured at a horizon D, as the columns of ``runs.table.cells``; empty if nothing was.

    Of a series: the mean over the evaluations in the horizon's trailing window, D (1 - 2/64) to D, where there are
    three or more, as in the records of this project; else the evaluation at D itself; else the loss interpolated
    linearly over log tokens, at D (1 - 1/64), the middle of that window, if its neighbours are not farther apart than
    half an octave. So runs that were evaluated at different steps are compared at the same point. One evaluation
    tells no noise: sigma is then null.
    """
    found = _loss(run, tokens, loss)
    if found is None:
        return {}
    value, sigma, points, window = found
    at = run.column(Metric.TOKENS)
    middle = math.sqrt(window[0] * window[1])
    where = {name: _norm(at, norm, window, middle) for name, norm in norms.items()}
    path = run.column(Metric.PATH)
    walked = np.isfinite(path) & (at > 0)
    return {
        "step": round(tokens / run.config["batch"]),
        "path": float(np.interp(tokens, at[walked], path[walked])) if walked.any() else None,
        "loss": value,
        "sigma": sigma,
        "points": points,
        **{name: norm if math.isfinite(norm) else None for name, norm in where.items()},
    }


def _loss(run: Run, tokens: int, loss: str) -> tuple[float, float | None, int, tuple[float, float]] | None:
    """Loss at a horizon, its standard deviation, evaluations behind it, and the tokens from and to which they reach."""
    at, values = run.column(Metric.TOKENS), run.column(loss)
    known = np.isfinite(values) & (at > 0)
    at, values = at[known], values[known]
    if not at.size:
        return None
    near = int(np.argmin(np.abs(at - tokens)))
    exact = abs(at[near] / tokens - 1) < NEAR
    if run.config[IMPORTED]["form"] == "results":
        sigma = float(run.column(LOSS_STD)[known][near])
        here = (float(at[near]), float(at[near]))
        return (float(values[near]), sigma if math.isfinite(sigma) else None, 1, here) if exact else None
    last = float(at[near]) if exact else tokens
    inside = (at >= last * (1 - 2 / WINDOW)) & (at <= last)
    if inside.sum() >= 3:
        window = (float(at[inside][0]), float(at[inside][-1]))
        return float(values[inside].mean()), float(values[inside].std(ddof=1)), int(inside.sum()), window
    middle = last if exact else tokens * (1 - 1 / WINDOW)
    value = _between(middle, at, values)
    return None if value is None else (value, None, 1, (middle, middle))


def _norm(at: Array, norm: Array, window: tuple[float, float], middle: float) -> float:
    """Geometric mean over the window of evaluations, or interpolated at its middle; NaN if neither can be."""
    known = np.isfinite(norm) & (norm > 0) & (at > 0)
    at, logs = at[known], np.log2(norm[known])
    inside = (at >= window[0]) & (at <= window[1])
    if inside.any():
        return float(2 ** logs[inside].mean())
    found = _between(middle, at, logs)
    return math.nan if found is None else 2.0**found


def _between(x: float, at: Array, values: Array) -> float | None:
    """Linear over log ``at``, which is sorted; None outside, or in too wide a gap."""
    if not at.size or not at[0] * (1 - NEAR) <= x <= at[-1] * (1 + NEAR):
        return None
    right = min(max(int(np.searchsorted(at, x)), 1), at.size - 1)
    near = int(np.argmin(np.abs(at - x)))
    if abs(at[near] / x - 1) < NEAR:
        return float(values[near])
    gap = math.log2(at[right] / at[right - 1])
    if gap > WIDEST:
        return None
    return float(values[right - 1] + math.log2(x / at[right - 1]) / gap * (values[right] - values[right - 1]))
