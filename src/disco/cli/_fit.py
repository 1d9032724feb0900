"""``disco fit`` and ``disco report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disco.cli import _show
from disco.cli._options import Tables
from disco.cli._tables import from_tables, said
from disco.errors import UserError
from disco.fit import BOOTSTRAPS, fit_table
from disco.guide import for_plans
from disco.report import render_fit
from disco.report.text import terminal_width
from disco.runs.convert import to_runs
from disco.runs.reader import Run, Runs, read_runs
from disco.runs.sources import is_table
from disco.runs.table import columns
from disco.runs.writer import write_json


def fit(paths: Sequence[Path], tables: Tables, output: Path, bootstraps: int, as_json: bool) -> int:
    """Fits runs, writes the fit, and shows its numbers; 2 if records were damaged."""
    read = _read(paths, tables)
    code = _show.tell(read)
    fitted = fit_table(columns(read.runs), bootstraps=bootstraps)
    document = fitted.to_dict() | for_plans(read.runs)
    write_json(output, document)
    if as_json:
        _show.document(document)
        return code
    print(render_fit(fitted, terminal_width()))
    _show.warn(fitted.warnings)
    print(f"fit: {output}")
    return code


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
