"""An ingested table as runs: in memory, or as records on disk. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from disco.errors import UserError
from disco.runs.imported import IMPORTED, LOSS_STD, Form
from disco.runs.ingest import DIVERGED, NUMBERS, TEXT, Ingested, norm_of, snap
from disco.runs.lock import LOCK, locked
from disco.runs.reader import Array, Run
from disco.runs.schema import CONFIG, METRICS, SCHEMA_VERSION, SUMMARY, Metric, Outcome, norm_key
from disco.runs.units import short

FALL = 0.99
"""A learning rate that ends below this share of its peak has decayed."""
TOGETHER = 0.95
"""Runs that end within this factor of each other share their last horizon."""


def to_runs(ingested: Ingested) -> tuple[Run, ...]:
    """The runs, each with an id that is a hash of its settings, name and source: the same table gives the same runs.

    They are in the order of their ids, as ``runs.reader`` finds records in a folder: resamples are drawn in order.
    """
    pieces = ingested.table.partition_by("_run", maintain_order=True, include_key=False)
    ends = _ends(pieces, ingested.form)
    furthest: dict[tuple[object, ...], int] = {}
    for piece, end in zip(pieces, ends, strict=True):
        furthest[_kind(piece)] = max(end, furthest.get(_kind(piece), 0))
    pairs = zip(pieces, ends, strict=True)
    runs = (_run(piece, ingested, end, furthest[_kind(piece)]) for piece, end in pairs)
    return tuple(sorted(runs, key=lambda run: run.id))


def write_runs(runs: tuple[Run, ...], into: Path) -> None:
    """Writes the records into a folder of runs; a record of the same id is replaced.

    A record appears whole or not at all, by renaming its folder. Unlike a record of training it is not forced to disk,
    which would take a hundred times longer: the same command makes it again.

    Raises:
        UserError: the folder cannot be written, or a sweep is running in it.
    """
    with locked(into / LOCK):
        try:
            for run in runs:
                new = into / f".{run.id}.tmp"
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                for name, text in _files(run):
                    (new / name).write_text(text)
                shutil.rmtree(into / run.id, ignore_errors=True)
                new.rename(into / run.id)
        except OSError as error:
            raise UserError(f"cannot write {into}: {error.strerror}; choose another place or make room") from error


def _files(run: Run) -> Iterator[tuple[str, str]]:
    """Name and content of the files of a record."""
    header = {"schema": SCHEMA_VERSION, "id": run.id}
    config = header | {"config": run.config, "parameters": run.parameters, "groups": run.groups}
    yield CONFIG, json.dumps(config, indent=1, sort_keys=True, allow_nan=False) + "\n"
    lines = []
    for row in zip(*(values.tolist() for values in run.metrics.values()), strict=True):
        line = {key: value for key, value in zip(run.metrics, row, strict=True) if math.isfinite(value)}
        line |= {key: int(line[key]) for key in (Metric.STEP, Metric.TOKENS)}
        lines.append(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")
    yield METRICS, "".join(lines)
    yield SUMMARY, json.dumps(header | dict(run.summary or {}), indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_table(ingested: Ingested, into: Path) -> None:
    """Writes the checked table, with the names and units of this project, as .csv, .tsv, .parquet or .jsonl.

    Raises:
        UserError: the suffix is another, or the file cannot be written.
    """
    table = ingested.table.drop("_run", "_own", strict=False)
    try:
        match into.suffix.lower():
            case ".csv":
                table.write_csv(into)
            case ".tsv":
                table.write_csv(into, separator="\t")
            case ".parquet":
                table.write_parquet(into)
            case ".jsonl" | ".ndjson":
                table.write_ndjson(into)
            case suffix:
                raise UserError(
                    f"--into: a table is a .csv, .tsv, .parquet or .jsonl, not a {suffix}; a folder has no suffix"
                )
    except OSError as error:
        raise UserError(f"cannot write {into}: {error.strerror or error}") from None


def _ends(pieces: Sequence[pl.DataFrame], form: Form) -> list[int]:
    """The last horizon of each run: of a series at a constant rate one that runs which end within 5% of each other have
    all reached, so that batches share it though they were evaluated at different steps."""
    ends = snap(np.array([_end(piece) for piece in pieces]))
    if form == "series":
        constant = np.array([not _decay(piece) for piece in pieces])
        left = np.unique(ends[constant])[::-1]
        while left.size:
            together = left[left >= TOGETHER * left[0]]
            ends[constant & np.isin(ends, together)] = together[-1]
            left = left[together.size :]
    return [int(end) for end in ends]


def _end(rows: pl.DataFrame) -> int:
    """Tokens of the last row with a result."""
    measured = rows.filter(pl.col("loss").is_not_null() & ~pl.col(DIVERGED))
    return int((measured if len(measured) else rows)["tokens"].to_numpy().max())


def _kind(rows: pl.DataFrame) -> tuple[object, ...]:
    """Runs that share this would reach the same horizons, were it not that some diverge."""
    return tuple(rows[name][0] for name in ("model", "parameters", "width", "depth", "batch") if name in rows.columns)


def _run(rows: pl.DataFrame, ingested: Ingested, end: int, furthest: int) -> Run:
    """One run from its rows, in order of steps or horizons."""
    series = ingested.form == "series"
    head = rows.row(0, named=True)
    lost = rows[DIVERGED].to_numpy()
    config = _config(head)
    imported: dict[str, Any] = {"table": ingested.source, "form": ingested.form}
    imported |= {"run": head["run"]} if head.get("run") is not None else {}
    if series:
        decay = _decay(rows)
        config["schedule"] |= {"decay": decay} if decay else {}
        config["optimizer"]["lr"] = float(
            rows["lr"].to_numpy().max()
        )  # the peak of a rate that was logged at each step
        config["horizon"] = max(furthest if lost.any() else end, head["batch"])
        rows = rows[: int(np.argmax(lost))] if lost.any() else rows  # what comes after is no training any more
    else:
        imported["horizons"] = rows["tokens"].unique().sort().to_list()
        config["horizon"] = imported["horizons"][-1]
        rows = rows.filter(pl.col("loss").is_not_null() & ~pl.col(DIVERGED))
    config[IMPORTED] = imported
    metrics = _metrics(rows, head, config, series)
    settings = {key: value for key, value in config.items() if key != "horizon"} | {"of": head.get("parameters")}
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    steps, tokens = metrics[Metric.STEP], metrics[Metric.TOKENS]
    return Run(
        id=name,
        folder=Path(name),
        config=config,
        groups={group: (group,) for group, _ in filter(None, map(norm_of, rows.columns))},
        parameters=head.get("parameters"),
        summary={
            "outcome": str(Outcome.DIVERGED if lost.any() else Outcome.FINISHED),
            "reason": f"diverged, by {ingested.source or 'the table'}" if lost.any() else "",
            "step": int(steps[-1]) if steps.size else 0,
            "tokens": int(tokens[-1]) if tokens.size else 0,
            "parent": None,
        },
        metrics=metrics,
    )


def _config(head: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the table tells; what it does not tell is not there."""

    def known(**names: str) -> dict[str, Any]:
        return {key: head[name] for key, name in names.items() if head.get(name) is not None}

    model = known(name="model", width="width", depth="depth", context="context")
    if "name" not in model:
        model["name"] = _model(head)
    ratios = known(input="ratio_input", hidden="ratio_hidden", output="ratio_output")
    optimizer = {"name": head.get("optimizer") or "", "lr": head["lr"], "ratios": ratios}
    return {
        "batch": head["batch"],
        "seed": head.get("seed") or 0,
        "model": model,
        "optimizer": optimizer | known(momentum="momentum", weight_decay="weight_decay"),
        "schedule": known(warmup="warmup", decay="decay"),
        **known(family="family"),
    }


def _model(head: Mapping[str, Any]) -> str:
    if head.get("width") and head.get("depth"):
        return f"d{head['width']}-L{head['depth']}"
    return f"{short(head['parameters'])} parameters" if head.get("parameters") else "model"


def _metrics(rows: pl.DataFrame, head: Mapping[str, Any], config: Mapping[str, Any], series: bool) -> dict[str, Array]:
    """Columns of the record, with a line at step 0 where the loss there is known."""
    tokens = rows["tokens"].to_numpy().astype(float)
    step = rows["step"].to_numpy().astype(float) if series else _steps(tokens / head["batch"])
    columns: dict[str, Array] = {str(Metric.STEP): step, str(Metric.TOKENS): tokens}
    keys: dict[str, str] = {"loss": Metric.LOSS_VALID, "loss_train": Metric.LOSS_TRAIN, "sigma": LOSS_STD}
    keys |= {name: norm_key(found[1], found[0]) for name in rows.columns if (found := norm_of(name))}
    for name in filter(rows.columns.__contains__, keys):
        columns[str(keys[name])] = rows[name].cast(pl.Float64).fill_null(math.nan).to_numpy()
    rates = rows["lr"].to_numpy()
    constant = not (config["schedule"].get("decay") or config["schedule"].get("warmup"))
    if constant or len(set(rates)) > 1:  # the rate is known at every step
        columns[str(Metric.PATH)] = np.cumsum(rates * np.diff(step, prepend=0.0))
    start = head.get("loss_start")
    if start is not None and math.isfinite(start) and not (step == 0).any():
        zero = {str(Metric.LOSS_VALID): start, str(Metric.STEP): 0.0, str(Metric.TOKENS): 0.0, str(Metric.PATH): 0.0}
        columns = {key: np.concatenate([[zero.get(key, math.nan)], values]) for key, values in columns.items()}
    return {key: values for key, values in columns.items() if not (values.size and np.isnan(values).all())}


def _steps(counts: Array) -> Array:
    """Whole numbers, each above the one before and 0: steps of a record are distinct."""
    index = np.arange(len(counts))
    return np.asarray(np.maximum.accumulate(np.maximum(np.round(counts), 1) - index) + index)


def _decay(rows: pl.DataFrame) -> float:
    """Share of a series over which its rate falls: as the table says, or in tenths from the logged rate."""
    if "decay" in rows.columns and rows["decay"][0] is not None:
        return float(rows["decay"][0])
    rates, at = rows["lr"].to_numpy(), rows["tokens"].to_numpy()
    peak = rates.max()
    if rates[-1] >= FALL * peak or at[-1] <= 0:
        return 0.0
    share = 1 - at[np.flatnonzero(rates >= FALL * peak)[-1]] / at[-1]
    return float(min(max(round(float(share), 1), 0.1), 1.0))


def summaries(ingested: Ingested) -> Iterator[dict[str, Any]]:
    """What each column holds: name, unit, least and largest value."""
    for name in ingested.table.columns:
        values = ingested.table[name]
        if name in TEXT or name in (DIVERGED, "_run", "_own") or not values.count():
            continue
        yield {
            "column": name,
            "unit": NUMBERS.get(name, "norm of the group's largest layer"),
            "values": values.n_unique(),
            "least": values.min(),
            "largest": values.max(),
        }
