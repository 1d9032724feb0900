"""``disco plan``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disco.cli import _show
from disco.errors import UserError
from disco.fit import StudyFit
from disco.guide import flat_settings
from disco.guide import plan as make_plan
from disco.guide._course import Course
from disco.guide._kept import unpacked
from disco.report import render_plan
from disco.report.text import terminal_width
from disco.runs.sources import is_table
from disco.runs.writer import write_json
from disco.train.config import number


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The run to plan; see ``disco plan --help``."""

    tokens: int
    batch: int | None
    max_batch: int | None
    width: float | None
    depth: float | None
    parameters: float | None
    tolerance: float | None
    stage: str | None
    model: str | None
    family: str | None
    like: Path | None
    settings: Mapping[str, Any]
    """By dotted name; they win over ``like``."""


def plan(path: Path, wanted: Wanted, output: Path | None, as_json: bool) -> int:
    """Shows the recommended batch and learning rate, with what they rest on; writes them to a file for ``watch``."""
    fit, sweep = read_fit(path)
    courses = read_courses(path) if output is not None or as_json else []  # for watch; their growth takes seconds
    run = (read_settings(wanted.like) if wanted.like else {}) | dict(wanted.settings)
    result = make_plan(
        fit, wanted.tokens, wanted.batch, wanted.model, wanted.family,
        width=_or(wanted.width, run, "model.width"), depth=_or(wanted.depth, run, "model.depth"),
        parameters=wanted.parameters, max_batch=wanted.max_batch, tolerance=wanted.tolerance, stage=wanted.stage,
        run=run, sweep=sweep, courses=courses,
    )  # fmt: skip
    if output is not None:
        write_json(output, result.to_dict())
    if as_json:
        _show.document(result.to_dict())
        return 0
    print(render_plan(result, terminal_width()))
    if run and not sweep:
        _show.warn([f"{path} does not tell the sweep's settings, so they are not compared; fit the records again"])
    _show.warn(result.warnings)
    if output is not None:
        print(f"plan: {output}")
    return 0


def read_courses(path: Path) -> list[Course]:
    """Courses of the study's runs that ``disco fit`` kept in the file; none in one of an earlier version.

    Raises:
        UserError: they are damaged.
    """
    try:
        return [unpacked(each) for each in json.loads(path.read_bytes()).get("courses") or []]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what disco fit writes: courses: {error!r}") from None


def read_fit(path: Path) -> tuple[StudyFit, dict[str, Any]]:
    """What ``disco fit`` wrote: the fit, and the settings of the sweep by family as far as they are there.

    Raises:
        UserError: the file cannot be read or is something else.
    """
    try:
        content = json.loads(path.read_bytes())
        return StudyFit.from_dict(content), dict(content.get("settings") or {})
    except OSError as error:
        raise UserError(f"cannot read the fit {path}: {error.strerror}; make it with: disco fit RUNS") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        hint = f"; fit it first: disco fit {path} -o fit.json" if is_table(path) else ""
        raise UserError(f"{path} is not what disco fit writes: {error}{hint}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by dotted name from a configuration in TOML, or from the record of a run (its folder).

    Raises:
        UserError: there is no such file, or it is something else.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        content = file.read_text(encoding="utf-8")
        table = json.loads(content)["config"] if file.suffix == ".json" else tomllib.loads(content)
        if not isinstance(table, dict):
            raise TypeError("no table of settings")
    except OSError as error:
        raise UserError(f"--like: cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--like: {file} is neither a configuration nor the record of a run: {error}") from None
    return flat_settings(table)


def schedule(text: str) -> dict[str, Any]:
    """Settings of a schedule: "constant", the fraction of the run over which the rate decays, or another word."""
    if text == "constant":
        return {"schedule.decay": 0.0}
    if text[:1].isdigit() or text[:1] == ".":
        return {"schedule.decay": number(text, "--schedule")}
    return {"schedule.shape": text}


def _or(value: float | None, run: Mapping[str, Any], name: str) -> float | None:
    return value if value is not None or run.get(name) is None else number(run[name], name)
