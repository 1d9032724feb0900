"""Least squares and its censored form (Tobit) for many vectors of observations at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

Array = NDArray[np.float64]


def least_squares(design: Array, y: Array) -> tuple[Array, Array]:
    """Ordinary least squares of every row of ``y`` on one design, missing observations left out.

    Args:
        design: n x p, its first column ones.
        y: R x n; NaN is missing.

    Returns:
        Coefficients, R x p, and residual variance, R; NaN where the observations do not determine them.
    """
    shift = _centring(design)
    centred = design @ shift
    there = np.isfinite(y)
    known = np.where(there, y, 0.0)
    normal = np.einsum("ni,rn,nj->rij", centred, there.astype(float), centred, optimize=True)
    solution = _solve(normal, (known @ centred)[..., None])[..., 0]
    residual = np.where(there, y - solution @ centred.T, 0.0)
    freedom = there.sum(axis=1) - design.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where(freedom > 0, np.sum(residual**2, axis=1) / freedom, np.nan)
    return solution @ shift.T, variance


def tobit(design: Array, y: Array, side: NDArray[np.int_], weight: Array | None = None) -> tuple[Array, Array, Array]:
    """Maximum likelihood for normal errors where some observations are known only to lie beyond a bound.

    Newton's method in Olsen's parameters, in which the likelihood is concave (Tobin 1958, Econometrica 26:24; Olsen
    1978, Econometrica 46:1211).

    Args:
        design: n x p, its first column ones.
        y: R x n; a value where ``side`` is 0, otherwise the bound; NaN is missing.
        side: R x n; +1: the truth lies above ``y``, -1: below, 0: it was observed.
        weight: n positive weights of mean 1; None means equal ones.

    Returns:
        Coefficients, R x p; their covariance, R x p x p; standard deviation of the errors, R (divided by the degrees
        of freedom, as in least squares). NaN where fewer values were observed than p + 1 or the bounds leave the
        coefficients open.
    """
    shift = _centring(design)
    x = design @ shift
    (rows, n), p = y.shape, x.shape[1]
    there = np.isfinite(y)
    seen = there & (side == 0)
    w = (np.ones(n) if weight is None else weight) * there
    z_design = np.concatenate([np.broadcast_to(-x, (rows, n, p)), np.where(there, y, 0.0)[..., None]], axis=2)

    start, variance = least_squares(x, np.where(seen, y, np.nan))
    sigma = np.sqrt(np.maximum(variance, 1e-12))
    parameters = np.concatenate([start, np.ones((rows, 1))], axis=1) / sigma[:, None]
    open_rows = np.isfinite(parameters).all(axis=1)
    parameters[~open_rows] = 1.0
    observed = np.sum(w * seen, axis=1)

    def likelihood(phi: Array) -> Array:
        z = np.einsum("rnq,rq->rn", z_design, phi)
        each = np.where(seen, -0.5 * z**2, log_ndtr(-side * z))
        return np.sum(w * each, axis=1) + observed * np.log(np.maximum(phi[:, -1], 1e-300))

    value = likelihood(parameters)
    hessian = np.zeros((rows, p + 1, p + 1))
    for _ in range(50):
        z = np.einsum("rnq,rq->rn", z_design, parameters)
        t = -side * z
        mills = np.exp(-0.5 * t**2 - 0.5 * np.log(2 * np.pi) - log_ndtr(t))
        slope = w * np.where(seen, -z, -side * mills)
        bend = w * np.where(seen, -1.0, -mills * (t + mills))
        gradient = np.einsum("rnq,rn->rq", z_design, slope)
        gradient[:, -1] += observed / parameters[:, -1]
        hessian = np.einsum("rni,rn,rnj->rij", z_design, bend, z_design, optimize=True)
        hessian[:, -1, -1] -= observed / parameters[:, -1] ** 2
        step = -_solve(hessian, gradient[..., None])[..., 0]
        step[~np.isfinite(step).all(axis=1)] = 0.0
        scale = np.ones(rows)
        for _ in range(30):  # backtracking keeps the precision positive and the likelihood rising
            trial = parameters + scale[:, None] * step
            better = (trial[:, -1] > 0) & (likelihood(trial) >= value - 1e-9)
            if better.all():
                break
            scale = np.where(better, scale, scale / 2)
        trial = np.where(better[:, None], trial, parameters)
        value = likelihood(trial)
        moved = np.max(np.abs(trial - parameters) / (1 + np.abs(parameters)), axis=1)
        parameters = trial
        if np.all(moved < 1e-9):
            break
    theta = parameters[:, -1]
    beta = parameters[:, :-1] / theta[:, None]
    jacobian = (
        np.concatenate([np.broadcast_to(np.eye(p), (rows, p, p)), -beta[..., None]], axis=2) / theta[:, None, None]
    )
    count = seen.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(count > p, count / (count - p), np.nan)
    inverse = _solve(-hessian, np.broadcast_to(np.eye(p + 1), (rows, p + 1, p + 1)))
    covariance = jacobian @ inverse @ jacobian.transpose(0, 2, 1) * spread[:, None, None]
    beta = np.where((open_rows & (count > p))[:, None], beta, np.nan)
    return beta @ shift.T, shift @ covariance @ shift.T, np.sqrt(spread) / theta


def _centring(design: Array) -> Array:
    """Square S such that design @ S has centred columns after the first; S also maps coefficients back."""
    shift = np.eye(design.shape[1])
    shift[0, 1:] = -design[:, 1:].mean(axis=0)
    return shift


def _solve(matrices: Array, right: Array) -> Array:
    """Solutions, NaN for matrices that are singular to working precision."""
    scale = np.sqrt(np.abs(np.diagonal(matrices, axis1=1, axis2=2)))
    scale = np.where(scale > 0, scale, 1.0)
    unit = matrices / (scale[:, :, None] * scale[:, None, :])
    finite = np.isfinite(unit).all(axis=(1, 2))
    unit = np.where(finite[:, None, None], unit, np.eye(unit.shape[1]))
    good = finite & (np.abs(np.linalg.det(unit)) > 1e-10)
    unit = np.where(good[:, None, None], unit, np.eye(unit.shape[1]))
    solution = np.linalg.solve(unit, right / scale[:, :, None]) / scale[:, :, None]
    return np.where(good[:, None, None], solution, np.nan)
