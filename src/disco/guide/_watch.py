"""A run against its plan, while it goes on: where its norm will end, what that costs, and the way back. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from disco.fit import Prediction, Result
from disco.guide._bands import LOSS, MOMENTUM, Band, named
from disco.guide._course import Course, stirring
from disco.guide._estimates import NORMAL
from disco.guide._faults import Seen, looks_like, seen
from disco.guide._forecast import LEAST, Distance, Forecast, distance, forecast, planned, slope_of
from disco.guide._plan import Plan
from disco.guide._shown_rate import Shown, rescaled, shown_rate, widened
from disco.runs.units import counted, power, two_to

Verdict = Literal["on course", "off course", "cannot tell"]

LINE, WRONG = 0.7, 1.0
"""Octaves of learning rate beyond which a run is off course, and that are wrong for sure. Half an octave costs next to
nothing; the line is nearer to that than to an octave, since planned rates are some tenths off themselves (chosen on one
of the two studies of benchmarks/flags.md)."""
FARTHEST = 4.0
"""Octaves by which the learning rate may be changed on the way."""
CLOSE = 1e-3
"""Octaves of norm within which a corrected rate meets the target."""
UNLIKE = 0.1
"""Octaves by which declared batch and learning rate may differ from the plan's unmentioned."""
COMPARABLE = 0.5
"""Octaves of declared batch or learning rate from the plan's beyond which its bands say nothing of a run."""


@dataclass(frozen=True)
class Correction(Result):
    """What brings the final norm to the target, from now on; one of the two."""

    lr: float | None
    """Peak base learning rate from now on, the schedule unchanged; None where none within ``FARTHEST`` octaves does."""
    batch: float | None
    """Tokens per step, where the rate must stay: fewer or more steps walk the same path."""
    why: str


@dataclass(frozen=True)
class Check(Result):
    """One look at a run. Numbers that could not be had are NaN or None."""

    tokens: float
    """Trained on, up to the last logged point."""
    horizon: float
    verdict: Verdict
    reasons: tuple[str, ...]
    """Of the verdict, gravest first, and what else to know."""
    lr: float = math.nan
    """Peak base learning rate, as it goes on."""
    batch: float = math.nan
    loss: float = math.nan
    norm: float = math.nan
    """Of the output layer (plain number)."""
    target: Prediction | None = None
    """log2 of the output norm to end with, and the plan's 90% interval; by ``target_by``."""
    target_by: str = ""
    """"planned rate": the norm that a run at it ends with, by the study's growth; "optimal norm": that of the fit."""
    forecast: Forecast | None = None
    octaves: Distance | None = None
    """log2 of the run's learning rate over that of the target, 90%: of the forecast and of the target together."""
    cost: float | None = None
    """Nats that going on unchanged is expected to lose against the learning rate of the target."""
    cost_interval: tuple[float, float] | None = None
    rests_on: str = ""
    """What the cost rests on, or why there is none."""
    correction: Correction | None = None
    seen: tuple[Seen, ...] = ()
    """Every quantity against its band."""
    shown: Shown | None = None
    """The rate that the norms show over the recorded one, in octaves; None where the study's growth does not tell."""
    fault: str = ""
    """What the norms look like, if they are off the band."""
    ended: str = ""
    """Outcome of the run, if it has ended."""


def check(course: Course, plan: Plan, ended: str = "") -> Check:
    """Whether a run is on its course.

    Off course: it diverged, a layer group's norm is off the band of the study's runs, or its learning rate is wrong by
    more than ``LINE`` octaves by the norm that it will end with. Where the norms show another rate than the recorded
    one, that is taken to be the real one. It cannot be told before the norm can be forecast, for
    another optimizer than the study's, nor while the logged rates contradict the declared schedule.

    Args:
        course: The run so far. Where its horizon is not known the plan's is taken.
        plan: Of ``disco.guide.plan``, with the study's courses for the bands and the growth of the norm.
        ended: Outcome of the run: "" while it goes on.
    """
    if not math.isfinite(course.horizon):
        course = replace(course, horizon=float(plan.tokens))
    tokens = course.last
    changed = _changed(course, plan)
    target, by = _target(course, plan, bool(changed))
    base = Check(
        tokens, course.horizon, "cannot tell", (), course.rate, course.batch,
        loss=_latest(course.loss), norm=_latest(course.norm), target=target, target_by=by, ended=ended,
    )  # fmt: skip
    if ended == "diverged" or _diverges(course):
        return replace(base, verdict="off course", reasons=("the run has diverged",))
    if tokens <= 0:
        return replace(base, reasons=("nothing has been logged yet",))
    notes = [*_declared(course, plan), *changed]
    bands = _bands_for(course, plan)
    around = seen(course, bands) if _comparable(course, plan) else ()
    if not plan.bands:
        notes.append("the plan has no courses of a study's runs, so faults are not looked for")
    elif not around:
        notes.append("the norms are not held against the study's runs: the settings are not the planned ones")
    base = replace(base, seen=around)
    outside = [each for each in around if each.outside and each.quantity != LOSS]
    if outside:
        fault = looks_like(course, bands)
        base = replace(base, fault=fault)
        faults = [_off_band(each) for each in outside]
        return _with_course(base, course, plan, [f"{'; '.join(faults)}: {fault}"], notes)
    notes += [_off_band(each) for each in around if each.outside]
    return _with_course(base, course, plan, [], notes)


def _with_course(base: Check, course: Course, plan: Plan, faults: list[str], notes: list[str]) -> Check:
    """The check with forecast, distance, cost and correction, as far as they can be had."""
    uncertain = _other_optimizer(course, plan) or stirring(course)
    if uncertain:
        why = f"the forecast does not hold: {uncertain}"
        return replace(base, verdict="off course" if faults else "cannot tell", reasons=(*faults, why, *notes))
    shown = shown_rate(course, plan.growth)
    real, base = course, replace(base, shown=shown)
    if shown is not None and shown.other:
        real, notes = rescaled(course, shown.octaves), [*([] if faults else [_other_rate(course, shown)]), *notes]
        ahead = widened(forecast(real, course.horizon, plan.growth), shown, real, plan.growth)
    else:
        ahead = forecast(course, course.horizon, plan.growth)
    known = ahead.source != "none" and math.isfinite(ahead.log2)
    target = base.target
    verdict: Verdict = "off course" if faults else "cannot tell"
    if not known:
        return replace(base, verdict=verdict, reasons=(*faults, f"no forecast: {ahead.reason}", *notes))
    base = replace(base, forecast=ahead)
    if target is None:
        return replace(base, verdict=verdict, reasons=(*faults, "the plan knows no norm to end with", *notes))
    slope = slope_of(course, course.horizon, plan.growth)
    if math.isnan(slope):
        unknown = "how much the final norm depends on the learning rate is not known"
        return replace(base, verdict=verdict, reasons=(*faults, unknown, *notes))
    if not slope > LEAST:
        flat = "the final norm hardly depends on the learning rate, so it does not tell it"
        return replace(base, verdict=verdict, reasons=(*faults, flat, *notes))
    error = (target.high - target.low) / 2 / NORMAL
    away, own = (distance(ahead, target.log2, each, slope) for each in (error, 0.0))
    base = _costed(replace(base, octaves=away), plan, away)
    if not faults:
        verdict = _verdict(own)
    will = "will end" if course.last < course.horizon else "ended"
    wanted = "planned" if base.target_by == "planned rate" else "best"
    words = (
        f"the norm {will} at {_power_range(ahead)}, {wanted} is {_power_range(target)}: a learning rate "
        f"{abs(away.octaves):.2f} octaves too {'high' if away.octaves > 0 else 'low'}"
    )
    if away.high - away.low > 2 * (own.high - own.low):
        notes.append("most of that interval is the plan's: it does not know the best rate better")
    optimal = _optimal(plan)
    if base.target_by == "planned rate" and optimal and (optimal.low > target.high or optimal.high < target.low):
        notes.append(f"the fit's optimal norm is another than the planned one, {_power_range(optimal)}")
    if verdict == "off course" and not faults and course.last < course.horizon:
        base = replace(base, correction=_correction(real, plan, target, course.rate / real.rate))
    return replace(base, verdict=verdict, reasons=(*faults, words, *notes))


def _other_rate(course: Course, shown: Shown) -> str:
    rates = [two_to(math.log2(course.rate) + octaves) for octaves in (shown.octaves, shown.low, shown.high)]
    return (
        f"the output norm so far is that of a run at a rate of {rates[0]} ({rates[1]} to {rates[2]}), the record says "
        f"{two_to(math.log2(course.rate))}: is the recorded rate that of the updates?"
    )


def _verdict(own: Distance) -> Verdict:
    """Of the distance from the plan's target, as well as the forecast knows it.

    It cannot be told where the forecast's own interval reaches from within the line to what is wrong for sure, or from
    beyond the line to no distance at all.
    """
    away, half = abs(own.octaves), (own.high - own.low) / 2
    if away <= LINE:
        return "on course" if away + half <= WRONG else "cannot tell"
    return "off course" if away > half else "cannot tell"


def _costed(base: Check, plan: Plan, away: Distance) -> Check:
    """With what the distance costs: the curvature times its square, the mean over its distribution."""
    curvature = plan.curvature.lr
    if curvature is None:
        return replace(base, rests_on="the plan knows no curvature of the loss over the learning rate, so no cost")
    ends = sorted((curvature * away.low**2, curvature * away.high**2))
    sd = (away.high - away.low) / 2 / NORMAL
    return replace(
        base,
        cost=curvature * (away.octaves**2 + sd**2),
        cost_interval=(0.0 if away.low <= 0 <= away.high else ends[0], ends[1]),
        rests_on=f"{curvature:.3g} nats for one octave off, four times that for two: the plan's curvature",
    )


def _correction(course: Course, plan: Plan, target: Prediction, recorded: float) -> Correction:
    """The rate from now on at which the forecast ends at the target; by halving, since it rises with the rate.

    Args:
        recorded: what the record calls a rate of 1.
    """

    def ends(octaves: float) -> float:
        return forecast(course.at_rate(course.rate * 2**octaves), course.horizon, plan.growth).log2 - target.log2

    low, high = -FARTHEST, FARTHEST
    if ends(low) > 0:
        passed = course.tokens[np.isfinite(course.norm) & (np.log2(np.maximum(course.norm, 1e-300)) >= target.log2)]
        where = f" from before {counted(float(passed[0]))} tokens" if len(passed) else ""
        return Correction(
            None, None, f"no lower rate brings the norm back down; start again{where}, or go on and bear the cost"
        )
    if ends(high) < 0:
        return Correction(None, None, f"no rate of up to {2**FARTHEST:g} times the present one reaches it any more")
    while high - low > CLOSE:
        middle = (low + high) / 2
        low, high = (middle, high) if ends(middle) < 0 else (low, middle)
    rate = course.rate * 2 ** ((low + high) / 2)
    walked = course.path_at(course.last) / course.path_at(course.horizon)
    return Correction(
        rate * recorded, course.batch * course.rate / rate,
        f"{two_to(math.log2(rate / course.rate))} times the present rate; {walked:.0%} of the planned path is walked",
    )  # fmt: skip


def _target(course: Course, plan: Plan, changed: bool) -> tuple[Prediction | None, str]:
    """log2 of the norm to end with, its interval that of the plan, and by what.

    It is the norm of a run at the planned rate and batch, by the same growth that forecasts this one: what the law gets
    wrong cancels (benchmarks/flags.md: 97 to 100% of wrong rates are seen). The optimal norm of the fit is known to 0.7
    octaves of rate only. It serves where there is no growth, and where settings that move the best rate are
    ``changed``.
    """
    if changed:
        found = _optimal(plan)
        return found, "optimal norm" if found else ""
    twin = replace(course, batch=plan.batch.value) if plan.batch.value > 0 else course
    ends = planned(twin, course.horizon, plan.growth, plan.lr.value).log2 if plan.lr.value > 0 else math.nan
    if math.isfinite(ends):
        slope = slope_of(twin, course.horizon, plan.growth)
        low, high = (slope * math.log2(end / plan.lr.value) for end in plan.lr.interval or (plan.lr.value,) * 2)
        return Prediction(ends, ends + low, ends + high), "planned rate"
    found = _optimal(plan)
    return found, "optimal norm" if found else ""


def _optimal(plan: Plan) -> Prediction | None:
    """log2 of the fit's optimal norm."""
    if not (math.isfinite(plan.norm.value) and plan.norm.value > 0):
        return None
    low, high = plan.norm.interval or (plan.norm.value, plan.norm.value)
    return Prediction(*(math.log2(value) for value in (plan.norm.value, low, high)))


def _other_optimizer(course: Course, plan: Plan) -> str:
    """That the run has another optimizer than the study's; empty where it has not, or one is not known."""
    swept = plan.settings.get("optimizer.name")
    if not swept or not course.optimizer or swept == course.optimizer:
        return ""
    return f"the optimizer is {course.optimizer}, in the study {swept}"


def _declared(course: Course, plan: Plan) -> list[str]:
    """Size, rate and length of the run that are not as planned."""
    found = []
    for name, own, wanted in (
        ("batch", course.batch, plan.batch.value),
        ("learning rate", course.rate, plan.lr.value),
        ("horizon", course.horizon, float(plan.tokens)),
    ):
        if wanted > 0 and _octaves(own, wanted) > UNLIKE:
            found.append(f"{name} is {power(own)}, in the plan {power(wanted)}")
    return found


def _changed(course: Course, plan: Plan) -> list[str]:
    """Settings of the run that move the best rate, and are not the study's."""
    found = []
    for name, value in (("momentum", course.momentum), ("weight_decay", course.weight_decay)):
        swept = plan.settings.get(f"optimizer.{name}")
        if isinstance(swept, int | float) and math.isfinite(value) and not math.isclose(swept, value):
            found.append(f"{name.replace('_', ' ')} is {value:g}, in the study {swept:g}")
    for group, ratio in course.ratios.items():
        swept = plan.settings.get(f"optimizer.ratios.{group}")
        if isinstance(swept, int | float) and swept > 0 and _octaves(ratio, swept) > UNLIKE:
            found.append(f"ratio of the {group} group is {power(ratio)}, in the study {power(swept)}")
    return found


def _comparable(course: Course, plan: Plan) -> bool:
    if _other_optimizer(course, plan):
        return False
    pairs = ((course.batch, plan.batch.value), (course.rate, plan.lr.value))
    return all(_octaves(own, wanted) <= COMPARABLE for own, wanted in pairs)


def _bands_for(course: Course, plan: Plan) -> tuple[Band, ...]:
    """The plan's, without that of the momentum's size for a run of another momentum."""
    swept = plan.settings.get("optimizer.momentum")
    same = isinstance(swept, int | float) and math.isclose(swept, course.momentum)
    return tuple(band for band in plan.bands if same or band.quantity != MOMENTUM)


def _octaves(one: float, other: float) -> float:
    return abs(math.log2(one / other)) if one > 0 and other > 0 and math.isfinite(one / other) else math.inf


def _off_band(each: Seen) -> str:
    side = "above" if each.value > each.high else "below"
    if each.quantity == LOSS:
        return f"the loss {each.value:.3f} is {side} the study's band, {each.low:.3f} to {each.high:.3f}"
    ends = f"{two_to(each.low)} to {two_to(each.high)}"
    return f"the {named(each.quantity)} {two_to(each.value)} is {side} the study's band, {ends}"


def _power_range(value: Prediction | Forecast) -> str:
    ends = f" ({two_to(value.low)} to {two_to(value.high)})" if value.high > value.low else ""
    return two_to(value.log2) + ends


def _latest(values: np.ndarray) -> float:
    good = values[np.isfinite(values)]
    return float(good[-1]) if len(good) else math.nan


def _diverges(course: Course) -> bool:
    """Whether the last logged loss is infinite."""
    return bool(len(course.loss) and np.isinf(course.loss[-1]))
