"""The same question answered otherwise: by the other stages and recipes, and by published rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from disco.errors import UserError
from disco.fit import PUBLISHED, PublishedRule, Result
from disco.guide._cost import TOLERANCE, Curvatures
from disco.guide._estimates import Said, Stage
from disco.guide._target import Target

PAPER = "paper's recipe"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Answer(Result):
    """What one stage, recipe or published rule says. None where it says nothing."""

    name: str
    lr: float | None
    lr_interval: Interval | None
    """90%, of the stage alone: not widened by the others."""
    batch: float | None
    """Tokens; its own choice, or the one that is fixed."""
    batch_interval: Interval | None
    cost: float | None
    """Nats above the optimum by the plan's estimate of where that is."""
    regret: float | None
    """Mean nats lost when the largest horizon was predicted from the smaller ones (``StudyFit.rolling``)."""
    conditions: str
    """Of a published rule: what it was found for."""
    note: str
    """Why it says nothing, or what was assumed."""


def answers(
    target: Target, stages: Mapping[str, Stage], chosen: Stage, curved: Curvatures, batch: float, fixed: bool
) -> tuple[Answer, ...]:
    """All that can be said, the chosen stage first.

    Args:
        target: The run.
        stages: By name.
        chosen: The stage that the plan rests on.
        curved: To price the answers.
        batch: Of the plan.
        fixed: Whether all must take that batch: it is given, capped, or the default of a study that tells no best one.
    """
    order = [chosen, *(stage for stage in stages.values() if stage.name != chosen.name)]
    found = [_of_stage(stage, batch if fixed else None) for stage in order]
    rule = target.fit.rule(target.family, target.model, "lr(batch, tokens)", "paper")
    paper = Said(None, rule.reason)
    if rule.law is not None:
        paper = Said(
            rule.law.predict(target.values(batch)), f"rule {rule.name} from {rule.n} optima, at the plan's batch"
        )
    found.append(_answer(PAPER, paper, Said(None, ""), batch))
    found += [_published(target, rule, batch if fixed else None) for rule in PUBLISHED]
    return tuple(_priced(target, chosen, curved, each) for each in found)


def _of_stage(stage: Stage, fixed: float | None) -> Answer:
    at = fixed
    if at is None:
        if stage.batch.prediction is None:
            return _answer(stage.name, Said(None, stage.batch.why), stage.batch, None)
        at = 2.0**stage.batch.prediction.log2
    return _answer(stage.name, stage.rate(at), stage.batch if fixed is None else Said(None, ""), at)


def _answer(name: str, rate: Said, best: Said, batch: float | None) -> Answer:
    lr, lr_interval = _plain(rate)
    return Answer(name, lr, lr_interval, batch, _plain(best)[1], None, None, "", "" if lr is not None else rate.why)


def _plain(said: Said) -> tuple[float | None, Interval | None]:
    if said.prediction is None:
        return None, None
    low, high = said.prediction.low, said.prediction.high
    bounded = math.isfinite(low) and math.isfinite(high)
    return 2.0**said.prediction.log2, (2.0**low, 2.0**high) if bounded else None


def _published(target: Target, rule: PublishedRule, fixed: float | None) -> Answer:
    notes = []
    formula = ", ".join(part for part in (rule.lr_formula, rule.batch_formula) if part)
    conditions = f"{formula}: {rule.condition}"
    optima = [b for b in target.fit.bottoms if b.family == target.family and b.optimum.usable]
    if rule.needs_constant:
        rule = rule.calibrate(
            [2**b.optimum.lr for b in optima], [2**b.optimum.batch for b in optima],
            [b.tokens for b in optima], [b.parameters for b in optima],
        )  # fmt: skip
        if not optima:
            why = "it gives exponents only, and this study has no joint optimum to take the constant from"
            return Answer(rule.name, None, None, None, None, None, None, conditions, why)
        notes.append(f"constant from {len(optima)} optim{'um' if len(optima) == 1 else 'a'} of this study")
    size = target.size.parameters
    lr = batch = None
    try:
        if fixed is not None:
            batch = fixed
        elif rule.batch is not None:
            batch = rule.best_batch(target.tokens, size)
        else:
            batch = float(target.last.batch)
            notes.append("batch carried over")
        lr = rule.rate(target.tokens, batch, size)
    except UserError as error:
        notes = [str(error).removeprefix(f"{rule.name}: ")]
        batch = None
    return Answer(rule.name, lr, None, batch, None, None, None, conditions, "; ".join(notes))


def _priced(target: Target, chosen: Stage, curved: Curvatures, answer: Answer) -> Answer:
    cost = None
    best = chosen.batch.prediction
    if answer.lr and answer.batch and curved.lr is not None:
        at = chosen.rate(answer.batch).prediction
        if at is not None:
            cost = curved.lr * (math.log2(answer.lr) - at.log2) ** 2
            if best is not None and curved.batch is not None:
                cost += curved.batch * (math.log2(answer.batch) - best.log2) ** 2
    regret = target.fit.rolling.mean(answer.name) if target.fit.rolling else math.inf
    fields = vars(answer) | {"cost": cost, "regret": regret if math.isfinite(regret) else None}
    return Answer(**fields)


def disagreements(found: tuple[Answer, ...], stages: Mapping[str, Stage], curved: Curvatures) -> Iterator[str]:
    """Pairs of stages whose 90% intervals of the learning rate do not meet although each is sure of its own, if taking
    one for the other costs more than ``TOLERANCE`` nats."""
    own = [answer for answer in found if answer.name in stages and answer.lr_interval]
    for index, first in enumerate(own):
        for second in own[index + 1 :]:
            (a, b), (c, d) = first.lr_interval or (0, 0), second.lr_interval or (0, 0)
            apart = abs(math.log2((first.lr or 1) / (second.lr or 1)))
            if (b < c or d < a) and (curved.lr is None or curved.lr * apart**2 >= TOLERANCE):
                yield f"{first.name} and {second.name} differ by {apart:.1f} octaves in the learning rate"
