"""The norm to expect: at the horizon when the learning rate is right, and along the way at the planned one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from disco.errors import UserError
from disco.fit import PowerLaw, Prediction, Result, power_law
from disco.guide._estimates import NORMAL, WIDEST, Estimate, candidates
from disco.guide._target import Target
from disco.runs.units import counted, two_to

Array = NDArray[np.float64]

DRIFT = 0.2
"""Standard deviation, in octaves of norm per doubling of tokens, of how optimal norms drift: about 0 where they
transfer (arXiv:2510.03871, Fig. 2), 0.2 in its decayed runs with momentum. It matters where few horizons leave the
slope open."""
REACH = (3.0, 2.0)
"""Octaves from the planned rate and batch within which runs tell how the norm grows; half of it is the kernel's
width."""
POINTS = 8
"""Fewest runs from which growth is predicted."""
TERMS = 5
MARKS = 8
"""Points along the way, one per doubling of tokens up to the horizon."""


@dataclass(frozen=True)
class Mark(Result):
    """The norm to expect after some tokens at the planned learning rate and batch (plain numbers)."""

    tokens: int
    norm: float
    interval: tuple[float, float]
    """90%, for one run."""
    extrapolated: bool
    """Whether no run of the sweep has gone so far: its path, the sum of its learning rates, was shorter."""


def expected_norm(target: Target, batch: float, best: Prediction | None) -> Estimate:
    """The optimal norm at the horizon.

    Of the rule norm(tokens), its slope drawn towards 0 by ``DRIFT``; at a batch that is not the best one moved along
    the change of the optimal norm with the batch. Without a rule: the last optimal norm that was seen.

    Args:
        target: The run.
        batch: Tokens per step.
        best: log2 of the best batch; None where it is not known.
    """
    fit, path = target.fit, target.fit.path(target.family, target.model)
    rule = fit.rule(target.family, target.model, "norm(tokens)")
    for each in candidates(target, "norm", ("tokens",), "quadratic"):
        if each.law is not None and all(target.values().get(name, math.nan) > 0 for name in each.law.exponents):
            rule = each
            break
    seen = [item for item in target.horizons if math.isfinite(item.norm)]
    if rule.law is None:
        if not seen:
            return Estimate(math.nan, None, "default", "no optimal norm was found inside the grid")
        edge = ", at a batch on the edge of its grid" if seen[-1].at_edge else ""
        where = f"that of {counted(seen[-1].tokens)} tokens{edge}"
        return Estimate(2 ** seen[-1].norm, None, "default", f"{where}; no rule norm(tokens): {rule.reason}")
    law = towards_none(rule.law)
    found, slope = law.predict(target.values()), law.exponents["tokens"]
    why = f"rule {rule.name} from {rule.n} optima: {slope:+.2f} octaves per doubling of tokens"
    if path.norm and path.transfer:
        why += f"; seen: {two_to(min(path.norm))} to {two_to(max(path.norm))}, over tokens: {path.transfer.verdict}"
    moved, half = 0.0, found.high - found.log2
    if best is not None:
        of_batch, error = _slope_over_batch(target)
        away = math.log2(batch) - best.log2
        moved, half = of_batch * away, math.hypot(half, NORMAL * error * away)
        if abs(moved) > 0.05:
            why += f"; moved by {moved:+.2f} octaves for the batch"
    if half > WIDEST:
        last = 2 ** seen[-1].norm if seen else math.nan
        return Estimate(last, None, "default", f"the last one seen, since the interval is too wide; {why}")
    value = found.log2 + moved
    return Estimate(2**value, (2 ** (value - half), 2 ** (value + half)), "rule", why)


def towards_none(law: PowerLaw) -> PowerLaw:
    """The law after one more observation: that the exponent of the tokens is 0, give or take ``DRIFT``."""
    covariance = np.array(law.covariance)
    if not np.isfinite(covariance).all():
        return law
    names = law.terms or tuple(law.exponents)
    at = 1 + names.index("tokens")
    gain = covariance[:, at] / (covariance[at, at] + DRIFT**2)
    before = np.array([law.intercept, *(law.exponents[name] for name in names)])
    intercept, *slopes = before - gain * law.exponents["tokens"]
    covariance = covariance - np.outer(gain, covariance[at])
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    return replace(
        law,
        intercept=float(intercept),
        exponents=dict(zip(names, map(float, slopes), strict=True)),
        standard_errors=dict(zip(names, map(float, errors[1:]), strict=True)),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
    )


def _slope_over_batch(target: Target) -> tuple[float, float]:
    """Octaves of optimal norm per octave of batch at fixed tokens, and its standard error; (0, 0) if not known."""
    use = [cell for cell in target.cells if cell.usable and math.isfinite(cell.log2_norm)]
    x = {"batch": [cell.batch for cell in use], "tokens": [cell.tokens for cell in use]}
    try:
        law = power_law([2.0**cell.log2_norm for cell in use], {n: v for n, v in x.items() if len(set(v)) > 1})
    except UserError:  # too few optima
        return 0.0, 0.0
    error = law.standard_errors.get("batch", math.nan)
    return (law.exponents["batch"], error) if math.isfinite(error) else (0.0, 0.0)


def way(target: Target, batch: float, lr: float) -> tuple[Mark, ...]:
    """The norm at every doubling of tokens up to the horizon, from the growth of the norms that were measured.

    At a constant rate log2 norm is nearly a function of log2 path, the sum of the rates over the steps: a quadratic of
    it, with linear terms in log2 rate and log2 batch, is fitted to the sweep's runs, those near the planned rate and
    batch counting most. Its interval is that of one more run: scatter and coefficients, the horizons of a run counted
    once. Empty where the sweep has no norms, one horizon only (rate, batch and path then move together), or too few
    runs near enough.

    Args:
        target: The run.
        batch: Tokens per step.
        lr: Learning rate, constant.
    """
    rows = np.array([
        (math.log2(cell.batch), point.lr, math.log2(cell.tokens), point.norm)
        for cell in target.cells for point in cell.points if math.isfinite(point.norm)
    ])  # fmt: skip
    if not len(rows) or len(target.horizons) < 2:
        return ()
    b, u, d, y = rows.T
    far = np.hypot((u - math.log2(lr)) / REACH[0], _away(b, math.log2(batch)) / REACH[1])
    near = far < 1.0
    runs = len({*zip(b[near].tolist(), u[near].tolist(), strict=True)})
    if runs < POINTS or runs <= TERMS + 1:
        return ()
    b, u, path, y = b[near], u[near], (u + d - b)[near], y[near]
    at = np.array([math.log2(batch), math.log2(lr), math.log2(lr * target.tokens / batch)])
    design = _design(b - at[0], u - at[1], path - at[2])
    weight = np.exp(-2 * far[near] ** 2)
    root = np.sqrt(weight)[:, None]
    inverse = np.linalg.pinv((design * root).T @ (design * root), hermitian=True)
    solution = inverse @ (design.T @ (weight * y))
    missed = y - design @ solution
    freedom = max(runs - TERMS, 1)
    square = float(weight @ missed**2 / weight.sum()) * runs / freedom
    # Horizons of one run stray together: its rows make one score (a sandwich over clusters; White 1980, Liang 1986).
    _, cluster = np.unique(np.stack([b, u], axis=1), axis=0, return_inverse=True)
    scores = np.zeros((cluster.max() + 1, design.shape[1]))
    np.add.at(scores, cluster.ravel(), design * (weight * missed)[:, None])
    covariance = inverse @ (scores.T @ scores) @ inverse * runs / freedom
    quantile = float(stats.t.ppf(0.95, freedom))
    marks = []
    longest, shortest = float(path.max()), float(path.min())
    for each in sorted(target.tokens / 2**k for k in range(MARKS) if target.tokens / 2**k >= batch):
        there = math.log2(lr * each / batch)
        if there < shortest - 1:
            continue  # nothing was measured so early
        row = _design(np.zeros(1), np.zeros(1), np.array([there - at[2]]))[0]
        middle = float(row @ solution)
        half = quantile * math.sqrt(max(float(row @ covariance @ row) + square, 0.0))
        marks.append(Mark(int(each), 2**middle, (2 ** (middle - half), 2 ** (middle + half)), there > longest))
    return tuple(marks)


def _away(b: Array, batch: float) -> Array:
    """Octaves from a batch; from one beyond the grid, those from the grid's nearest end."""
    return np.asarray(b - np.clip(batch, b.min(), b.max()))


def _design(b: Array, u: Array, path: Array) -> Array:
    return np.stack([np.ones_like(b), path, path**2, u, b], axis=1)
