"""One run so far: its settings, and what was logged along its tokens. Plain numbers and arrays; no files, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from disco.runs.imported import IMPORTED
from disco.runs.reader import Run
from disco.runs.schema import MOMENTUM, Metric, lr_key
from disco.train import schedule

Array = NDArray[np.float64]

NORMS: Mapping[str, str] = {
    "input": "one_to_rms", "hidden": "rms_to_rms", "output": "rms_to_inf", "vector": "rms",
}  # fmt: skip
"""Layer group -> its own norm, that whose steps have size 1."""
NODES = 4096
"""Most nodes over which a schedule is summed."""
ENDING = 0.05
"""Share of the peak below which a falling rate no longer tells it."""
SAME = 0.05
"""Octaves within which a logged rate is the scheduled one."""
STIRRING, JUMP = 0.005, 0.98
"""Octaves by which the peak that the logged rates mean moves over the last half octave of tokens, if it does, and the
part of that in one place from which it is a jump to another peak."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """One run so far, over its logged points in order of tokens; all arrays have one length, NaN where not logged."""

    tokens: Array
    path: Array
    """Sum of the base learning rates of the steps so far."""
    lr: Array
    """Base learning rate of the step before (of the first at the start)."""
    norm: Array
    """rms_to_inf of the output layer."""
    loss: Array
    """Nats; of training where it was logged."""
    norms: Mapping[str, Array] = field(default_factory=dict)
    """Layer group -> its own norm (``NORMS``), the largest of its layers'."""
    momenta: Mapping[str, Array] = field(default_factory=dict)
    """Layer group -> Frobenius norm of the momentum (without any, of the gradient), the largest of its layers'."""
    batch: float
    """Tokens per step."""
    rate: float
    """Peak base learning rate, as the run goes on from here."""
    horizon: float = math.nan
    """Tokens that it will train on; NaN unknown."""
    momentum: float = 0.0
    """Weight of the old buffer; NaN unknown."""
    weight_decay: float = 0.0
    """lambda of W <- (1 - lr lambda) W; NaN unknown."""
    warmup: float = 0.0
    """Tokens over which the rate rises linearly."""
    decay: float = 0.0
    """Fraction of the horizon, at its end, over which it falls linearly to 0."""
    width: float = math.nan
    depth: float = math.nan
    vocab: float = math.nan
    optimizer: str = "scion"
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of a layer group over the base rate; 1 where not named."""
    seed: int = 0
    """Of weights and data: runs that share it share much of their chance."""
    family: str = ""
    """What separates studies (``runs.table.families``); empty where it does not matter."""

    def until(self, tokens: float) -> Course:
        """What was known after so many tokens."""
        keep = self.tokens <= tokens * (1 + 1e-9)
        arrays = {name: getattr(self, name)[keep] for name in ("tokens", "path", "lr", "norm", "loss")}
        norms, momenta = ({group: y[keep] for group, y in each.items()} for each in (self.norms, self.momenta))
        return replace(self, **arrays, norms=norms, momenta=momenta)

    def at_rate(self, rate: float) -> Course:
        """The same past, with another peak base rate from here on."""
        return replace(self, rate=rate)

    def factor(self, tokens: Array | float) -> Array:
        """Scheduled learning rate after so many tokens over its peak."""
        at = np.asarray(tokens, dtype=float)
        rise = np.minimum(1.0, at / self.warmup) if self.warmup > 0 else np.ones_like(at)
        if not (self.decay > 0 and math.isfinite(self.horizon)):
            return rise
        start = self.horizon * (1 - self.decay)
        return np.minimum(rise, np.clip(1 - (at - start) / (self.horizon - start), 0.0, 1.0))

    def factor_of(self, tokens: float) -> float:
        """The trainer's factor of the update that ends at so many tokens (``train.schedule.factor``)."""
        step = max(round(tokens / self.batch), 1) - 1
        steps = max(round(self.horizon / self.batch), step + 1) if math.isfinite(self.horizon) else step + 1
        decay = self.decay * steps if math.isfinite(self.horizon) else 0.0
        return schedule.factor(step, steps=steps, warmup=self.warmup / self.batch, decay=decay)

    def path_at(self, tokens: float) -> float:
        """Path after so many tokens: walked so far (linear between logged points), then as scheduled at ``rate``."""
        known = np.isfinite(self.path)
        done, path = self.tokens[known], self.path[known]
        if not len(done):
            done, path = np.zeros(1), np.zeros(1)
        if tokens <= done[-1]:
            return float(np.interp(tokens, np.concatenate([[0.0], done]), np.concatenate([[0.0], path])))
        return float(path[-1]) + self.ahead(float(done[-1]), tokens)

    def ahead(self, start: float, end: float) -> float:
        """Path that the schedule walks between two numbers of tokens at ``rate``."""
        steps = max((end - start) / self.batch, 0.0)
        nodes = min(max(math.ceil(steps), 1), NODES)
        middles = start + (np.arange(nodes) + 0.5) * (end - start) / nodes
        return float(self.rate * steps * np.mean(self.factor(middles)))

    def group_norm(self, group: str) -> Array:
        """Norm of a layer group; all NaN where it was not logged."""
        if group == "output":
            return self.norm
        return self.norms.get(group, np.full(len(self.tokens), math.nan))

    @property
    def last(self) -> float:
        """Tokens of the last point; 0 before any."""
        return float(self.tokens[-1]) if len(self.tokens) else 0.0


def course(run: Run, family: str = "") -> Course:
    """The course of a run's record, finished or not.

    Where no path was logged it is the sum of the logged rates (each for the steps since the line before), or else that
    of the schedule. Where the last logged rate is not the scheduled one, the run is taken to go on at that.
    """
    config = run.config
    optimizer, planned = config["optimizer"], config.get("schedule") or {}
    missing = math.nan if IMPORTED in config else 0.0
    ratios = {group: float(ratio) for group, ratio in (optimizer.get("ratios") or {}).items()}
    tokens = run.column(Metric.TOKENS)
    empty = np.full(len(tokens), math.nan)
    lr, path = _base_rate(run, ratios, empty), run.column(Metric.PATH)
    norms = {group: run.norm(group, name) for group, name in NORMS.items() if run.groups.get(group)}
    momenta = {group: run.norm(group, *MOMENTUM) for group in norms}
    trained = run.column(Metric.LOSS_TRAIN)
    found = Course(
        tokens=tokens, path=path, lr=lr, norm=norms.get("output", empty), norms=norms,
        momenta={group: values for group, values in momenta.items() if np.isfinite(values).any()},
        loss=trained if np.isfinite(trained).any() else run.column(Metric.LOSS_VALID),
        batch=float(config["batch"]), rate=float(optimizer["lr"]), horizon=float(config["horizon"]),
        momentum=_number(optimizer.get("momentum", missing)),
        weight_decay=_number(optimizer.get("weight_decay", missing)),
        warmup=_number(planned.get("warmup"), 0.0), decay=_number(planned.get("decay"), 0.0),
        width=_number(config["model"].get("width")), depth=_number(config["model"].get("depth")),
        vocab=_number((config.get("data") or {}).get("vocab")),
        optimizer=str(optimizer["name"]), ratios=ratios, seed=int(config.get("seed") or 0), family=family,
    )  # fmt: skip
    if not np.isfinite(path).any() and len(tokens):
        found = replace(found, path=_summed(found))
    elif "table" in config.get(IMPORTED, {}) and not np.isfinite(lr).any():
        found = replace(found, lr=_rate_along(found))
    return as_it_goes(found)


def _base_rate(run: Run, ratios: Mapping[str, float], empty: Array) -> Array:
    for group in ("output", "hidden", "input"):
        if lr_key(group) in run.metrics:
            return np.asarray(run.column(lr_key(group)) / ratios.get(group, 1.0))
    return empty


def _summed(of: Course) -> Array:
    """Path from the logged rates, of the schedule where there are none."""
    if not np.isfinite(of.lr).all():
        return np.array([of.ahead(0.0, tokens) for tokens in of.tokens])
    steps = np.diff(of.tokens, prepend=0.0) / of.batch
    return np.asarray(np.cumsum(steps * of.lr))


def _rate_along(of: Course) -> Array:
    """The logged rates from the path that was summed over them, line by line (``runs.convert``)."""
    steps = np.diff(of.tokens, prepend=0.0) / of.batch
    return np.asarray(np.diff(of.path, prepend=0.0) / np.where(steps > 0, steps, math.nan))


def as_it_goes(of: Course) -> Course:
    """With the peak rate that the last logged one means, if that is clearly another than the scheduled one."""
    known = _rated(of)
    if not known.any():
        return of
    at = float(of.tokens[known][-1])
    now, factor = float(of.lr[known][-1]), of.factor_of(at)
    if (factor < ENDING and at > of.warmup) or not factor > 0:
        return of
    return of if abs(math.log2(now / (of.rate * factor))) < SAME else replace(of, rate=now / factor)


def stirring(of: Course) -> str:
    """How the logged rates contradict the declared schedule, so that the rate to come is not known; empty if not.

    Over the last half octave of tokens the peak that they mean moves, and not in one jump.
    """
    known = _rated(of)
    tokens, lr = of.tokens[known], of.lr[known]
    factors = np.array([of.factor_of(float(at)) for at in tokens])
    usable = factors > ENDING
    tokens, factors, peaks = tokens[usable], factors[usable], np.log2(lr[usable] / factors[usable])
    if len(tokens) < 3:
        return ""
    near = tokens >= tokens[-1] / math.sqrt(2)
    near[-4:] = True
    # The rate of one step earlier or later may have been logged.
    first, last = (float(each) for each in tokens[near][[0, -1]])
    shift = max(abs(math.log2(of.factor_of(at + of.batch) / of.factor_of(at))) for at in (first, last))
    moved = float(peaks[near][-1] - peaks[near][0])
    if abs(moved) < STIRRING + shift or np.abs(np.diff(peaks[near])).max() > JUMP * abs(moved):
        return ""
    if moved > 0:
        return f"the logged rate rises, and no {'such ' if of.warmup > 0 else ''}warmup is declared"
    return f"the logged rate falls, and no {'such ' if of.decay > 0 else ''}decay is declared"


def _rated(of: Course) -> NDArray[np.bool_]:
    return np.isfinite(of.lr) & (of.lr > 0) & (of.tokens > 0)


def _number(value: object, missing: float = math.nan) -> float:
    return float(value) if isinstance(value, int | float) else missing
