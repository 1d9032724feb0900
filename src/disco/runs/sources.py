"""Tables of anybody's runs as one polars table: CSV, TSV, Parquet, JSON lines, and exports of W&B charts.

W&B exports a chart as CSV with one column per run and metric, "run - metric", with "run - metric__MIN" and "__MAX"
beside it. Such a file becomes a long table with the columns run, its x axis ("Step") and its metrics; several become
one, joined by run and x. ``join`` adds the table of a project's runs (a row per run, named in its column Name).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import polars as pl

from disco.errors import UserError
from disco.runs.mapping import nearest

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".jsonl", ".ndjson", ".gz")
"""Files that are tables. What compresses CSV or JSON lines is seen behind it: .csv.gz."""
FILE = "file"
"""Column with the name of the file a row came from, without its suffix, where there were several."""
MISSING = ["", "NA", "N/A", "null", "None", "-"]
"""What stands for a missing value in CSV. NaN is a value: a loss that is not a number is a run that diverged."""

_BETWEEN = " - "
_EXTREMES = ("__MIN", "__MAX")


def is_table(path: Path) -> bool:
    """Whether a path names a table rather than a folder of run records."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read_tables(paths: Sequence[Path], join: Path | None = None, on: str = "") -> pl.DataFrame:
    """All rows of the tables. A column that a file lacks is null in its rows.

    Args:
        paths: Files; see ``SUFFIXES``.
        join: Table with one row per run, whose columns every row of that run gets.
        on: Columns to join on, "run_name" or "run=Name" (here=there); run, and run or Name, if not given.

    Raises:
        UserError: a file cannot be read, is not a table, or has no rows; the tables cannot be joined.
    """
    parts = [(path, read_table(path)) for path in paths]
    charts = [_long(table) for _, table in parts if is_chart(table)]
    others = [
        table.with_columns(pl.lit(_stem(path)).alias(FILE)) if len(parts) > 1 and FILE not in table.columns else table
        for path, table in parts
        if not is_chart(table)
    ]
    if charts:
        others.append(reduce(_beside, charts))
    try:
        table = pl.concat(others, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise UserError(f"the tables do not fit together: {_line(error)}; give one at a time") from None
    return _joined(table, join, on) if join is not None else table


def read_table(path: Path) -> pl.DataFrame:
    """One file as it stands; nested JSON objects become columns "outer.inner".

    Raises:
        UserError: it cannot be read, is not a table, or has no rows.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]
    try:
        if kind == ".parquet":
            table = pl.read_parquet(path)
        elif kind in (".jsonl", ".ndjson"):
            table = _json_lines(path)
        elif kind in (".csv", ".tsv", ".txt"):
            table = pl.read_csv(
                path, separator="," if kind == ".csv" else "\t", null_values=MISSING, infer_schema_length=None
            )
        else:
            raise UserError(f"{path} is no table that can be read; there are .csv, .tsv, .parquet and .jsonl")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _line(error).removesuffix(f': {path}')}") from None
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table: {_line(error)}") from None
    table = table.rename({name: name.strip().removeprefix("\ufeff") for name in table.columns})
    if not len(table):
        raise UserError(f"{path} has no rows")
    return _flat(table)


def is_chart(table: pl.DataFrame) -> bool:
    """Whether a table is the export of a W&B chart: an x axis, then columns "run - metric" only."""
    return table.width > 1 and all(_BETWEEN in name for name in table.columns[1:])


def _long(chart: pl.DataFrame) -> pl.DataFrame:
    """run, x and the metrics, a row per run and x that has any."""
    x, *names = chart.columns
    by_run: dict[str, dict[str, str]] = {}
    for name in names:
        run, _, metric = name.rpartition(_BETWEEN)
        if not metric.endswith(_EXTREMES) and metric != x:
            by_run.setdefault(run, {})[name] = metric
    parts = []
    for run, metrics in by_run.items():
        part = chart.select(pl.lit(run).alias("run"), x, *(pl.col(name).alias(to) for name, to in metrics.items()))
        parts.append(part.filter(pl.any_horizontal(pl.col(*metrics.values()).is_not_null())))
    return pl.concat(parts, how="diagonal_relaxed")


def _beside(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """Two charts of the same x axis as one table."""
    keys = left.columns[:2]
    if right.columns[:2] != keys:
        raise UserError(
            f"charts with different x axes, {keys[1]} and {right.columns[1]}; export both over the same one"
        )
    both = [name for name in right.columns[2:] if name in left.columns]
    joined = left.join(right, on=keys, how="full", coalesce=True, suffix="_other")
    for name in both:  # the same metric of other runs, or the same points once more
        joined = joined.with_columns(pl.coalesce(name, f"{name}_other").alias(name)).drop(f"{name}_other")
    return joined


def _joined(table: pl.DataFrame, path: Path, on: str) -> pl.DataFrame:
    other = read_table(path)
    here, equals, there = (part.strip() for part in on.partition("="))
    here = here or "run"
    there = there or (here if here in other.columns or equals or on else "Name")
    for name, where, columns in ((here, "the tables", table.columns), (there, str(path), other.columns)):
        if name not in columns:
            raise UserError(f"--join: no column {name!r} in {where} to join on; {nearest(name, columns)}; see --on")
    if other[there].is_duplicated().any():
        twice = other.filter(pl.col(there).is_duplicated())[there][0]
        raise UserError(f"--join: {path} has several rows with {there} {twice!r}; one per run is needed")
    other = other.with_columns(pl.col(there).cast(pl.String))
    return table.with_columns(pl.col(here).cast(pl.String)).join(
        other, left_on=here, right_on=there, how="left", suffix="_joined"
    )


def _json_lines(path: Path) -> pl.DataFrame:
    """One JSON object per line. Python's reader, for NaN and Infinity, which W&B and others write."""
    rows = []
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            rows.append(row)
    return from_rows(rows)


def from_rows(rows: Sequence[dict[str, object]]) -> pl.DataFrame:
    """A table from objects as of JSON; nested ones become columns "outer.inner", lists are left out."""
    plain = [_plain(row) for row in rows]
    names = dict.fromkeys(name for row in plain for name in row)
    return pl.DataFrame({name: _series(name, [row.get(name) for row in plain]) for name in names})


def from_chart(table: pl.DataFrame) -> pl.DataFrame:
    """The export of a W&B chart as a long table with a column run; any other table as it is."""
    return _long(table) if is_chart(table) else table


def _plain(row: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested objects flattened; lists left out, since no column of a run is one."""
    result: dict[str, object] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= _plain(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            result[prefix + key] = value
    return result


def _series(name: str, values: list[object]) -> pl.Series:
    """Numbers as numbers, also where some are text such as "NaN"; anything else as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} or kinds <= {str}:
        return pl.Series(name, values, dtype=None if kinds else pl.Null)
    if kinds <= {int}:
        try:
            return pl.Series(name, values, dtype=pl.Int64)
        except (OverflowError, TypeError, pl.exceptions.PolarsError):
            kinds = {float}
    if kinds <= {int, float, bool}:
        return pl.Series(name, [None if value is None else float(value) for value in values])  # type: ignore[arg-type]
    return pl.Series(name, [None if value is None else str(value) for value in values])


def _flat(table: pl.DataFrame) -> pl.DataFrame:
    """Struct columns (of Parquet) as columns "outer.inner"."""
    while structs := [name for name, kind in table.schema.items() if isinstance(kind, pl.Struct)]:
        for name in structs:
            fields = table[name].struct.fields
            inner = table.select(pl.col(name).struct.field(each).alias(f"{name}.{each}") for each in fields)
            table = table.drop(name).hstack(inner)
    return table


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _line(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
