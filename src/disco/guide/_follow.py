"""Reads a run while it is written: a record of this project, or another trainer's log (``_log``). No torch.

Every look gives what the files hold now: a line that is cut off waits for its rest, damaged lines are left out, and
where a run went back to a checkpoint the lines after that step no longer count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from disco.errors import UserError
from disco.guide._course import Course, course
from disco.guide._log import Columns, Log, StuckError
from disco.guide._plan import Plan
from disco.guide._tail import Tail
from disco.runs.reader import as_columns, metrics_line, read_head
from disco.runs.schema import METRICS, Metric, Outcome


@dataclass(frozen=True)
class Look:
    """What is known of a run at one look."""

    course: Course | None
    """None while nothing can be read."""
    ended: str = ""
    """Outcome of the run; "" while it goes on."""
    notes: tuple[str, ...] = ()
    """What was assumed, and what is in the way."""
    stuck: bool = False
    """Whether what is in the way stays until the user says more."""


def follow(path: Path, plan: Plan, columns: Columns | None = None) -> Callable[[], Look]:
    """A function that looks at a run: it reads what is new since its last call. It raises nothing that the files cause.

    Args:
        path: Folder of a record, or another trainer's log (see ``_log``). It may not be there yet.
        plan: What a log does not tell is taken to be as planned.
        columns: How a log is read.
    """
    at: tuple[Path, bool] | None = None
    source: _Record | Log

    def look() -> Look:
        nonlocal at, source
        now = _source(path)
        if now != at:  # in a folder a log comes with the first checkpoint, and moves to the next
            home, is_record = at = now
            source = _Record(home) if is_record else Log(home, plan, columns or Columns())
        if isinstance(source, _Record):
            return source.look()
        try:
            return Look(*source.look())
        except UserError as error:
            return Look(None, notes=(str(error),), stuck=isinstance(error, StuckError))

    return look


def _source(path: Path) -> tuple[Path, bool]:
    """Where a run is by now, and whether it is a record: a folder is, unless it is one of Hugging Face's Trainer (which
    may write a config.json too)."""
    home = path if (path / METRICS).exists() else Log.home(path)
    return home, home.is_dir() or not (home.exists() or home.suffix)


class _Record:
    """The record of a run of this project."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tail = Tail(folder / METRICS)
        self._lines: dict[float, dict[str, float]] = {}
        """By step, in order."""
        self._damaged = 0

    def look(self) -> Look:
        """The run by now."""
        new, void = self._tail.read()
        if void:
            self._lines, self._damaged = {}, 0
        for text in new:
            self._add(metrics_line(text))
        try:
            head = read_head(self._folder)
        except UserError as error:
            return Look(None, notes=(str(error),))
        notes = (f"{self._damaged} damaged lines are left out",) if self._damaged else ()
        run = replace(head, metrics=as_columns(self._lines))
        left = run.config["horizon"] - run.tokens
        goes_on = run.outcome is None or (run.outcome == Outcome.FINISHED and left >= run.config["batch"])
        return Look(course(run), "" if goes_on else str(run.outcome), notes)

    def _add(self, line: dict[str, float] | None) -> None:
        if line is None:
            self._damaged += 1
            return
        step = line[Metric.STEP]
        if self._lines and step <= next(reversed(self._lines)):
            self._lines = {at: kept for at, kept in self._lines.items() if at < step}
        self._lines[step] = line
