"""Which learning rate and batch size for a run that was not swept. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from disco.errors import UserError
from disco.fit import Cell, Horizon, Prediction, Result, Rule, StudyFit
from disco.runs.units import power, two_to

WIDEST = 2.0
"""Octaves on either side beyond which a 90% interval says too little to be a recommendation."""


@dataclass(frozen=True)
class Estimate(Result):
    """One recommended number. ``value`` and ``interval`` are plain numbers, not logarithms."""

    value: float
    """NaN when nothing can be said."""
    interval: tuple[float, float] | None
    """90% interval; None for a default."""
    source: str
    """"given", "rule" (fitted and predicted), "mean" (of the fitted optima) or "default" (carried over)."""
    why: str
    """What the number rests on, or why there is no better one."""


@dataclass(frozen=True)
class Plan(Result):
    """A recommendation for one run of ``tokens`` tokens."""

    family: str
    model: str
    tokens: int
    batch: Estimate
    """In tokens: the power of two nearest to the best batch; its interval is not rounded."""
    lr: Estimate
    """At that batch."""
    norm: Estimate
    """Norm to expect at the end when the learning rate is right."""
    octaves: float
    """log2 of tokens over the largest horizon of the study; negative inside it."""
    cells: int
    """Cells with an optimum, of this family and model."""
    warnings: tuple[str, ...]

    @property
    def supported(self) -> bool:
        """Whether the learning rate comes from a rule, not from a default."""
        return self.lr.source == "rule"


def plan(
    fit: StudyFit, tokens: int, batch: int | None = None, model: str | None = None, family: str | None = None
) -> Plan:
    """Recommends learning rate and batch size for ``tokens`` tokens.

    The batch is the rule batch(tokens), rounded to a power of two, unless given; the learning rate is then the rule
    lr(batch, tokens) there. Where the study does not carry a rule, or its 90% prediction interval is wider than two
    octaves on either side, the optimum of the largest horizon is carried over instead and called a default.

    Args:
        fit: Of ``disco.fit.fit_table``.
        tokens: Horizon of the run to plan.
        batch: Tokens per step, if that is decided already.
        model: Which model of the study, "d64-L2"; None means the largest that carries a rule for the learning rate, or
            without any the largest.
        family: Which family; None means the one with the lowest loss at that model's largest horizon.

    Raises:
        UserError: tokens or batch is not positive, the batch is larger than the run, or the study has no such model
            or family.
    """
    if tokens <= 0 or (batch is not None and not 0 < batch <= tokens):
        raise UserError(f"plan: needs 0 < batch <= tokens, got batch={batch} and tokens={tokens}")
    family, model = _choose(fit, family, model)
    cells, horizons = fit.of(family, model)
    found = [cell for cell in cells if cell.usable]
    last = horizons[-1]
    octaves = math.log2(tokens / last.tokens)

    best_batch = _batch(fit.rule(family, model, "batch(tokens)"), horizons, tokens, batch)
    rates = fit.rule(family, model, "lr(batch, tokens)")
    lr = _rate(rates, found, tokens, best_batch.value)
    norm = _norm(fit, fit.rule(family, model, "norm(tokens)"), tokens)
    return Plan(
        family=family,
        model=model,
        tokens=tokens,
        batch=best_batch,
        lr=lr,
        norm=norm,
        octaves=octaves,
        cells=len(found),
        warnings=tuple(_warnings(fit, family, model, (best_batch, lr), octaves)),
    )


def _choose(fit: StudyFit, family: str | None, model: str | None) -> tuple[str, str]:
    """The study to plan from."""
    if not fit.studies:
        raise UserError("plan: the fit holds no runs; fit some that reached a horizon: disco fit RUNS")
    for value, index, noun in ((family, 0, "family"), (model, 1, "model")):
        known = sorted({study[index] for study in fit.studies})
        if value is not None and value not in known:
            raise UserError(f"plan: the fit has no {noun} {value!r}; it has {', '.join(map(repr, known))}")
    studies = [s for s in fit.studies if family in (None, s[0]) and model in (None, s[1])]
    if not studies:
        raise UserError(f"plan: the fit has no runs of model {model!r} in family {family!r}")

    def rank(study: tuple[str, str]) -> tuple[bool, float, int, float]:
        last = fit.of(*study)[1][-1]
        size = 0.0 if math.isnan(last.parameters) else last.parameters
        ruled = fit.rule(*study, "lr(batch, tokens)").law is not None
        return ruled, size, last.tokens, -last.loss if math.isfinite(last.loss) else -math.inf

    return max(studies, key=rank)


def _predict(rule: Rule, **values: float) -> tuple[Prediction | None, str]:
    """The prediction of a rule if it is one to act on, and why not otherwise."""
    if rule.law is None:
        return None, f"no rule {rule.name}: {rule.reason}"
    prediction = rule.law.predict(values)
    half = prediction.high - prediction.log2
    if half > WIDEST:
        size = f"plus or minus {half:.1f} octaves" if math.isfinite(half) else "unbounded"
        return None, f"the rule {rule.name} from {rule.n} optima predicts here with an interval that is {size}"
    return prediction, f"rule {rule.name} from {rule.n} optima"


def _batch(rule: Rule, horizons: Sequence[Horizon], tokens: int, given: int | None) -> Estimate:
    if given is not None:
        return Estimate(float(given), None, "given", "given")
    prediction, why = _predict(rule, tokens=float(tokens))
    if prediction:
        value = min(2.0 ** round(prediction.log2), 2.0 ** math.floor(math.log2(tokens)))
        return Estimate(
            value, (2**prediction.low, 2**prediction.high), "rule", f"{why}: {two_to(prediction.log2)}, rounded"
        )
    last = horizons[-1]
    edge = ", which is at the edge of the grid of batches" if last.at_edge else ""
    where = f"best of the grid at {power(last.tokens)} tokens{edge}"
    return Estimate(float(min(last.batch, tokens)), None, "default", f"{where}; {why}")


def _rate(rule: Rule, found: Sequence[Cell], tokens: int, batch: float) -> Estimate:
    prediction, why = _predict(rule, batch=batch, tokens=float(tokens))
    if prediction:
        return Estimate(2**prediction.log2, (2**prediction.low, 2**prediction.high), "rule", why)
    if not found:
        return Estimate(math.nan, None, "default", f"no cell has an optimum inside its grid of learning rates; {why}")
    cell = min(found, key=lambda c: (abs(math.log2(c.tokens / tokens)), abs(math.log2(c.batch / batch))))
    where = f"optimum at {power(cell.tokens)} tokens and a batch of {power(cell.batch)}"
    return Estimate(2 ** cell.rate(), None, "default", f"{where}, carried over unchanged; {why}")


def _norm(fit: StudyFit, rule: Rule, tokens: int) -> Estimate:
    """The mean of the optimal norms while their slope is not told from 0, otherwise the rule."""
    path = fit.path(rule.family, rule.model)
    if not path.norm:
        seen_at = [item for item in fit.of(rule.family, rule.model)[1] if math.isfinite(item.norm)]
        if not seen_at:
            return Estimate(math.nan, None, "default", "no optimal norm was found inside the grid")
        where = f"that of {power(seen_at[-1].tokens)} tokens, at a batch on the edge of its grid"
        return Estimate(2 ** seen_at[-1].norm, None, "default", where)
    level, ends = sum(path.norm) / len(path.norm), (2 ** min(path.norm), 2 ** max(path.norm))
    span = f"from {len(path.norm)} horizons, where it lay between {two_to(min(path.norm))} and {two_to(max(path.norm))}"
    if path.transfer is None or path.transfer.interval is None:
        return Estimate(2 ** path.norm[-1], None, "default", f"the last one seen, {span}")
    if path.transfer.constant:
        return Estimate(2**level, ends, "mean", f"mean {span}; verdict over tokens: {path.transfer.verdict}")
    prediction, why = _predict(rule, tokens=float(tokens))
    slope = f"it moves by {path.transfer.slope:+.2f} octaves per doubling of tokens"
    if prediction is None:
        return Estimate(2 ** path.norm[-1], None, "default", f"the last one seen, {span}; {slope}; {why}")
    return Estimate(2**prediction.log2, (2**prediction.low, 2**prediction.high), "rule", f"{why}; {slope}")


def _warnings(fit: StudyFit, family: str, model: str, numbers: Sequence[Estimate], octaves: float) -> list[str]:
    warnings = []
    for name, number in zip(("batch", "learning rate"), numbers, strict=True):
        if number.source == "default":
            warnings.append(f"the {name} is a default, not a prediction")
    cells, horizons = fit.of(family, model)
    span = math.log2(horizons[-1].tokens / horizons[0].tokens)
    if octaves > max(span, 1.0):
        warnings.append(f"extrapolated {octaves:.1f} doublings of tokens from a study that spans {span:.1f}")
    if octaves < -span:
        warnings.append(f"the run is shorter than the shortest horizon swept, {power(horizons[0].tokens)} tokens")
    batch = numbers[0].value
    grid = sorted({cell.batch for cell in cells})
    if not grid[0] <= batch <= grid[-1]:
        warnings.append(
            f"a batch of {power(batch)} lies outside the grid of {power(grid[0])} to {power(grid[-1])} tokens"
        )
    if len({study[0] for study in fit.studies}) > 1:
        warnings.append(f"the study has several families; this is for {family!r}")
    rule = fit.rule(family, model, "lr(batch, tokens)")
    warnings += [note for note in (rule.law.warnings if rule.law else ()) if "plane" in note]
    return warnings
