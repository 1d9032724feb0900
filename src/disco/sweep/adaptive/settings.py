"""The ``[adaptive]`` table of a study file. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from disco.train.config import ConfigError, number

Quantity = Literal["eta", "norm", "plan"]


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """What an adaptive study is after, and what it may cost."""

    budget: int | None = None
    """Tokens to train on in all; None: a fifth of the full grid, 11 rates for each batch to the longest horizon, but
    no less than eight such runs; see ``rounds.GRID``."""
    quantity: Quantity = "eta"
    """Whose interval has to become narrow: "eta" and "norm", the best learning rate and output norm at the longest
    horizon and its best batch; "plan", the rate that ``disco plan`` recommends for ``tokens``."""
    width: float = 0.35
    """Wanted width of the 90% interval, in octaves."""
    error_rate: float = 0.05
    """Probability of stopping a batch, or a learning rate of it, although it is the best one, at each such decision."""
    tokens: int | None = None
    """Of the run that is planned; needed by "plan"."""


def read_adaptive(table: Any) -> Adaptive | None:
    """The settings of ``adaptive = true`` or of the table ``[adaptive]``; None for ``adaptive = false``.

    Raises:
        ConfigError: an unknown key or a value that makes no sense.
    """
    if isinstance(table, bool):
        return Adaptive() if table else None
    if not isinstance(table, Mapping):
        raise ConfigError(f'adaptive is true, or a table such as {{ budget = "2^24", width = 0.35 }}, got {table!r}')
    known = [field.name for field in fields(Adaptive)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key 'adaptive.{key}'; {hint}")
    numbers = {key: number(value, f"adaptive.{key}") for key, value in table.items() if key != "quantity"}
    whole = {key: round(numbers.pop(key)) for key in ("budget", "tokens") if key in numbers}
    values: dict[str, Any] = {**table, **numbers, **whole}
    found = Adaptive(**values)
    if found.quantity not in get_args(Quantity):
        raise ConfigError(f"adaptive.quantity must be one of {', '.join(get_args(Quantity))}, got {found.quantity!r}")
    for key, value in (("budget", found.budget), ("width", found.width), ("tokens", found.tokens)):
        if value is not None and not value > 0:
            raise ConfigError(f"adaptive.{key} must be above 0, got {table[key]!r}")
    if not 0 < found.error_rate <= 0.5:
        raise ConfigError(f"adaptive.error_rate must be above 0 and at most 0.5, got {found.error_rate:g}")
    if (found.quantity == "plan") != (found.tokens is not None):
        raise ConfigError(
            'adaptive.tokens is the horizon of the planned run: give it with quantity = "plan", and only then'
        )
    return found
