"""``disco plan --probe``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from disco.cli import _show
from disco.cli._plan import Wanted, read_courses, read_fit
from disco.errors import UserError
from disco.guide import OneRun, flat_settings, one_run
from disco.guide._course import course
from disco.guide._growth_fit import growth
from disco.guide._growth_model import Growth
from disco.guide._settings import differences
from disco.guide._target import Size, choose
from disco.report import render_one_run
from disco.report.text import terminal_width
from disco.runs.reader import Run, read_runs
from disco.runs.schema import Outcome

IDLE = ("max_batch", "width", "depth", "parameters", "tolerance", "stage", "like")
"""Options of a plan that a probe answers itself, or that have no meaning with one."""


def probe(path: Path, wanted: Wanted, runs: Sequence[Path], output: Path | None, as_json: bool) -> int:
    """Shows the learning rate for a run like the probes."""
    idle = [name for name in IDLE if getattr(wanted, name) is not None] + ["output"] * (output is not None)
    if idle or wanted.settings:
        given = f"--{idle[0].replace('_', '-')}" if idle else ", ".join(wanted.settings)
        raise UserError(f"{given} does not go with --probe: size and settings are those of the probe; leave it out")
    read = read_runs(*runs)
    result = _answer(path, wanted, read.runs)
    code = _show.tell(read)
    if as_json:
        _show.document(result.to_dict())
        return code
    print(render_one_run(result, terminal_width()))
    _show.warn(result.warnings)
    return code


def _answer(path: Path, wanted: Wanted, runs: Sequence[Run]) -> OneRun:
    fit, sweep = read_fit(path)
    first = runs[0]
    settings = flat_settings(first.config)
    for run in runs:
        if run.outcome == Outcome.DIVERGED:
            raise UserError(f"plan --probe: the run {run.id} diverged; train one at a lower learning rate")
        other = differences(settings, flat_settings(run.config))
        if other:
            raise UserError(f"plan --probe: {first.id} and {run.id} are runs of two kinds: {other[0].text}")
    if wanted.batch is not None and wanted.batch != first.config["batch"]:
        raise UserError(
            f"plan --probe: the batch is {wanted.batch} and that of the probe {first.config['batch']}; train a probe "
            "at the batch of the planned run"
        )
    model = first.config["model"]
    size = Size(*(float(value) if value else math.nan for value in (
        model.get("width"), model.get("depth"), first.parameters)))  # fmt: skip
    target = choose(fit, wanted.tokens, wanted.family, wanted.model, size,
                    lambda family: len(differences(sweep.get(family, {}), settings)))  # fmt: skip
    unlike = differences(sweep.get(target.family, {}), settings)
    return one_run(target, [course(run) for run in runs], _growth(path, target.family), unlike)


def _growth(path: Path, family: str) -> Growth | None:
    """Of the study's norms; None where the fit keeps too few courses."""
    try:
        return growth([each for each in read_courses(path) if each.family == family])
    except UserError:
        return None
