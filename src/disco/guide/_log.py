"""Another trainer's log as a course: JSON lines, CSV, TSV, Parquet, torchtitan's text, trainer_state.json.

Columns are those of docs/import.md, mapped by ``--map`` and presets. What a log does not tell is taken as planned.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from disco.errors import UserError
from disco.guide._course import Course, course
from disco.guide._plan import Plan
from disco.guide._tail import Tail
from disco.runs.convert import to_runs
from disco.runs.imported import IMPORTED
from disco.runs.ingest import ingest
from disco.runs.presets import expand
from disco.runs.schema import Outcome
from disco.runs.sources import MISSING, from_chart, from_rows, read_table
from disco.runs.units import counted

STATE = "trainer_state.json"
"""Log of Hugging Face's Trainer, rewritten at each of its checkpoints."""
STEPS = ("step", "_step", "Step", "global_step", "tokens")
"""Columns that tell the order of a log; the first that is there does."""
UNSORTED = 0.1
"""Share of rows that step back, above which a table is not in order of steps, rather than resumed."""
ENOUGH = 10
"""Rows after which a column that is missing is not expected any more."""
DECLARED: Mapping[str, str] = {
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "ratio_input": "optimizer.ratios.input",
    "ratio_hidden": "optimizer.ratios.hidden",
    "ratio_output": "optimizer.ratios.output",
    "warmup": "schedule.warmup",
    "decay": "schedule.decay",
}
"""Column of a run -> the setting of the study that stands in for it."""
_METRICS = re.compile(r"\bstep:\s*\d")
_PAIR = re.compile(r"([A-Za-z_][\w/.]*):\s*([-+]?(?:\d[\d,]*(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf))")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How another trainer's log is read."""

    maps: tuple[str, ...] = ()
    """Assignments NAME=EXPRESSION (``runs.mapping``)."""
    preset: str = ""
    run: str = ""
    """Which run of a log that holds several."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the run, by dotted name, such as optimizer.momentum; the study's where they are not given."""


class StuckError(UserError):
    """A log that can be read only if the user says how."""


class Log:
    """A log that may still grow."""

    def __init__(self, path: Path, plan: Plan, columns: Columns) -> None:
        self._path, self._plan, self._columns = path, plan, columns
        self._suffix = path.suffix.lower()
        self._tail = Tail(path)
        self._rows: list[dict[str, Any]] = []
        self._header: list[str] = []

    @staticmethod
    def home(path: Path) -> Path:
        """The log in a folder of Hugging Face's Trainer: of its latest checkpoint; the path itself if it is none."""
        states = [*path.glob(STATE), *path.glob(f"checkpoint-*/{STATE}")]
        return max(states, key=_changed) if states else path

    def look(self) -> tuple[Course | None, str, tuple[str, ...]]:
        """The course so far, the outcome if the run has ended, and notes.

        Raises:
            UserError: the file cannot be read, or has no columns yet to make a course of.
            StuckError: there are several runs, or the columns are still missing after ``ENOUGH`` rows.
        """
        if self._suffix in (".parquet", ".gz"):
            table = read_table(self._path)
        else:
            if self._suffix == ".json":
                self._reread()
            else:
                self._read_on()
            table = from_chart(from_rows(without_abandoned(self._rows)))
        if not len(table):
            return None, "", (f"{self._path} holds no measurements yet",)
        try:
            return self._course(table)
        except UserError as error:
            raise StuckError(str(error)) if len(table) >= ENOUGH else error from None

    def _read_on(self) -> None:
        new, void = self._tail.read()
        if void:
            self._rows, self._header = [], []
        for text in new:
            line = text.decode(errors="replace").strip("\r\n\ufeff")
            if self._suffix in (".jsonl", ".ndjson"):
                row = _object(line)
            elif self._suffix in (".csv", ".tsv"):
                row = self._cells(line, "," if self._suffix == ".csv" else "\t")
            else:
                row = _titan(line)
            if row:
                self._rows.append(row)

    def _reread(self) -> None:
        """A file that its writer replaces; while it is half written, what was read before stands."""
        try:
            history = _object(self._path.read_text(errors="replace")).get("log_history")
        except OSError:
            return
        if isinstance(history, list):
            self._rows = [row for row in history if isinstance(row, dict)]

    def _cells(self, line: str, separator: str) -> dict[str, Any]:
        try:
            values = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:
            return {}
        if not self._header:
            self._header = [name.strip() for name in values]
            return {}
        if len(values) != len(self._header) or values == self._header:  # damaged, or the head of a rotated file
            return {}
        return {name: None if text in MISSING else text for name, text in zip(self._header, values, strict=True)}

    def _course(self, table: pl.DataFrame) -> tuple[Course | None, str, tuple[str, ...]]:
        preset = self._columns.preset or self._guess(table)
        table, maps = expand(preset, table) if preset else (table, [])
        given = [text.partition("=")[0].strip() for text in self._columns.maps]
        maps = [text for text in maps if text.partition("=")[0] not in given] + list(self._columns.maps)
        planned, notes = self._planned({*table.columns, *(text.partition("=")[0].strip() for text in maps)})
        runs = to_runs(ingest(table, [*maps, *planned], "", "series", str(self._path)))
        runs = tuple(sorted(runs, key=lambda run: str(run.config[IMPORTED].get("run"))))
        names = [str(run.config[IMPORTED].get("run")) for run in runs]
        wanted = self._columns.run or (names[0] if len(names) == 1 else "")
        if wanted not in names:
            raise StuckError(f"{self._path} holds {len(names)} runs; say which with --name: {', '.join(names[:8])}")
        run = runs[names.index(wanted)]
        horizon = int(self._columns.settings.get("horizon") or self._plan.tokens)
        config = {**run.config, "horizon": horizon}
        if "optimizer.lr" in self._columns.settings:  # the peak; the largest so far is only that of the log
            config["optimizer"] = {**config["optimizer"], "lr": float(self._columns.settings["optimizer.lr"])}
        found = course(replace(run, config=config))
        if run.outcome == Outcome.DIVERGED:
            return found, str(Outcome.DIVERGED), notes
        return found, str(Outcome.FINISHED) if _complete(found) else "", notes

    def _guess(self, table: pl.DataFrame) -> str:
        if self._suffix == ".json":
            return "transformers"
        titan = self._suffix not in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")
        return "torchtitan" if titan or "loss_metrics/global_avg_loss" in table.columns else ""

    def _planned(self, known: set[str]) -> tuple[list[str], tuple[str, ...]]:
        """Assignments for what nothing gives, and a note of those that matter."""
        maps, notes = [], []
        if not {"step", "tokens"} & known:
            step = next((name for name in STEPS if name in known), None)
            maps += [f"step=`{step}`"] if step else []
        for name, value in (("lr", self._plan.lr.value), ("batch", self._plan.batch.value)):
            value = self._columns.settings.get({"lr": "optimizer.lr"}.get(name, name), value)
            if name not in known and math.isfinite(value):
                maps.append(f"{name}={value!r}")
                notes.append(f"the log does not tell {name}: taken as planned")
        declared: dict[str, float] = {}
        for name, setting in DECLARED.items():
            value = self._columns.settings.get(setting, self._plan.settings.get(setting))
            if name not in known and isinstance(value, int | float):
                declared[name] = float(value)
        if "decay" not in known:
            declared.setdefault("decay", 0.0)  # or it would be guessed from what has been logged so far
        maps += [f"{name}={value!r}" for name, value in declared.items()]
        told = {*known, *(name for name, setting in DECLARED.items() if setting in self._columns.settings)}
        if not {"warmup", "decay"} & told:
            notes.append(f"the log does not tell the schedule: taken as planned: {_schedule(declared)}")
        optimizer = self._columns.settings.get("optimizer.name", self._plan.settings.get("optimizer.name"))
        if "optimizer" not in known and optimizer:
            maps.append(f"optimizer='{optimizer}'")
        if not {"run", "run_name"} & known:
            maps.append("run='log'")
        return maps, tuple(notes)


def _schedule(declared: Mapping[str, float]) -> str:
    """In words."""
    parts = [f"a warmup of {counted(declared['warmup'])} tokens"] if declared.get("warmup") else []
    parts += [f"a decay over the last {declared['decay']:.0%}"] if declared.get("decay") else []
    return " and ".join(parts) or "constant"


def _complete(course: Course) -> bool:
    """Whether a log's run is at its end: no other line as far on as the last was is to come."""
    steps = np.diff(course.tokens, prepend=0.0)
    return bool(course.horizon - course.last < max(course.batch, float(steps[steps > 0][-1]) if course.last else 0.0))


def _changed(file: Path) -> float:
    """When a file was last written; -1 if it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return -1.0


def without_abandoned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without those that a later one takes back: a run that resumes from a checkpoint logs its steps once more."""
    name = next((each for each in STEPS if any(each in row for row in rows)), None)
    least: dict[Any, float] = {}
    kept, back = [], 0
    for row in reversed(rows):
        at = _number(row.get(name)) if name else math.nan
        of = str(row.get("run", row.get("run_name")))
        bound = least.get(of, math.inf)
        if at > bound:
            back += 1
            continue
        if math.isfinite(at):
            least[of] = at
        kept.append(row)
    return list(rows) if back > UNSORTED * len(rows) + 100 else kept[::-1]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _object(text: str) -> dict[str, Any]:
    """A JSON object; empty if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _titan(line: str) -> dict[str, Any]:
    """The metrics "name: number" of a line with a step; empty if it has none."""
    plain = _COLOUR.sub("", line)
    if not _METRICS.search(plain):
        return {}
    return {name.rpartition(".")[2]: float(text.replace(",", "")) for name, text in _PAIR.findall(plain)}
