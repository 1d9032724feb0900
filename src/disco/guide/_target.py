"""The run to plan: which study of a fit it follows, its horizon, and its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from disco.errors import UserError
from disco.fit import Cell, Horizon, StudyFit


@dataclass(frozen=True)
class Size:
    """Size of the planned run; NaN where unknown."""

    width: float = math.nan
    depth: float = math.nan
    parameters: float = math.nan


@dataclass(frozen=True)
class Target:
    """One run to plan, and the study (family and model) that it is planned from."""

    fit: StudyFit
    family: str
    model: str
    tokens: int
    size: Size
    """Of the run: that of the model where nothing else was asked for."""
    given: tuple[str, ...]
    """Those of width, depth and parameters that were asked for and differ from the model's."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells of the study."""
        return self.fit.of(self.family, self.model)[0]

    @property
    def horizons(self) -> tuple[Horizon, ...]:
        """All horizons of the study, short ones first."""
        return self.fit.of(self.family, self.model)[1]

    @property
    def last(self) -> Horizon:
        """The largest horizon."""
        return self.horizons[-1]

    @property
    def octaves(self) -> float:
        """log2 of the tokens over the largest horizon; negative inside the study."""
        return math.log2(self.tokens / self.last.tokens)

    @property
    def span(self) -> float:
        """log2 of the largest over the smallest horizon."""
        return math.log2(self.last.tokens / self.horizons[0].tokens)

    @property
    def family_horizons(self) -> tuple[Horizon, ...]:
        """All horizons of all models of the family, short ones first."""
        own = (item for item in self.fit.horizons if item.family == self.family)
        return tuple(sorted(own, key=lambda item: item.tokens))

    def values(self, batch: float | None = None) -> dict[str, float]:
        """What a rule may take, by name."""
        known = {"tokens": float(self.tokens), **vars(self.size)}
        return known if batch is None else known | {"batch": batch}


def choose(
    fit: StudyFit, tokens: int, family: str | None, model: str | None, size: Size, preferred: Callable[[str], int]
) -> Target:
    """The study to plan from: of the wanted family and model; then that nearest in size, if a size is given; then one
    of a preferred family; then one that carries a rule for the learning rate; then the largest, the longest, the best.

    Args:
        fit: Of the sweep.
        tokens: Of the run to plan.
        family: None means any.
        model: None means any.
        size: Wanted; NaN where it does not matter.
        preferred: How many settings of a family differ from those of the run.

    Raises:
        UserError: the fit is empty, or has no such family or model.
    """
    if not fit.studies:
        raise UserError("plan: the fit holds no runs; fit some that reached a horizon: disco fit RUNS")
    for value, index, noun in ((family, 0, "family"), (model, 1, "model")):
        known = sorted({study[index] for study in fit.studies})
        if value is not None and value not in known:
            raise UserError(f"plan: the fit has no {noun} {value!r}; it has {', '.join(map(repr, known))}")
    studies = [s for s in fit.studies if family in (None, s[0]) and model in (None, s[1])]
    if not studies:
        raise UserError(f"plan: the fit has no runs of model {model!r} in family {family!r}")

    def rank(study: tuple[str, str]) -> tuple[float, ...]:
        last = fit.of(*study)[1][-1]
        away = sum(_away(getattr(size, name), getattr(last, name)) for name in vars(size))
        ruled = [
            any(r.law and (r.family, r.model, r.name) == (*study, name) for r in fit.rules)
            for name in ("lr(batch, tokens)", "lr(tokens)")
        ]
        known = 0.0 if math.isnan(last.parameters) else last.parameters
        loss = -last.loss if math.isfinite(last.loss) else -math.inf
        return -preferred(study[0]), -away, *ruled, known, last.tokens, loss

    family, model = max(studies, key=rank)
    own = fit.of(family, model)[1][-1]
    has = Size(own.width, own.depth, own.parameters)
    given = tuple(name for name, value in vars(size).items() if value > 0 and value != getattr(has, name))
    wanted = {name: getattr(size if name in given else has, name) for name in vars(size)}
    if given and "parameters" not in given:
        wanted["parameters"] = math.nan  # another width or depth has another number of them
    return Target(fit, family, model, tokens, Size(**wanted), given)


def _away(wanted: float, has: float) -> float:
    return abs(math.log2(wanted / has)) if wanted > 0 and has > 0 else 0.0
