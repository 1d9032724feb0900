"""Which learning rate and batch size for a run that was not swept. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disco.errors import UserError
from disco.fit import Result, StudyFit
from disco.guide import _settings
from disco.guide._advice import Advice, advise
from disco.guide._bands import Band, bands
from disco.guide._cost import Cost, Curvatures, LargestBatch, cost, curvatures, largest_batch
from disco.guide._course import Course
from disco.guide._estimates import STAGES, Estimate, Said, Stage, agreed, stages
from disco.guide._growth import Mark, expected_norm, way
from disco.guide._growth_fit import growth
from disco.guide._growth_model import Growth
from disco.guide._overlay import Answer, answers, disagreements
from disco.guide._settings import Difference, Settings
from disco.guide._target import Size, Target, choose
from disco.guide._trust import Trust, reasons, verdict
from disco.runs.units import counted, power, power_range, two_to


@dataclass(frozen=True)
class Plan(Result):
    """A recommendation for one run of ``tokens`` tokens."""

    family: str
    model: str
    """Of the study that it is planned from."""
    tokens: int
    batch: Estimate
    """In tokens: the power of two nearest to the best batch, unless given or capped; its interval is that of the best
    batch (of those up to the cap) and not rounded."""
    lr: Estimate
    """At that batch."""
    norm: Estimate
    """Norm to expect at the end when the learning rate is right."""
    octaves: float
    """log2 of tokens over the largest horizon of the study; negative inside it."""
    cells: int
    """Cells with an optimum, of this family and model."""
    warnings: tuple[str, ...]
    """Reasons of ``trust``, gravest first, and what else to know."""
    trust: Trust = "ok"
    stage: str = ""
    """Way from runs to the recommendation: "two-stage", "joint" or "one-stage"."""
    width: float | None = None
    """Of the run; None where unknown. So are the next two."""
    depth: float | None = None
    parameters: float | None = None
    horizons: int = 0
    """Horizons of the study."""
    span: float = 0.0
    """Doublings of tokens that they span."""
    curvature: Curvatures = field(default_factory=Curvatures)
    cost: Cost = field(default_factory=Cost)
    largest: LargestBatch | None = None
    norms: tuple[Mark, ...] = ()
    """The norm along the way, at a constant learning rate; empty where it cannot be told."""
    answers: tuple[Answer, ...] = ()
    """What the stages, recipes and published rules say, the chosen stage first."""
    unlike: tuple[Difference, ...] = ()
    """Settings of the run that are not the sweep's, as far as both are known."""
    unrecorded: tuple[str, ...] = ()
    """Settings of the run, by dotted name, that the sweep's records or table do not tell."""
    lr_half: float | None = None
    """Half the 90% interval of the best learning rate at the batch, in octaves; None where there is none."""
    batch_half: float | None = None
    """The same of the best batch, also where another one is used."""
    advice: tuple[Advice, ...] = ()
    """Extra runs that would narrow the plan most, per token."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the study's runs, by dotted name. This and the next two are for ``disco watch``."""
    bands: tuple[Band, ...] = ()
    """What the study's runs show at the planned rate and batch; empty without their courses."""
    growth: Growth | None = None
    """How the output norm grows in the study."""

    @property
    def supported(self) -> bool:
        """Whether the learning rate comes from a rule, not from a default."""
        return self.lr.source in ("rule", "assumed")


def plan(
    fit: StudyFit,
    tokens: int,
    batch: int | None = None,
    model: str | None = None,
    family: str | None = None,
    *,
    width: float | None = None,
    depth: float | None = None,
    parameters: float | None = None,
    max_batch: int | None = None,
    tolerance: float | None = None,
    stage: str | None = None,
    run: Settings | None = None,
    sweep: Mapping[str, Settings] | None = None,
    courses: Sequence[Course] = (),
) -> Plan:
    """Recommends learning rate and batch size for ``tokens`` tokens.

    The batch is the best one at that horizon, rounded to a power of two, unless given; the learning rate is the best
    one at that batch. Both come from the stage of the fit that predicted its own largest horizon best
    (``StudyFit.default_stage``), with 90% intervals that allow for the disagreement of the other stages. Where no stage
    carries them, or the interval is wider than two octaves on either side, the optimum of the largest horizon is
    carried over instead and called a default.

    Args:
        fit: Of ``disco.fit.fit_table``; with ``bootstraps`` its intervals know that horizons share their runs.
        tokens: Horizon of the run to plan.
        batch: Tokens per step, if that is decided already.
        model: Which model of the study, "d64-L2"; None means that nearest to the size, or else the largest that carries
            a rule for the learning rate.
        family: Which family; None means that whose settings are most like ``run``, or else the one with the lowest loss
            at that model's largest horizon.
        width: Of the run, in features; None means the model's. Rules with size axes are used where the study has them,
            otherwise what transfers is assumed, and said to be.
        depth: Of the run, in layers; likewise.
        parameters: Of the run; likewise. Some published rules need it.
        max_batch: Largest batch in tokens that the run can take.
        tolerance: Nats that do not matter, for the largest batch; None means the noise of one run.
        stage: "two-stage", "joint" or "one-stage"; None means the one that the rolling origin chose.
        run: Settings of the run by dotted name, such as {"optimizer.momentum": 0.9}, to compare with the sweep's.
        sweep: Settings of the sweep by family, of ``sweep_settings``; None: the fit does not tell.
        courses: Of the study's runs, to watch the run with: the growth of the norm in those of the planned family, and
            what those of the planned model show along the way.

    Raises:
        UserError: tokens, a batch or another number is not positive, the batch is larger than the run, the stage is
            unknown, or the study has no such model or family.
    """
    _check(tokens, batch, max_batch, {"width": width, "depth": depth, "parameters": parameters, "tolerance": tolerance})
    if stage is not None and stage not in STAGES:
        raise UserError(f"plan: stage must be one of {', '.join(STAGES)}, got {stage!r}")
    known = sweep or {}
    size = Size(*(math.nan if value is None else float(value) for value in (width, depth, parameters)))

    def unlike(name: str) -> tuple[Difference, ...]:
        return _settings.differences(known.get(name, {}), run or {})

    target = choose(fit, tokens, family, model, size, lambda name: len(unlike(name)))
    every = stages(target)
    chosen, notes = _stage(target, every, stage)
    others = [each for name, each in every.items() if name != chosen.name]
    best = agreed(chosen.batch, [each.batch for each in others])
    if best.prediction is None:  # another stage may know the best batch
        best = next((each.batch for each in others if each.batch.prediction is not None), best)
    of_batch = _batch(target, best, batch, max_batch)

    def rate(at: float) -> Said:
        return agreed(chosen.rate(at), [each.rate(at) for each in others])

    said = rate(of_batch.value)
    of_rate = _rate(target, said, of_batch.value)
    curved = curvatures(target)
    own = known.get(target.family, {})
    adaptive = _settings.adaptive(own, target.family)
    given = batch is not None or of_batch.source == "capped"
    found = answers(target, every, chosen, curved, of_batch.value, given or best.prediction is None)
    untold = _settings.unrecorded(own, run or {}) if own else ()
    against = sorted(
        reasons(target, chosen.name, of_batch, of_rate, curved, unlike(target.family), untold, adaptive, said.pooled),
        key=lambda item: -("ok", "caution", "do not trust").index(item[0]),
    )
    runs_on = not own.get("schedule.decay")
    return Plan(
        family=target.family,
        model=target.model,
        tokens=tokens,
        batch=of_batch,
        lr=of_rate,
        norm=expected_norm(target, of_batch.value, best.prediction),
        octaves=target.octaves,
        cells=sum(cell.usable for cell in target.cells),
        warnings=(*(text for _, text in against), *notes, *disagreements(found, every, curved)),
        trust=verdict(against),
        stage=chosen.name,
        width=_or_none(target.size.width),
        depth=_or_none(target.size.depth),
        parameters=_or_none(target.size.parameters),
        horizons=len(target.horizons),
        span=target.span,
        curvature=curved,
        cost=cost(curved, said, best, of_batch.value, of_rate.value),
        largest=largest_batch(target, curved, best, rate, tolerance),
        norms=way(target, of_batch.value, of_rate.value) if math.isfinite(of_rate.value) else (),
        answers=found,
        unlike=unlike(target.family),
        unrecorded=untold,
        lr_half=_or_none(_half(said)),
        batch_half=_or_none(_half(best)),
        advice=advise(target, curved, of_batch.value, _half(said), _half(best), given, runs_on),
        settings=dict(own),
        bands=_bands(target, courses, of_batch.value, of_rate.value),
        growth=_growth(target, courses),
    )


def _bands(target: Target, courses: Sequence[Course], batch: float, rate: float) -> tuple[Band, ...]:
    """Of the runs of the target's model; none for a run of another width or depth."""
    if not math.isfinite(rate) or {"width", "depth"} & set(target.given):
        return ()
    own = [each for each in courses if each.family == target.family]
    alike = [each for each in own if _same(each.width, target.last.width) and _same(each.depth, target.last.depth)]
    return bands(alike, batch, rate)


def _growth(target: Target, courses: Sequence[Course]) -> Growth | None:
    try:
        return growth([each for each in courses if each.family == target.family])
    except UserError:  # too few runs with norms
        return None


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _check(tokens: int, batch: int | None, largest: int | None, others: Mapping[str, float | None]) -> None:
    if tokens <= 0 or (batch is not None and not 0 < batch <= tokens):
        raise UserError(f"plan: needs 0 < batch <= tokens, got a batch of {batch} for {tokens} tokens")
    if largest is not None and largest <= 0:
        raise UserError(f"plan: the largest batch must be positive, got {largest}")
    if batch is not None and largest is not None and batch > largest:
        raise UserError(
            f"plan: a batch of {batch} is larger than the largest allowed, {largest}; leave out one of them"
        )
    for name, value in others.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"plan: {name} must be a positive number, got {value}")


def _stage(target: Target, every: Mapping[str, Stage], wanted: str | None) -> tuple[Stage, list[str]]:
    """The stage to rest on, and a note if it is not the one that the rolling origin chose."""
    default = target.fit.default_stage
    first = every[wanted or default]

    def speaks(stage: Stage) -> bool:
        at = 2.0**stage.batch.prediction.log2 if stage.batch.prediction else float(target.last.batch)
        return stage.rate(at).prediction is not None

    if speaks(first) or wanted is not None:
        return first, []
    instead = next((stage for stage in every.values() if stage.batch.prediction and speaks(stage)), None)
    if instead is None:
        return first, []
    why = first.rate(float(target.last.batch)).why
    return instead, [f"the stage is {instead.name}, since {first.name} says nothing here: {why}"]


def _batch(target: Target, best: Said, given: int | None, largest: int | None) -> Estimate:
    if given is not None:
        return Estimate(float(given), None, "given", "given")
    tokens, last = target.tokens, target.last
    if best.prediction is not None:
        value = min(2.0 ** round(best.prediction.log2), 2.0 ** math.floor(math.log2(tokens)))
        interval = (2**best.prediction.low, 2**best.prediction.high)
        found = Estimate(value, interval, "rule", f"{best.why}: {two_to(best.prediction.log2)}, rounded")
    else:
        edge = ", which is at the edge of the grid of batches" if last.at_edge else ""
        where = f"best of the grid at {counted(last.tokens)} tokens{edge}"
        found = Estimate(float(min(last.batch, tokens)), None, "default", f"{where}; {best.why}")
    if largest is None or found.value <= largest:
        return found
    low, high = found.interval or (math.nan, math.nan)
    allowed = (min(low, float(largest)), min(high, float(largest))) if found.interval else None
    without = power_range(best.prediction.log2, (best.prediction.low, best.prediction.high)) if best.prediction else ""
    why = f"the largest allowed; best without the cap: {without or power(found.value)}, {best.why}"
    return Estimate(float(largest), allowed, "capped", why)


def _rate(target: Target, said: Said, batch: float) -> Estimate:
    if said.prediction is not None:
        interval = (2**said.prediction.low, 2**said.prediction.high)
        return Estimate(2**said.prediction.log2, interval, "assumed" if said.assumed else "rule", said.why)
    found = [cell for cell in target.cells if cell.usable]
    if not found:
        return Estimate(
            math.nan, None, "default", f"no cell has an optimum inside its grid of learning rates; {said.why}"
        )
    cell = min(found, key=lambda c: (abs(math.log2(c.tokens / target.tokens)), abs(math.log2(c.batch / batch))))
    where = f"optimum at {counted(cell.tokens)} tokens and a batch of {counted(cell.batch)}"
    return Estimate(2 ** cell.rate(), None, "default", f"{where}, carried over unchanged; {said.why}")


def _half(said: Said) -> float:
    return math.inf if said.prediction is None else (said.prediction.high - said.prediction.low) / 2


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
