"""``disco watch``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from disco.cli import _show
from disco.cli._plan import read_settings
from disco.errors import UserError
from disco.guide import Plan, check, read_plan
from disco.guide._course import Course
from disco.guide._follow import Look, follow
from disco.guide._log import Columns
from disco.report import line, render_check
from disco.train.config import number

CODES = {"on course": 0, "off course": 1, "cannot tell": 3}
"""Exit codes by verdict."""


@dataclass(frozen=True)
class Wanted:
    """What to do; see ``disco watch --help``."""

    follow: bool
    every: float
    stop: bool
    output: Path | None
    like: Path | None
    maps: tuple[str, ...]
    preset: str
    name: str


def watch(run: Path, plan: Path, wanted: Wanted, as_json: bool) -> int:
    """Checks a run once, or again and again until it ends; returns the exit code of the last verdict."""
    if wanted.every <= 0:
        raise UserError(f"--every must be a positive number of seconds, got {wanted.every:g}")
    planned = read_plan(plan)
    look = follow(run, planned, _columns(wanted))
    if not wanted.follow:
        if not run.exists():
            raise UserError(f"cannot read {run}: there is no such run; with --follow it may come later")
        now = look()
        if now.course is None:
            raise UserError(now.notes[0])
        return _tell(planned, now, now.course, wanted, as_json)
    return _follow(planned, look, wanted, as_json)


def _columns(wanted: Wanted) -> Columns:
    settings = read_settings(wanted.like) if wanted.like else {}
    numbers = {name: number(settings[name], name) for name in ("horizon", "batch", "optimizer.lr") if name in settings}
    return Columns(maps=wanted.maps, preset=wanted.preset, run=wanted.name, settings=settings | numbers)


def _follow(planned: Plan, look: Callable[[], Look], wanted: Wanted, as_json: bool) -> int:
    code, shown = CODES["cannot tell"], (-1.0, "")
    said: tuple[str, ...] = ()
    while True:
        now = look()
        if now.stuck:
            raise UserError(now.notes[0])
        if now.notes != said:
            said = now.notes
            if now.course is None:
                _show.warn([f"waiting: {note}" for note in said])
            elif not as_json:
                _show.warn(said)
        if now.course is not None and (now.course.last, now.ended) != shown:
            shown = (now.course.last, now.ended)
            code = _tell(planned, now, now.course, wanted, as_json)
            if now.ended or (wanted.stop and code == CODES["off course"]):
                return code
        time.sleep(wanted.every)


def _tell(planned: Plan, now: Look, course: Course, wanted: Wanted, as_json: bool) -> int:
    found = check(course, planned, now.ended)
    if as_json:
        print(json.dumps(_show.plain({**found.to_dict(), "notes": now.notes}), allow_nan=False), flush=True)
    elif wanted.follow:
        print(line(found), flush=True)
    else:
        print(render_check(found))
        _show.warn(now.notes)
    if wanted.output is not None:
        from disco.report import write_watch

        write_watch(course, planned, found, wanted.output)
    return CODES[found.verdict]
