"""``Watch``: checks against a plan from inside any training loop. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from disco.errors import UserError
from disco.guide._course import NORMS, Course, as_it_goes
from disco.guide._plan import Plan
from disco.guide._watch import Check, check

FINEST = 1 / 16
"""Octaves of steps between two points that are kept: memory grows with the logarithm of the run."""

Norms = Mapping[str, float | Mapping[str, float]]


def read_plan(path: Path) -> Plan:
    """What ``disco plan -o`` (or ``--json``) wrote.

    Raises:
        UserError: the file cannot be read or is something else.
    """
    try:
        return Plan.from_dict(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise UserError(
            f"cannot read the plan {path}: {error.strerror}; make it with: disco plan fit.json --tokens D -o plan.json"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what disco plan -o writes: {error}") from None


class Watch:
    """Collects what a training loop reports, and checks it against the plan every ``every`` octaves of steps.

    Args:
        plan: Or the file that ``disco plan -o`` wrote.
        lr: Peak base learning rate of the run; the plan's if not given. So are the next two. The rates given with the
            reports win over it.
        batch: Tokens per step.
        horizon: Tokens to train on.
        every: Octaves of steps between checks.
        settings: Further fields of ``Course``, such as ``warmup`` or ``width``. Of the optimizer (``optimizer``,
            ``momentum``, ``weight_decay``, ``ratios``) what is not given is the study's.

    Raises:
        UserError: the plan's file cannot be read.
    """

    def __init__(
        self,
        plan: Plan | Path | str,
        *,
        lr: float | None = None,
        batch: float | None = None,
        horizon: float | None = None,
        every: float = 0.25,
        **settings: Any,
    ) -> None:
        self.plan = plan if isinstance(plan, Plan) else read_plan(Path(plan))
        self._every = every
        nothing = np.zeros(0)
        self._scheduled = Course(
            tokens=nothing, path=nothing, lr=nothing, norm=nothing, loss=nothing,
            rate=lr or self.plan.lr.value, batch=batch or self.plan.batch.value,
            horizon=horizon or float(self.plan.tokens), **_optimizer(self.plan.settings) | settings,
        )  # fmt: skip
        self._points: list[dict[str, float]] = []
        self._path, self._step, self._due = 0.0, 0, 0.0

    def __call__(
        self,
        step: int,
        tokens: float,
        loss: float,
        norms: Norms | None = None,
        lr: float | None = None,
        momenta: Norms | None = None,
    ) -> Check | None:
        """Takes a report; returns a check when one is due, or when the loss is not finite.

        A check that is due waits for norms, for at most an octave of steps. A step that is not after the last one means
        that the run went back to a checkpoint.

        Args:
            step: Updates made so far.
            tokens: Trained on so far.
            loss: Nats of training.
            norms: Layer group -> its norm, or its layers' norms, such as
                ``{group: optimizer.norms(groups=[group]) for group in ("input", "hidden", "output")}``; None: not now.
            lr: Base learning rate of the steps since the last report; that of the schedule if not given.
            momenta: Like ``norms``, of ``optimizer.norms("frobenius", "momentum", groups=[group])``: they show a batch
                that is not the declared one.
        """
        if step <= self._step:
            self._back_to(step)
        if lr is None:
            batch = self._scheduled.batch
            self._path += self._scheduled.ahead(self._step * batch, step * batch)
            lr = self._scheduled.rate * self._scheduled.factor_of(step * batch)
        else:
            self._path += lr * (step - self._step)
        self._step = step
        diverged = not math.isfinite(loss)
        due = diverged or (step >= self._due and (bool(norms) or step >= 2 * self._due))
        if not due and step < self._kept(with_norms=bool(norms)) * 2**FINEST:
            return None
        point = {"step": float(step), "tokens": tokens, "loss": loss, "lr": lr, "path": self._path}
        for name, values in (("norm", norms), ("momentum", momenta)):
            point |= {f"{name}/{group}": _largest(value) for group, value in (values or {}).items()}
        self._points.append(point)
        if not due:
            return None
        self._due = max(step, 1) * 2**self._every
        return check(self.course, self.plan, "diverged" if diverged else "")

    @property
    def course(self) -> Course:
        """The run so far."""

        def column(name: str) -> np.ndarray:
            return np.array([point.get(name, math.nan) for point in self._points])

        def by_group(prefix: str) -> dict[str, np.ndarray]:
            names = dict.fromkeys(name for point in self._points for name in point if name.startswith(prefix))
            return {name.removeprefix(prefix): column(name) for name in names}

        norms, momenta = by_group("norm/"), by_group("momentum/")
        tokens, path, lr, loss = map(column, ("tokens", "path", "lr", "loss"))
        norm = norms.get("output", column("norm/output"))
        return as_it_goes(replace(
            self._scheduled, tokens=tokens, path=path, lr=lr, norm=norm, loss=loss, norms=norms, momenta=momenta
        ))  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the training loop should keep, in JSON types."""
        return {"points": [dict(point) for point in self._points], "path": self._path, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``."""
        self._points = [dict(point) for point in state["points"]]
        self._path, self._step, self._due = state["path"], state["step"], 0.0

    def _kept(self, with_norms: bool) -> float:
        """Step of the last point that was kept, or of the last with norms."""
        kept = (each for each in reversed(self._points) if not with_norms or any("norm/" in name for name in each))
        return next(kept, {"step": 0.0})["step"]

    def _back_to(self, step: int) -> None:
        self._points = [point for point in self._points if point["step"] < step]
        last = self._points[-1] if self._points else {"path": 0.0, "step": 0.0}
        self._path, self._step, self._due = last["path"], int(last["step"]), 0.0


def _optimizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``Course`` for a study's optimizer, as far as it is known."""
    names = {"optimizer": "name", "momentum": "momentum", "weight_decay": "weight_decay"}
    values = {name: settings.get(f"optimizer.{key}") for name, key in names.items()}
    found = {name: value for name, value in values.items() if value is not None}
    ratios = {group: settings.get(f"optimizer.ratios.{group}") for group in NORMS}
    return {**found, "ratios": {group: ratio for group, ratio in ratios.items() if isinstance(ratio, int | float)}}


def _largest(value: float | Mapping[str, float]) -> float:
    return max(value.values(), default=math.nan) if isinstance(value, Mapping) else float(value)
