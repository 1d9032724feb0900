"""``disco runs ls``, ``disco runs show``, ``disco runs track`` and ``disco runs import``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from disco.cli import _show
from disco.cli._options import Tables
from disco.cli._tables import from_tables, said
from disco.errors import UserError
from disco.runs.reader import Run, read_runs
from disco.runs.schema import CONFIG, Metric
from disco.runs.table import families, model_name
from disco.runs.units import UNKNOWN, counted, power


def ls(paths: Sequence[Path], as_json: bool) -> int:
    """Lists runs, one row each; exit code 2 if records were damaged."""
    found = read_runs(*paths)
    code = _show.tell(found)
    rows = [_summary(run, family) for run, family in zip(found.runs, families(found.runs), strict=True)]
    if as_json:
        _show.document({"runs": rows, "problems": found.problems})
        return code
    _show.table(
        [
            {
                "run": row["run"],
                "model": row["model"],
                "family": row["family"],
                "batch": counted(row["batch"]),
                "lr": power(row["lr"]),
                "seed": str(row["seed"]),
                "tokens": counted(row["tokens"]),
                "of": counted(row["horizon"]),
                "loss": _show.fixed(row["loss"]),
                "output norm": power(row["output_norm"]),
                "outcome": row["outcome"] or "unfinished",
            }
            for row in rows
        ]
    )
    return code


def _summary(run: Run, family: str) -> dict[str, Any]:
    return {
        "run": run.id,
        "model": model_name(run.config),
        "family": family,
        "batch": run.config["batch"],
        "lr": run.config["optimizer"]["lr"],
        "seed": run.config["seed"],
        "tokens": run.tokens,
        "horizon": run.config["horizon"],
        "loss": _last(run.column(Metric.LOSS_VALID)),
        "output_norm": _last(run.norm("output", "rms_to_inf")),
        "outcome": str(run.outcome) if run.outcome else None,
        "reason": (run.summary or {}).get("reason") or None,
    }


def show(path: Path, as_json: bool) -> int:
    """Shows one run; exit code 2 if its record is damaged."""
    found = read_runs(_folder(path))
    code = _show.tell(found)
    if len(found.runs) > 1:
        raise UserError(f"{path} holds {len(found.runs)} runs; name one of them, or use: disco runs ls {path}")
    run = found.runs[0]
    last = {key: _last(values) for key, values in run.metrics.items()}
    if as_json:
        _show.document(
            {
                "id": run.id, "folder": run.folder, "parameters": run.parameters, "groups": run.groups,
                "config": run.config, "summary": run.summary, "last": last, "problems": found.problems,
            }
        )  # fmt: skip
        return code
    count = UNKNOWN if run.parameters is None else f"{run.parameters:,}"
    facts = _summary(run, families([run])[0]) | {"parameters": count, "folder": str(run.folder)}
    facts |= {name: counted(facts[name]) for name in ("batch", "tokens", "horizon")} | {"lr": power(facts["lr"])}
    facts |= {"loss": _show.fixed(facts["loss"]), "output_norm": power(facts["output_norm"])}
    _show.table([{"": key, "value": UNKNOWN if value is None else str(value)} for key, value in facts.items()])
    _show.table([{"last measured": key, "value": f"{value:.6g}"} for key, value in sorted(last.items())])
    return code


def track(paths: Sequence[Path], to: str, follow: bool, as_json: bool) -> int:
    """Sends records to trackers."""
    from disco.integrations.follow import send

    if not paths:
        raise UserError("name at least one folder of run records")
    count = send(paths, to, follow)
    if as_json:
        _show.document({"runs": count, "to": to})
    else:
        print(f"{count} runs are in {to}")
    return 0


def import_(paths: Sequence[Path], tables: Tables, into: Path, as_json: bool) -> int:
    """Writes tables as run records, or as one table, and shows what each column holds."""
    from disco.runs.convert import summaries, to_runs, write_runs, write_table
    from disco.runs.sources import is_table

    if not paths:
        raise UserError("name at least one table of runs")
    ingested = from_tables(paths, tables)
    runs = to_runs(ingested)
    if is_table(into):
        write_table(ingested, into)
    else:
        write_runs(runs, into)
    columns = list(summaries(ingested))
    if as_json:
        _show.document(
            {
                "into": into, "form": ingested.form, "runs": len(runs), "rows": ingested.rows,
                "dropped": ingested.dropped, "notes": ingested.notes, "columns": columns,
            }
        )  # fmt: skip
        return 0
    for row in columns:
        row |= {key: f"{row[key]:.6g}" for key in ("least", "largest")} | {"values": str(row["values"])}
    _show.table(columns)
    _show.warn(said(ingested), most=30)
    kept = ingested.rows - sum(ingested.dropped.values())
    print(f"{len(runs)} runs from {kept} of {ingested.rows} rows ({ingested.form}): {into}")
    return 0


def _folder(path: Path) -> Path:
    """The run folder that ``path`` names, perhaps by the first characters of its id."""
    if path.exists() or not path.name:
        return path
    found = [folder for folder in path.parent.glob(f"{path.name}*") if (folder / CONFIG).is_file()]
    if len(found) > 1:
        raise UserError(f"{path} is the beginning of {len(found)} runs; give more characters")
    return found[0] if found else path


def _last(values: np.ndarray[Any, Any]) -> float:
    """The last value that was measured; NaN if none was."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan
