"""Settings of the sweep and of the run to plan: where they differ, a rule may not hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from disco.errors import UserError
from disco.fit import Result
from disco.runs.imported import IMPORTED
from disco.runs.reader import Run
from disco.runs.table import families

Settings = Mapping[str, Any]
"""Values by dotted name, as in a run's configuration: {"optimizer.momentum": 0.9, ...}."""

COMPARED: Mapping[str, tuple[str, str]] = {
    "optimizer.name": ("optimizer", "its learning rates are in other units"),
    "schedule.shape": ("schedule", "the best rate goes with the whole schedule"),
    "schedule.decay": ("decay of the learning rate (fraction)", "it moves the best rate and flattens the optimum"),
    "schedule.warmup": ("warmup (tokens)", "it matters where it is a large part of the run"),
    "optimizer.momentum": ("momentum", "it moves the best rate and flattens its rise with the batch"),
    "optimizer.nesterov": ("Nesterov's momentum", "it moves the best rate"),
    "optimizer.betas": ("Adam's betas", "they move the best norm by octaves"),
    "optimizer.weight_decay": ("weight decay", "it caps the norms, and the best rate goes with it"),
    "optimizer.orthogonalize": ("orthogonalisation", "step sizes differ by up to a fifth"),
    "optimizer.ratios.input": ("ratio of the input layer", "the base rate moves with the ratios"),
    "optimizer.ratios.hidden": ("ratio of hidden layers", "the base rate moves with the ratios"),
    "optimizer.ratios.output": ("ratio of the output layer", "the base rate moves with the ratios"),
    "model.context": ("context (tokens)", "a batch of equal tokens has another number of sequences"),
    "model.placement": ("placement of normalisation", "the best norm moves by octaves"),
    "model.residual": ("residual form", "the best rate may move"),
    "model.depth_init": ("initial scale by depth", "the best rate may move a little"),
    "data.tokenizer": ("tokenizer", "tokens are not the same unit"),
    "data.vocab": ("vocabulary", "tokens are not the same unit, and the output layer grows with it"),
}  # fmt: skip
"""What is compared, its name in words, and why it matters (arXiv:2510.03871, appendix, for most)."""
RATIOS = ("optimizer.ratios.input", "optimizer.ratios.hidden", "optimizer.ratios.output")
"""1 where our own records do not name them."""
ADAPTIVE = ("adam", "adamw")
VARIES = "varies"
"""Stands for a setting in which the runs of a family differ."""


@dataclass(frozen=True)
class Difference(Result):
    """A setting of the planned run that is not the sweep's."""

    setting: str
    """Dotted name."""
    sweep: str
    run: str
    why: str
    """What it does."""

    @property
    def text(self) -> str:
        """In a sentence."""
        return f"{COMPARED[self.setting][0]} is {self.run}, in the sweep {self.sweep}: {self.why}"


def sweep_settings(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """The settings of the runs of every family, by family, for ``plan`` to compare with those of the run to plan."""
    runs = list(runs)
    found: dict[str, dict[str, Any]] = {}
    for run, family in zip(runs, families(runs), strict=True):
        own = flat_settings(run.config)
        if IMPORTED not in run.config:
            own = dict.fromkeys(RATIOS, 1.0) | own
        if own.get("schedule.decay") is not None:
            own.setdefault("schedule.shape", "linear decay" if own["schedule.decay"] else "constant")
        known = found.setdefault(family, dict(own))
        for name in {*known, *own}:
            if name in COMPARED and known.get(name) != own.get(name):
                known[name] = VARIES
    return {
        family: {name: settings[name] for name in COMPARED if settings.get(name) is not None}
        for family, settings in found.items()
    }


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def differences(sweep: Settings, run: Settings) -> tuple[Difference, ...]:
    """Where a planned run, as far as its settings are given, is not like the sweep, as far as that is known.

    Raises:
        UserError: a setting of the run is not a number where the sweep's is.
    """
    found = []
    for name, (_, why) in COMPARED.items():
        here, there = run.get(name), sweep.get(name)
        if here is None or there is None:
            continue
        if _number(there) and not _number(here):
            raise UserError(f"plan: {name} of the run must be a number, got {here!r}")
        same = math.isclose(here, there) if _number(here) and _number(there) else here == there
        if not same:
            found.append(Difference(name, _said(there), _said(here), why))
    return tuple(found)


def unrecorded(sweep: Settings, run: Settings) -> tuple[str, ...]:
    """Settings (dotted names) that a planned run gives and the sweep's table or records do not tell."""
    return tuple(name for name in COMPARED if run.get(name) is not None and sweep.get(name) is None)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _said(value: Any) -> str:
    return f"{value:g}" if _number(value) else str(value)


def adaptive(sweep: Settings, family: str) -> bool:
    """Whether the learning rate is Adam's, which no theory of norms carries over a change of width."""
    name = str(sweep.get("optimizer.name") or family.split(",")[0]).lower()
    return name in ADAPTIVE or name.startswith("adam")
