"""What a fit's file keeps of the runs beside the fit, for plans and for watching runs. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disco.guide._course import Course, course
from disco.guide._settings import sweep_settings
from disco.runs.reader import Run
from disco.runs.table import families

Array = NDArray[np.float64]

THIN = 0.2
"""Octaves of tokens between the points of a course that a fit keeps."""
DIGITS = 5
_ARRAYS = ("tokens", "path", "lr", "norm", "loss")
_GROUPS = ("norms", "momenta")


def packed(course: Course) -> dict[str, Any]:
    """A course in JSON types, thinned to five points per octave and its last."""
    known = np.flatnonzero(course.tokens > 0)
    kept: list[int] = []
    for index in known:
        if not kept or index == known[-1] or course.tokens[index] >= course.tokens[kept[-1]] * 2**THIN:
            kept.append(int(index))

    def numbers(values: Array) -> list[float | None]:
        return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values[kept].tolist()]

    plain = {each.name: getattr(course, each.name) for each in fields(course) if each.name not in (*_ARRAYS, *_GROUPS)}
    single = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in plain.items()
    }
    groups = {group: numbers(values) for group, values in course.norms.items() if group != "output"}
    momenta = {group: numbers(values) for group, values in course.momenta.items()}
    return {**single, "ratios": dict(course.ratios), "norms": groups, "momenta": momenta} | {
        name: numbers(values) if name != "tokens" else [int(value) for value in values[kept]]
        for name in _ARRAYS for values in [getattr(course, name)]
    }  # fmt: skip


def unpacked(values: Mapping[str, Any]) -> Course:
    """The inverse of ``packed``; keys that this version does not know are ignored."""

    def numbers(column: Sequence[float | None]) -> Array:
        return np.array([math.nan if value is None else value for value in column], dtype=float)

    known = {each.name: values[each.name] for each in fields(Course) if each.name in values}
    known = {name: math.nan if value is None else value for name, value in known.items()}
    arrays = {name: numbers(values[name]) for name in _ARRAYS}
    norms, momenta = (
        {group: numbers(column) for group, column in values.get(name, {}).items()} for name in ("norms", "momenta")
    )
    return Course(**{**known, **arrays, "norms": norms | {"output": arrays["norm"]}, "momenta": momenta})


def for_plans(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings by family, for ``plan`` to compare, and the courses of the runs, for ``watch``; in JSON types.

    Ids do not count: the same runs give the same courses in the same order, whatever they are called.
    """
    pairs = zip(runs, families(runs), strict=True)
    courses = [packed(course(run, family)) for run, family in pairs]
    return {
        "settings": sweep_settings(runs),
        "courses": sorted(courses, key=lambda each: json.dumps(each, sort_keys=True)),
    }
