"""Carries an adaptive study out, round after round, and keeps its journal. No torch.

<out>/rounds.jsonl   one line per round:
    {"round", "spent", "lines", "orders": [{"scan", "batch", "rate", "tokens", "run"}, ...], "answers": {scan: {...}}}

A round is written before its runs are trained, and follows from the records up to the horizons that the rounds before
it asked for. So a study that was killed reads its journal, finishes the last round and goes on as if nothing had
happened.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from disco.errors import UserError
from disco.files import replacing
from disco.runs.horizons import powers_of_two
from disco.runs.lock import locked
from disco.runs.reader import read_run
from disco.runs.table import columns
from disco.runs.units import counted, power, two_to
from disco.sweep.adaptive.policy import Round, decide
from disco.sweep.adaptive.scans import Columns, Order, Space
from disco.sweep.adaptive.settings import Adaptive
from disco.sweep.axes import power_of_two
from disco.sweep.engines.local import Result
from disco.sweep.record import tokens_reached
from disco.sweep.study import Study, ordered, scan_key, scan_names
from disco.train.config import TrainConfig

ROUNDS, LOCK = "rounds.jsonl", "rounds.lock"
GRID, SHARE, LEAST = 11, 5, 8
"""Without a budget in the file it is 1/SHARE of a full grid: GRID rates (steps of sqrt(2) over 2.5 octaves to either
side of the optimum) for each batch, to the longest horizon; but LEAST runs to it at least."""
NOTHING: Columns = {name: np.zeros(0) for name in ("batch", "lr", "tokens", "loss")}


@dataclass(frozen=True)
class Scan:
    """Runs that differ in learning rate, batch and horizon only."""

    key: str
    name: str
    """In which it differs from the study's other scans; empty where there is one only."""
    template: TrainConfig
    space: Space

    def __str__(self) -> str:
        batches = ", ".join(map(power, self.space.batches))
        low, high = (two_to(rate) for rate in (self.space.rates[0], self.space.rates[-1]))
        name = f"{self.name}: " if self.name else ""
        return f"{name}batches {batches}, to {power(self.space.last)} tokens, learning rates from {low} .. {high} on"

    def config(self, order: Order) -> TrainConfig:
        """The run of an order."""
        optimizer = dataclasses.replace(self.template.optimizer, lr=power_of_two(order.rate))
        return dataclasses.replace(self.template, optimizer=optimizer, batch=order.batch, horizon=order.tokens)


@dataclass(frozen=True)
class Entry:
    """One round in the journal; without orders the study ends with it."""

    round: int
    spent: int
    """Tokens trained on before."""
    lines: tuple[str, ...]
    orders: tuple[Mapping[str, Any], ...] = ()
    """Keys scan, batch, rate (log2), tokens and run (its id)."""
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By scan, see ``policy.Round.answer``."""

    def __str__(self) -> str:
        runs = f"{len(self.orders)} runs" if self.orders else "the end"
        return "\n  ".join((f"round {self.round}, after {counted(self.spent)} tokens: {runs}", *self.lines))


def scans(study: Study) -> tuple[Scan, ...]:
    """The scans of an adaptive study: batches, horizons and first rates are those of its file."""
    assert study.adaptive is not None
    groups: dict[str, list[TrainConfig]] = {}
    for config in sorted(study.configs, key=lambda c: (c.model.width, c.model.depth, c.seed)):
        groups.setdefault(scan_key(config), []).append(config)
    templates = [dataclasses.replace(group[0], keep=()) for group in groups.values()]
    names = scan_names([_alike(template) for template in templates]) if len(groups) > 1 else [""]
    return tuple(
        Scan(key, name, template, _space(group, study.adaptive, len(groups)))
        for (key, group), name, template in zip(groups.items(), names, templates, strict=True)
    )


def _alike(config: TrainConfig) -> TrainConfig:
    """With batch, rate and horizon that say nothing."""
    context = config.model.context
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, lr=1.0), batch=context, horizon=context
    )


def _space(group: Sequence[TrainConfig], settings: Adaptive, count: int) -> Space:
    batches = tuple(sorted({config.batch for config in group}))
    last = max(config.horizon for config in group)
    divided = powers_of_two(math.lcm(*batches), group[0].data.valid_tokens, last)
    horizons = tuple(sorted({*divided, last}))
    default = max(GRID * len(batches) // SHARE, LEAST) * last
    budget = default if settings.budget is None else settings.budget // count
    space = Space(batches, horizons, (), budget, settings)
    logs = sorted(round(math.log2(config.optimizer.lr), 6) for config in group if config.batch == space.start)
    middle = logs[len(logs) // 2]
    reach = range(math.ceil(logs[0] - middle), math.floor(logs[-1] - middle) + 1)
    return dataclasses.replace(space, rates=tuple(middle + octaves for octaves in reach))


def run_rounds(study: Study, out: Path, train: Callable[[Study], Result], said: Callable[[Entry], None]) -> Result:
    """Trains an adaptive study to its end, or continues it.

    Args:
        study: the study; its data are prepared in ``out``.
        out: folder of run records and journal; made if needed.
        train: trains the runs of a plan that are not done, as ``engines.local.run_study`` does.
        said: told of every new round before it is trained.

    Returns:
        How the last round ended; after a failed run or a signal no further round is made.

    Raises:
        UserError: another process works in ``out``, or its journal is damaged or another study's.
    """
    every = scans(study)
    with locked(out / LOCK, wait=1.0):
        journal, result = list(read_rounds(out)), None
        while True:
            if journal and journal[-1].orders:
                result = train(_plan(study, every, journal))
                if result.failed or result.signal is not None:
                    return result
            entry = next_round(every, journal, out)
            ended = journal[-1] if journal and not journal[-1].orders else None
            if ended is None or entry.orders or (entry.lines, entry.answers) != (ended.lines, ended.answers):
                journal.append(entry)
                _write(journal, out)
                said(entry)
            if not entry.orders:
                return result or train(_plan(study, every, journal))


def read_rounds(out: Path) -> tuple[Entry, ...]:
    """The journal of the study in ``out``; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = out / ROUNDS
    if not path.exists():
        return ()
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
            entries.append(Entry(**entry | {"lines": tuple(entry["lines"]), "orders": tuple(entry["orders"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: damaged ({error}); delete the file to decide the rounds again") from None
    return tuple(entries)


def _write(journal: Sequence[Entry], out: Path) -> None:
    with replacing(out / ROUNDS) as file:
        for entry in journal:
            file.write(json.dumps(asdict(entry), sort_keys=True, allow_nan=False).encode() + b"\n")


def next_round(every: Sequence[Scan], journal: Sequence[Entry], out: Path) -> Entry:
    """What follows from the records of the rounds so far, all of them trained."""
    horizons = _horizons(every, journal)
    rounds: dict[str, Round] = {}
    spent = 0
    for scan in every:
        own = horizons[scan.key]
        used = sum(min(tokens_reached(config, out), config.horizon) for config in own.values())
        rounds[scan.key] = decide(scan.space, _known(own, scan.space, out), used)
        spent += used
    orders = [
        {"scan": scan.key, **asdict(order), "run": scan.config(order).id}
        for scan in every for order in rounds[scan.key].orders
    ]  # fmt: skip
    said = {line for entry in journal for line in entry.lines}
    lines: list[str] = []
    for scan in every:
        reasons = [f"{scan.name}: {line}" if scan.name else line for line in rounds[scan.key].lines]
        news = rounds[scan.key].orders or not orders or not said.issuperset(reasons)
        lines += reasons if news else []  # a scan that has ended says so once, and at the end of the study
    answers = {key: dict(round.answer) for key, round in rounds.items() if round.answer}
    return Entry(len(journal) + 1, spent, tuple(lines), tuple(orders), answers)


def _horizons(every: Sequence[Scan], journal: Sequence[Entry]) -> dict[str, dict[str, TrainConfig]]:
    """By scan and run id: the runs so far, each with the longest horizon that a round asked for."""
    by_key = {scan.key: scan for scan in every}
    found: dict[str, dict[str, TrainConfig]] = {scan.key: {} for scan in every}
    for entry in journal:
        for order in entry.orders:
            if order["scan"] not in by_key:
                raise UserError(
                    f"round {entry.round} of the journal is of runs that are not in the study; use another --out"
                )
            config = by_key[order["scan"]].config(Order(order["batch"], order["rate"], order["tokens"]))
            known = found[order["scan"]].get(config.id, config)
            found[order["scan"]][config.id] = max(known, config, key=lambda c: c.horizon)
    return found


def _known(runs: Mapping[str, TrainConfig], space: Space, out: Path) -> Columns:
    """The rows of these runs up to the horizons that were asked for, and of no others."""
    if not runs:
        return NOTHING
    table = columns([read_run(out / run) for run in runs])
    asked = np.array([runs[run].horizon for run in table["run"]])
    keep = (table["tokens"] <= asked) & np.isin(table["tokens"], space.horizons)
    return {name: values[keep] for name, values in table.items()}


def _plan(study: Study, every: Sequence[Scan], journal: Sequence[Entry]) -> Study:
    """All runs of the rounds so far."""
    runs = [config for own in _horizons(every, journal).values() for config in own.values()]
    return dataclasses.replace(study, configs=tuple(ordered(runs)))
