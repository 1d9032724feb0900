"""Reads run records, finished or not. Damage is reported with file and line; what is sound is kept. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import numpy as np

from disco.errors import UserError
from disco.runs.schema import CONFIG, METRICS, SCHEMA_VERSION, SUMMARY, Metric, Outcome, norm_key

LARGEST = sys.float_info.max

SETTINGS: Mapping[str, Any] = {
    "batch": int,
    "horizon": int,
    "model.width": int,
    "model.depth": int,
    "data.valid_tokens": int,
    "optimizer.lr": (int, float),
    "optimizer.name": str,
    "optimizer.ratios": dict,
    "seed": int,
}
"""What every reader of records may rely on, by dotted name in the configuration; other settings may be missing."""
IMPORTED_SETTINGS: Mapping[str, Any] = {
    "batch": int,
    "horizon": int,
    "model.name": str,
    "optimizer.lr": (int, float),
    "optimizer.name": str,
    "optimizer.ratios": dict,
    "seed": int,
    "imported.form": str,
}
"""The same where the configuration has a table "imported" (see ``runs.imported``)."""
MAY_BE_ZERO = ("seed",)

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's record."""

    id: str
    folder: Path
    config: Mapping[str, Any]
    """The resolved configuration, as a dictionary (``train.config.from_dict`` makes a TrainConfig of it)."""
    groups: Mapping[str, tuple[str, ...]]
    """Layers of each layer group; empty for a run that never started."""
    parameters: int | None
    """None where an imported table did not tell."""
    summary: Mapping[str, Any] | None
    """How the run ended; None while it has not."""
    metrics: Mapping[str, Array]
    """A column per metric key, in step order, all of one length; NaN where a line had no such value."""

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None while it has not."""
        return Outcome(self.summary["outcome"]) if self.summary is not None else None

    @property
    def tokens(self) -> int:
        """Tokens trained on, up to the last recorded line."""
        tokens = self.column(Metric.TOKENS)
        return int(tokens[-1]) if tokens.size else 0

    def column(self, key: str) -> Array:
        """One metric over the lines; all NaN if it was never measured."""
        steps = self.metrics.get(Metric.STEP, np.empty(0))
        return self.metrics.get(key, np.full(steps.shape, math.nan))

    def norm(self, group: str, norm: str, of: str = "weights") -> Array:
        """The norm of a layer group over the lines: the largest of its layers'; NaN where none was measured."""
        columns = [self.column(norm_key(norm, layer, of)) for layer in self.groups.get(group, ())]
        return np.fmax.reduce(columns) if columns else np.full(self.column(Metric.STEP).shape, math.nan)


@dataclass(frozen=True)
class Runs:
    """What was read, and what was not."""

    runs: tuple[Run, ...]
    problems: tuple[str, ...]
    """Damage, "file:line: why"."""
    notes: tuple[str, ...] = ()
    """Records of runs that had already been read from another folder."""


class _DamagedError(Exception):
    """Why a document or line cannot be used."""


def read_run(folder: Path) -> Run:
    """Reads the record in ``folder``; damaged lines are left out (``read_runs`` reports them).

    Raises:
        UserError: there is no record, or its config.json is damaged.
    """
    run, problems = _read(Path(folder))
    if run is None:
        raise UserError(problems[0])
    return run


def read_runs(*paths: Path) -> Runs:
    """Reads every record under ``paths``: run folders, the --out of sweeps and runs, or a folder of these.

    A run found twice, in two folders, is taken from the first.

    Raises:
        UserError: a path does not exist or holds no runs, or none of the runs can be read.
    """
    runs: dict[str, Run] = {}
    problems: list[str] = []
    notes: list[str] = []
    for folder in dict.fromkeys(folder.resolve() for path in paths for folder in run_folders(Path(path))):
        run, found = _read(folder)
        problems += found
        if run is None:
            continue
        if run.id in runs:
            notes.append(f"{folder}: run {run.id} was already read from {runs[run.id].folder}")
        else:
            runs[run.id] = run
    if not runs:
        raise UserError(f"no readable run: {problems[0]}" if problems else "no folder of runs was given")
    return Runs(tuple(runs.values()), tuple(problems), tuple(notes))


def run_folders(path: Path) -> list[Path]:
    """``path`` itself, or the run folders in it, or else those in its folders; sorted by name.

    Raises:
        UserError: ``path`` does not exist or holds no runs.
    """
    if (path / CONFIG).is_file():
        return [path]
    found = sorted(path.glob(f"*/{CONFIG}")) or sorted(path.glob(f"*/*/{CONFIG}"))
    if not found:
        why = f"holds no runs (folders with a {CONFIG})" if path.is_dir() else "is not a folder of runs"
        raise UserError(f"{path} {why}; give the --out of a sweep or a run")
    return [file.parent for file in found]


def read_head(folder: Path) -> Run:
    """The record in ``folder`` without its lines: for those who read them as they are written (``metrics_line``).

    Raises:
        UserError: there is no record, or its config.json is damaged.
    """
    try:
        head = _head(_document(folder / CONFIG))
    except _DamagedError as damage:
        raise UserError(f"{folder / CONFIG}:{damage}") from None
    return Run(folder=folder, summary=read_summary(folder), metrics={}, **head)


def metrics_line(text: bytes) -> dict[str, float] | None:
    """One line of metrics; None if it is damaged or cut off."""
    try:
        return _line(text)
    except _DamagedError:
        return None


def as_columns(lines: Mapping[float, Mapping[str, float]]) -> dict[str, Array]:
    """Lines by step as the columns of a Run, in step order."""
    keys = dict.fromkeys(key for line in lines.values() for key in line)
    steps = sorted(lines)
    return {key: np.array([lines[step].get(key, math.nan) for step in steps], dtype=np.float64) for key in keys}


def _read(folder: Path) -> tuple[Run | None, list[str]]:
    problems: list[str] = []
    try:
        document = _document(folder / CONFIG)
        head = _head(document)
    except _DamagedError as damage:
        return None, [f"{folder / CONFIG}:{damage}"]
    summary = _summary(folder, problems)
    metrics = _metrics(folder / METRICS, problems)
    if summary and summary["outcome"] == Outcome.FINISHED and not metrics:
        problems.append(f"{folder / METRICS}:1: the run is finished but its lines are missing")
    return Run(folder=folder, summary=summary, metrics=metrics, **head), problems


def read_summary(folder: Path) -> dict[str, Any] | None:
    """How the run in ``folder`` ended; None while it has not, or if its summary is damaged (the run then resumes)."""
    return _summary(folder, [])


def outcome_so_far(folder: Path, horizon: int) -> Outcome | None:
    """How the run in ``folder`` ended; None if it has to train on: it never ended, failed, stopped short of ``horizon``
    tokens, or has lost its metrics.
    """
    summary = read_summary(folder)
    if summary is None or summary["outcome"] == Outcome.FAILED:
        return None
    ended = Outcome(summary["outcome"])
    if ended == Outcome.FINISHED and summary.get("tokens", 0) < horizon:
        return None
    if ended in (Outcome.FINISHED, Outcome.DIVERGED) and not (folder / METRICS).exists():
        return None  # its lines were lost: training again says so, or makes them again
    return ended


def _summary(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    if not (folder / SUMMARY).exists():
        return None
    try:
        summary = _document(folder / SUMMARY)
        if summary.get("outcome") not in list(Outcome):
            raise _DamagedError(f"1: unknown outcome {summary.get('outcome')!r}")
        if not isinstance(summary.get("tokens", 0), int):
            raise _DamagedError("1: tokens is not a whole number")
    except _DamagedError as damage:
        problems.append(f"{folder / SUMMARY}:{damage}")
        return None
    return summary


def _head(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Run that come from config.json."""
    imported = isinstance(document.get("config"), dict) and "imported" in document["config"]
    count: Any = (int, NoneType) if imported else int
    expected = {"id": str, "config": dict, "groups": dict, "parameters": count}
    for key, kind in expected.items():
        if not isinstance(document.get(key), kind):
            raise _DamagedError(f"1: {key} is missing or not a {getattr(kind, '__name__', 'int')}")
    if document.get("schema") != SCHEMA_VERSION:
        raise _DamagedError(f"1: schema {document.get('schema')!r}, this version reads {SCHEMA_VERSION}")
    for key, kind in (IMPORTED_SETTINGS if imported else SETTINGS).items():
        value: Any = document["config"]
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (isinstance(value, int | float) and value <= 0 and key not in MAY_BE_ZERO):
            raise _DamagedError(f"1: config.{key} is missing or not valid")
    if not all(isinstance(layers, list) for layers in document["groups"].values()):
        raise _DamagedError("1: groups are not lists of layers")
    groups = {group: tuple(layers) for group, layers in document["groups"].items()}
    return {key: document.get(key) for key in expected} | {"groups": groups}


def _document(path: Path) -> dict[str, Any]:
    """A JSON object from a file; the message of a damage begins with its line."""
    try:
        content = _json(path.read_bytes())
    except json.JSONDecodeError as error:
        raise _DamagedError(f"{error.lineno}: not JSON: {error.msg}") from None
    except OSError as error:
        raise _DamagedError(f"1: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"1: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _DamagedError("1: not a JSON object")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _json(text: bytes) -> Any:
    return _DECODER.decode(text.decode())


def _metrics(path: Path, problems: list[str]) -> dict[str, Array]:
    """Columns of the sound lines, in step order; appends what is damaged to ``problems``."""
    lines: dict[float, dict[str, float]] = {}
    for number, text in _lines(path):
        try:
            line = _line(text)
            if line[Metric.STEP] in lines:
                raise _DamagedError(f"repeats step {line[Metric.STEP]:.0f}")
            lines[line[Metric.STEP]] = line
        except _DamagedError as damage:
            problems.append(f"{path}:{number}: {damage}")
    return as_columns(lines)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.exists():
        with path.open("rb") as file:
            yield from enumerate(file, start=1)


def _line(text: bytes) -> dict[str, float]:
    if not text.endswith(b"\n"):
        raise _DamagedError("the line is cut off")
    try:
        line = _json(text)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"not JSON: {error}") from None
    if not isinstance(line, dict):
        raise _DamagedError("not a JSON object")
    wrong = [key for key, value in line.items() if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST]
    if wrong:
        raise _DamagedError(f"{wrong[0]} is not a finite number: {str(line[wrong[0]])[:40]!r}")
    for key in (Metric.STEP, Metric.TOKENS):
        if key not in line:
            raise _DamagedError(f"has no {key}")
        if line[key] < 0 or line[key] != int(line[key]):
            raise _DamagedError(f"{key} is not a whole number: {line[key]}")
    return line
