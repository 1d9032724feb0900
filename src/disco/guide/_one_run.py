"""A learning rate from one short run of the target's size, and a study's optimal norm. No torch.

At a constant rate log2 norm is nearly a function of log2 path, the sum of the rates of the steps so far. So the norm
that is best at the target's tokens and batch, which a study of smaller runs tells, has a path at which a run of the
target's kind reaches it, which the probe's own norms and the study's growth tell. That path over the target's steps is
the rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from disco.errors import UserError
from disco.fit import Prediction, Result, power_law
from disco.guide._cost import curvatures
from disco.guide._course import Course
from disco.guide._estimates import NORMAL, WIDEST, Estimate
from disco.guide._forecast import Forecast, forecast
from disco.guide._growth import DRIFT, towards_none
from disco.guide._growth_model import Growth
from disco.guide._settings import ADAPTIVE, Difference
from disco.guide._target import Target
from disco.runs.units import counted, two_to

Array = NDArray[np.float64]

KIND = (
    "optimizer.name", "optimizer.momentum", "optimizer.nesterov", "optimizer.weight_decay", "optimizer.ratios.input",
    "optimizer.ratios.hidden", "optimizer.ratios.output", "schedule.decay", "schedule.shape", "model.placement",
)  # fmt: skip
"""Settings that move the best norm, or how norms grow: probe and study must share them."""
POINTS = 4
"""Fewest norms that a probe needs after its start."""
WALKED = 2.0
"""Fewest octaves of path that they span."""
NEAR = 2.0
"""Octaves of tokens, and of batch, over which cells count less: standard deviation of a normal density."""
PER_BATCH = 0.3
"""Standard deviation of the octaves of optimal norm per octave of batch, where a study has one batch only."""
PER_SIZE = 0.1
"""The same per octave of width or depth: they moved it by 0.2 over a factor of 12 (arXiv:2510.03871, Fig. 2)."""
FARTHEST = 12
"""Octaves of path beyond the probe's end at which the search ends."""
PRECISE = 1e-3
"""Octaves of path to which it is found."""
STEP = 0.25
"""Octaves of path to either side over which the slope is taken."""
SCATTER = 0.03
"""Standard deviation of a measured norm from seed to seed, octaves, where no study tells it."""
FLATTEST = 0.05
"""Octaves of norm per octave of path below which the norm tells nothing of the rate: it has settled."""


@dataclass(frozen=True)
class Probe(Result):
    """What one probe says."""

    tokens: float
    """It trained on."""
    lr: float
    path: float
    """Of its layer's steps, at which its norm is the optimal one."""
    ahead: float
    """Octaves of path from its end to there; negative where it has been there."""
    slope: float
    """Octaves of norm per octave of path there."""
    log2_lr: float
    """Of the target's learning rate."""
    sd: float
    """Standard error of it by the forecast alone, in octaves."""
    source: str
    """Of the forecast: "growth" (of a study) or "own course" (also where its norm has been the best one)."""
    reason: str


@dataclass(frozen=True)
class OneRun(Result):
    """The learning rate for a run of ``tokens`` tokens at the probes' batch and size."""

    tokens: int
    batch: float
    lr: Estimate
    """With its 90% interval, from the errors of both parts."""
    norm: Prediction
    """log2 of the optimal output norm at the end."""
    from_norm: float
    """Half the 90% interval of the rate by the optimal norm alone, in octaves."""
    from_growth: float
    """By the forecast of the norm alone."""
    cost: float | None
    """Nats that the interval is expected to cost, by the study's curvature; None where it tells none."""
    share: float
    """Tokens of the probes over those of the target run."""
    probes: tuple[Probe, ...]
    assumes: tuple[str, ...]
    """What it rests on and does not test."""
    warnings: tuple[str, ...]


def one_run(
    target: Target, probes: Sequence[Course], growth: Growth | None = None, unlike: Sequence[Difference] = ()
) -> OneRun:
    """The learning rate with which a run like the probes ends at the study's optimal norm.

    Args:
        target: Tokens and size of the run, and the study of smaller runs.
        probes: Short runs of the target's kind, size and batch, at constant rates.
        growth: Of the study's output norm; None extrapolates the probes themselves.
        unlike: Settings in which the probes differ from the study's runs.

    Raises:
        UserError: no probe, or one of another kind than the study or than can be used, with several batches, too few
            norms, or norms that do not reach the optimal one; or a study without optimal norms.
    """
    if not probes:
        raise UserError("plan --probe: no run was given")
    batch = probes[0].batch
    for each in probes:
        _check(each, batch)
    for difference in unlike:
        if difference.setting in KIND:
            raise UserError(f"plan --probe: another kind of run than the study's: {difference.text}")
    if target.tokens < batch:
        raise UserError(f"plan --probe: {target.tokens} tokens are less than the probe's batch of {batch:.0f}")
    best = optimal_norm(target, batch)
    found = tuple(_probe(each, best.log2, target.tokens, growth) for each in probes)
    # Errors of the law of growth are common to the probes, so their number does not shrink the interval.
    weights = np.array([each.sd for each in found]) ** -2.0
    weights /= weights.sum()
    rates = np.array([each.log2_lr for each in found])
    middle = float(weights @ rates)
    of_growth = math.sqrt(float(weights @ (np.array([each.sd for each in found]) ** 2 + (rates - middle) ** 2)))
    slope = float(weights @ np.array([each.slope for each in found]))
    from_norm, from_growth = (best.high - best.low) / 2 / slope, NORMAL * of_growth
    half = math.hypot(from_norm, from_growth)
    curvature = curvatures(target).lr
    share = sum(each.last for each in probes) / target.tokens
    why = (
        f"norm {two_to(best.log2)} is best; the probe {'has been' if found[0].ahead <= 0 else 'will be'} there after a "
        f"path of {two_to(math.log2(found[0].path), 1)}, to be walked in {target.tokens / batch:,.0f} steps"
    )
    return OneRun(
        tokens=target.tokens, batch=batch,
        lr=Estimate(2**middle, (2 ** (middle - half), 2 ** (middle + half)), "probe", why),
        norm=best, from_norm=from_norm, from_growth=from_growth,
        cost=None if curvature is None else curvature * (half / NORMAL) ** 2, share=share, probes=found,
        assumes=tuple(_assumptions(target, probes)),
        warnings=(*(each.text for each in unlike), *_warnings(target, found, batch, half)),
    )  # fmt: skip


def optimal_norm(target: Target, batch: float) -> Prediction:
    """log2 of the output norm that is best at the target's tokens and at a batch, with a 90% interval.

    A plane in log2 tokens and log2 batch over the optima of the study's cells, those near the target counting more
    (``NEAR``), its slope over tokens drawn towards 0 (``towards_none``). Horizons of one batch share their runs, so the
    errors are those of as many points as there are batches. Another width or depth adds ``PER_SIZE``.

    Raises:
        UserError: fewer than three cells with an optimal norm.
    """
    cells = [cell for cell in target.cells if cell.usable and math.isfinite(cell.log2_norm)]
    if len(cells) < 3:
        raise UserError(
            f"plan --probe: the study {target.model!r} has an optimal norm in {len(cells)} cells of batch and tokens, "
            "and 3 are needed; sweep learning rates on both sides of the best one, with norms logged"
        )
    known = {"tokens": [float(cell.tokens) for cell in cells], "batch": [float(cell.batch) for cell in cells]}
    wanted = {"tokens": float(target.tokens), "batch": batch}
    logs = {name: np.log2(values) for name, values in known.items()}
    nearest = {name: float(np.clip(math.log2(wanted[name]), x.min(), x.max())) for name, x in logs.items()}
    beyond = {name: abs(math.log2(wanted[name]) - nearest[name]) for name in known}
    far = np.sum([((x - nearest[name]) / NEAR) ** 2 for name, x in logs.items()], axis=0)
    varied = {name: values for name, values in known.items() if len(set(values)) > 1}
    if len(cells) <= len(varied) + 1:
        varied.pop("batch", None)
    law = power_law([2.0**cell.log2_norm for cell in cells], varied, weights=np.exp(-far / 2))
    shared = len(cells) / len(set(known["batch"]))
    law = replace(law, covariance=tuple(tuple(shared * value for value in row) for row in law.covariance))
    if "tokens" in varied:
        law = towards_none(law)
    found = law.predict(wanted)
    unknown = [each * beyond[name] for name, each in (("tokens", DRIFT), ("batch", PER_BATCH)) if name not in varied]
    unknown += [
        PER_SIZE * abs(math.log2(getattr(target.size, name) / getattr(target.last, name))) for name in _resized(target)
    ]
    half = math.hypot(found.high - found.log2, NORMAL * math.hypot(*unknown))
    return Prediction(found.log2, found.log2 - half, found.log2 + half)


def _check(probe: Course, batch: float) -> None:
    """Raises UserError for a run that cannot be a probe."""
    name = f"plan --probe: the run at a learning rate of {two_to(math.log2(probe.rate))}"
    if probe.optimizer in ADAPTIVE:
        raise UserError(
            f"{name} was trained with {probe.optimizer}, whose norms do not grow by a path; take one of scion"
        )
    if probe.decay > 0:
        raise UserError(f"{name} has a decay over {probe.decay:g} of its tokens; take one at a constant rate")
    if probe.batch != batch:
        raise UserError(
            f"plan --probe: runs with batches of {batch:.0f} and {probe.batch:.0f} tokens; give those of one batch, "
            "that of the target"
        )
    path, _ = _points(probe)
    if len(path) < POINTS:
        raise UserError(f"{name} has {len(path)} logged output norms, and {POINTS} are needed; train it longer")
    if np.ptp(path) < WALKED:
        raise UserError(
            f"{name} has norms over {np.ptp(path):.1f} octaves of path, and {WALKED:g} are needed; train it longer"
        )


def _points(probe: Course) -> tuple[Array, Array]:
    """log2 of path and norm."""
    known = _known(probe)
    return np.log2(probe.path[known]), np.log2(probe.norm[known])


def _known(probe: Course) -> NDArray[np.bool_]:
    return np.isfinite(probe.norm) & (probe.norm > 0) & (probe.path > 0)


def _probe(probe: Course, best: float, tokens: float, growth: Growth | None) -> Probe:
    """The path at which a probe's norm is ``best`` (log2)."""
    x, y = _points(probe)
    end, measured = float(x[-1]), float(probe.tokens[_known(probe)][-1])

    def norm(at: float) -> Forecast:
        """At a log2 path: what the probe measured, or would if it went on."""
        found = forecast(probe, measured + (2.0**at - 2.0**end) / probe.rate * probe.batch, growth)
        if not math.isfinite(found.log2):
            raise UserError(f"plan --probe: the probe's norm cannot be forecast: {found.reason}")
        return found

    if best <= y[0]:
        raise UserError(
            f"plan --probe: the probe's norm is above the best one, {two_to(best)}, from its first point on: is it a "
            "run of the study's kind?"
        )
    low, high = float(x[0]), end
    while norm(high).log2 < best:
        low, high = high, high + 1
        if high > end + FARTHEST:
            raise UserError(
                f"plan --probe: the probe's norm is forecast to stay at {two_to(norm(low).log2)}, below the best one, "
                f"{two_to(best)}: is it a run of the study's kind (momentum, weight decay)?"
            )
    at = float(optimize.brentq(lambda x: norm(x).log2 - best, low, high, xtol=PRECISE))
    there = norm(at)
    slope = (norm(at + STEP).log2 - norm(at - STEP).log2) / (2 * STEP)
    if slope < FLATTEST:
        raise UserError(
            f"plan --probe: the probe's norm grows by {slope:.2f} octaves per octave of path near the best one, "
            f"{two_to(best)}, so it does not tell the learning rate; sweep rates instead"
        )
    log2_lr = at - math.log2(tokens / probe.batch)
    sd = max(there.sd, _scatter(growth)) / slope
    return Probe(probe.last, probe.rate, 2.0**at, at - end, slope, log2_lr, sd, there.source, there.reason)


def _scatter(growth: Growth | None) -> float:
    """Least standard deviation of a run's norm about that of another seed, octaves: a measured one is not without."""
    scatter = growth.scatter if growth is not None and growth.usable else math.nan
    return scatter if math.isfinite(scatter) else SCATTER


def _resized(target: Target) -> list[str]:
    """In what the target is not of the study's size."""
    return [name for name in target.given if name in ("width", "depth")]


def _assumptions(target: Target, probes: Sequence[Course]) -> list[str]:
    sizes = [f"{name} {getattr(target.last, name):g} to {getattr(target.size, name):g}" for name in _resized(target)]
    found = [
        "the best output norm at a batch and a number of tokens is that of the study"
        + (f", from {' and '.join(sizes)}" if sizes else ""),
        "the norm depends on the learning rate through the path (the sum of the rates) alone",
        "the target trains at a constant rate, as the study and the probe did",
    ]
    if any(each.warmup > 0 for each in probes):
        found.append("warmup is short against the run")
    return found


def _warnings(target: Target, found: Sequence[Probe], batch: float, half: float) -> list[str]:
    warnings = []
    if half > WIDEST:
        warnings.append(f"the interval is plus or minus {half:.1f} octaves: it says too little to act on")
    if target.octaves > 1:
        warnings.append(
            f"the optimal norm is extrapolated {target.octaves:.1f} doublings of tokens beyond the study, and drifts "
            "until there are some 50 tokens per parameter"
        )
    batches = [cell.batch for cell in target.cells]
    if not min(batches) <= batch <= max(batches):
        warnings.append(
            f"the batch of {counted(batch)} is outside the study's, {counted(min(batches))} to {counted(max(batches))}"
        )
    if any(each.source == "own course" and each.ahead > 0 for each in found):
        warnings.append("the probe's norm is extrapolated by its own slope; a study of its growth would do better")
    rates = [each.log2_lr for each in found]
    if max(rates) - min(rates) > 0.5:
        warnings.append(f"the probes differ by {max(rates) - min(rates):.1f} octaves in the rate that they say")
    return warnings
