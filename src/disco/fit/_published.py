"""Published scaling rules of learning rate and batch, with the conditions under which they were found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from disco.errors import UserError
from disco.fit._result import Result


@dataclass(frozen=True)
class Monomial(Result):
    """constant x product of powers of batch (tokens), tokens, parameters."""

    exponents: dict[str, float]
    log2_constant: float = math.nan
    """NaN where the source gives exponents only."""

    def __call__(self, **values: float) -> float:
        """The value, all arguments and it plain numbers; NaN where the constant or a needed argument is missing."""
        logs = [power * math.log2(values.get(name) or math.nan) for name, power in self.exponents.items()]
        return float(2 ** (self.log2_constant + math.fsum(logs)))

    def calibrated(self, y: ArrayLike, x: Mapping[str, ArrayLike]) -> Monomial:
        """The same exponents with the constant that fits optima ``y`` best in logarithms."""
        rest = sum(power * np.log2(np.asarray(x[name], dtype=float)) for name, power in self.exponents.items())
        level = np.log2(np.asarray(y, dtype=float)) - rest
        level = level[np.isfinite(level)]
        return replace(self, log2_constant=float(level.mean()) if len(level) else math.nan)


@dataclass(frozen=True)
class PublishedRule(Result):
    """One rule as published. N: parameters, D: tokens, B: tokens per step, C = 6 N D."""

    name: str
    source: str
    lr_formula: str
    batch_formula: str
    """Empty where the source has no rule for the batch."""
    condition: str
    """Optimizer, schedule, and what is free or fixed."""
    lr: Monomial
    batch: Monomial | None
    fitted_on: str = ""
    """Name of a public table that it was fitted to: scored on that table it is in-sample."""
    calibrated: bool = False
    """Whether the constants that the source does not give were fitted to the user's optima."""

    @property
    def needs_constant(self) -> bool:
        """Whether the source gives exponents only for the learning rate or the batch."""
        return math.isnan(self.lr.log2_constant) or (self.batch is not None and math.isnan(self.batch.log2_constant))

    def rate(self, tokens: float, batch: float = math.nan, parameters: float = math.nan) -> float:
        """Learning rate for a run.

        Raises:
            UserError: the rule needs an argument that is not given, or its constant is not known.
        """
        return self._value(self.lr, "learning rate", tokens=tokens, batch=batch, parameters=parameters)

    def best_batch(self, tokens: float, parameters: float = math.nan) -> float:
        """Batch in tokens.

        Raises:
            UserError: as ``rate``, or the source has no rule for the batch.
        """
        if self.batch is None:
            raise UserError(f"{self.name}: {self.source} gives no rule for the batch; choose one")
        return self._value(self.batch, "batch", tokens=tokens, parameters=parameters)

    def _value(self, law: Monomial, noun: str, **values: float) -> float:
        missing = [name for name in law.exponents if not (math.isfinite(values[name]) and values[name] > 0)]
        if missing:
            raise UserError(f"{self.name}: its {noun} needs {', '.join(missing)} as positive numbers")
        if math.isnan(law.log2_constant):
            raise UserError(f"{self.name}: {self.source} gives exponents only for the {noun}; calibrate it first")
        return law(**values)

    def calibrate(self, lr: ArrayLike, batch: ArrayLike, tokens: ArrayLike, parameters: ArrayLike) -> PublishedRule:
        """With the constants that the source leaves open fitted to optima (plain numbers, one entry per optimum)."""
        x = {"batch": batch, "tokens": tokens, "parameters": parameters}
        rate = self.lr.calibrated(lr, x) if math.isnan(self.lr.log2_constant) else self.lr
        best = self.batch
        if best is not None and math.isnan(best.log2_constant):
            best = best.calibrated(batch, x)
        return replace(self, lr=rate, batch=best, calibrated=self.needs_constant)


def _compute(constant: float, power: float) -> Monomial:
    """constant C^power with C = 6 N D."""
    return Monomial({"parameters": power, "tokens": power}, math.log2(constant) + power * math.log2(6))


PUBLISHED: tuple[PublishedRule, ...] = (
    PublishedRule(
        "step-law", "arXiv:2503.04715", "1.79 N^-0.713 D^0.307", "0.58 D^0.571",
        "AdamW, cosine or WSD schedule; N without embeddings; at the best batch",
        Monomial({"parameters": -0.713, "tokens": 0.307}, math.log2(1.79)),
        Monomial({"tokens": 0.571}, math.log2(0.58)), fitted_on="step-law",
    ),
    PublishedRule(
        "deepseek", "arXiv:2401.02954", "0.3118 C^-0.125", "0.2920 C^0.3271",
        "AdamW, multi-step schedule; near-optimal runs; at the best batch",
        _compute(0.3118, -0.125), _compute(0.2920, 0.3271),
    ),
    PublishedRule(
        "porian", "arXiv:2406.19146", "3.7 N^-0.36", "0.7576 N^0.703",
        "AdamW; compute-optimal tokens (D about 20 N), so N alone; at the best batch",
        Monomial({"parameters": -0.36}, math.log2(3.7)), Monomial({"parameters": 0.703}, math.log2(0.7576)),
    ),
    PublishedRule(
        "optimal-norm", "arXiv:2510.03871", "~ B^0.62 D^-0.56", "~ D^0.45",
        "Scion without momentum, constant rate, no weight decay; any batch; exponents only",
        Monomial({"batch": 0.62, "tokens": -0.56}), Monomial({"tokens": 0.45}),
    ),
    PublishedRule(
        "power-lines", "arXiv:2505.13738", "B / (lr wd D) ~ (D/N)^-0.527", "~ D^0.383",
        "AdamW, decay to zero; weight decay held fixed here; exponents only",
        Monomial({"batch": 1.0, "tokens": 0.527 - 1, "parameters": -0.527}), Monomial({"tokens": 0.383}),
    ),
    PublishedRule(
        "bjorck", "arXiv:2409.19913", "~ D^-0.32", "",
        "AdamW; the batch is fixed; exponent only",
        Monomial({"tokens": -0.32}), None,
    ),
)  # fmt: skip
"""The rules of the literature that state their exponents, in the units of this project."""


def published(name: str) -> PublishedRule:
    """One of ``PUBLISHED`` by name.

    Raises:
        UserError: there is no such rule.
    """
    found = next((rule for rule in PUBLISHED if rule.name == name), None)
    if found is None:
        raise UserError(f"no published rule {name!r}; there are {', '.join(rule.name for rule in PUBLISHED)}")
    return found
