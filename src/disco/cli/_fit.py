"""``disco fit`` and ``disco report``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from disco.cli import _show
from disco.cli._options import Tables
from disco.cli._tables import from_tables, said
from disco.errors import UserError
from disco.fit import BOOTSTRAPS, StudyFit, Transfer, fit_table
from disco.guide import sweep_settings
from disco.runs.convert import to_runs
from disco.runs.reader import Run, Runs, read_runs
from disco.runs.sources import is_table
from disco.runs.table import columns
from disco.runs.units import power, short, two_to
from disco.runs.writer import write_json


def fit(paths: Sequence[Path], tables: Tables, output: Path, bootstraps: int, as_json: bool) -> int:
    """Fits runs, writes the fit, and shows the optimum for each number of tokens; 2 if records were damaged."""
    read = _read(paths, tables)
    code = _show.tell(read)
    fitted = fit_table(columns(read.runs), bootstraps=bootstraps)
    document = fitted.to_dict() | {"settings": sweep_settings(read.runs)}  # for disco plan --like
    write_json(output, document)
    if as_json:
        _show.document(document)
        return code
    _show.table(
        [
            {
                "family": item.family,
                "model": item.model,
                "tokens": short(item.tokens),
                "best batch": power(item.batch),
                "lr": two_to(item.lr),
                "norm": two_to(item.norm),
                "loss": _show.fixed(item.loss),
                "flags": ", ".join(item.flags),
            }
            for item in fitted.horizons
        ]
    )
    _layers(fitted)
    for path in fitted.paths:
        verdict = path.transfer.verdict if path.transfer else "cannot tell: too few optima"
        where = " ".join(part for part in (path.model, path.family) if part)
        print(f"{where}: optimal norm over {path.axis} ({path.condition}): {verdict}")
        if len(path.others) > 1:
            _show.table([_norm(name, test) for name, test in path.others.items()], f"norms over {path.axis}: {where}")
    _show.warn(fitted.warnings)
    print(f"fit: {output}")
    return code


def _norm(name: str, test: Transfer) -> dict[str, str]:
    low, high = test.interval or (math.nan, math.nan)
    return {
        "norm": name.removeprefix("norm/"),
        "octaves per doubling": f"{test.slope:+.2f}",
        "90%": f"{low:+.2f} .. {high:+.2f}" if test.interval else "",
        "would not matter": f"±{test.margin:.2f}",
        "verdict": test.verdict,
    }


def _layers(fitted: StudyFit) -> None:
    """Best ratios of layer groups at the largest horizon of each model, where they were swept."""
    if fitted.layers is None:
        return
    for family, model in fitted.layers.studies:
        last = fitted.layers.of(family, model)[-1]
        rows = [
            {
                "group": " and ".join((group.group, *group.together)),
                "best ratio": "1 (reference)" if group.reference else two_to(group.ratio),
                "90%": " .. ".join(map(two_to, group.interval)) if group.interval else "",
                "nats, 1 octave off": _show.fixed(group.curvature),
                "moves the best batch": "" if group.reference else group.moves_batch,
                "flags": ", ".join(group.flags),
            }
            for group in last.groups
        ]
        _show.table(rows, f"layer groups: {model}, {family}, {short(last.tokens)} tokens")


def report(paths: Sequence[Path], tables: Tables, output: Path, as_json: bool) -> int:
    """Writes the page; exit code 2 if records were damaged, which the page lists."""
    from disco.report import write_report

    read = _read(paths, tables)
    code = _show.tell(read)
    write_report(read, fit_table(columns(read.runs), bootstraps=BOOTSTRAPS), output)
    if as_json:
        _show.document({"report": output, "runs": len(read.runs)})
    else:
        print(f"report: {output}")
    return code


def _read(paths: Sequence[Path], tables: Tables) -> Runs:
    """Run records and tables together."""
    if not paths:
        raise UserError("name at least one folder of run records, or a table of runs")
    files, folders = [path for path in paths if is_table(path)], [path for path in paths if not is_table(path)]
    if not files and tables != Tables():
        raise UserError(f"--map, --preset, --join, --on and --form are for tables, and {folders[0]} is none")
    runs: dict[str, Run] = {}
    read = read_runs(*folders) if folders else Runs((), ())
    notes = list(read.notes)
    if files:
        ingested = from_tables(files, tables)
        notes += said(ingested)
        runs = {run.id: run for run in to_runs(ingested)}
    return Runs((*read.runs, *runs.values()), read.problems, tuple(notes))
