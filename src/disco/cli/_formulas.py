"""``disco fit TABLE`` with --scan, --quadratic, --power-law, --within: single steps on the columns of a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from disco.cli import _show
from disco.cli._options import Tables
from disco.errors import UserError
from disco.fit import Optimum, PowerLaw, optimum, power_law
from disco.fit._bowl import TERMS, Bowl, bowl
from disco.fit._optimum import Recipe
from disco.fit._selection import near_minimum
from disco.runs.mapping import nearest, with_columns
from disco.runs.presets import expand
from disco.runs.sources import read_tables
from disco.runs.units import UNKNOWN, error_digits, two_to
from disco.runs.writer import write_json


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What to do; see ``disco fit --help``."""

    scan: str
    quadratic: str
    power_law: Sequence[str]
    by: str
    within: str
    of: str
    recipe: str
    anchor: float | None
    interactions: bool


@dataclass(frozen=True)
class _Found:
    """The optimum of one group."""

    key: Mapping[str, Any]
    fit: Optimum | Bowl | None
    row: Mapping[str, Any]
    """The group's row nearest to it, with the fitted columns at the optimum itself: what a law is fitted to."""
    usable: bool
    why: str
    """Flags, or why there is no fit."""


def run(paths: Sequence[Path], tables: Tables, steps: Steps, output: Path | None, as_json: bool) -> int:
    """Does the steps, and shows or writes what they give."""
    if not paths:
        raise UserError("name at least one table")
    if steps.scan and (steps.quadratic or steps.within):
        raise UserError("--scan goes with neither --quadratic nor --within; rows far from the minimum show its edges")
    table = read_tables(paths, tables.join, tables.on)
    maps = tables.maps
    if tables.preset:
        table, own = expand(tables.preset, table)
        given = [text.partition("=")[0].strip() for text in maps]
        maps = [text for text in own if text.partition("=")[0] not in given] + maps
    table = with_columns(table, maps)
    by = [name for part in steps.by.split(",") if (name := part.strip().strip("`"))]
    for name in by:
        _needed(name, table, "--by")
    warnings: list[str] = []
    document: dict[str, Any] = {"rows": len(table)}

    if by:
        floats = [name for name in by if table.schema[name].is_float()]
        known = table.with_columns(pl.col(floats).fill_nan(None)).drop_nulls(by)
        if len(known) < len(table):
            warnings.append(f"{len(table) - len(known)} of {len(table)} rows dropped: {' or '.join(by)} is missing")
        table = known
    start = table
    left = _formula(steps.scan or steps.quadratic, table)[0] if steps.scan or steps.quadratic else "loss"
    if steps.within:
        table = _near(table, steps.of or left, _fraction(steps.within), by, warnings)
        document["selected"] = len(table)
    elif steps.of:
        raise UserError("--of names the loss of --within, which is not given")

    found: list[_Found] = []
    if steps.scan or steps.quadratic:
        find = _scan if steps.scan else _quadratic
        found = [find(key, rows, steps) for key, rows in _groups(table, by)]
        document["optima"] = [
            {**item.key, "usable": item.usable, "why": item.why, "at": item.row, "fit": item.fit and item.fit.to_dict()}
            for item in found
        ]
        usable = [item for item in found if item.usable]
        if steps.power_law and len(usable) < len(found):
            warnings.append(f"{len(found) - len(usable)} of {len(found)} optima are none to fit a law to and left out")
        if steps.power_law and not usable:
            raise UserError(f"none of {len(found)} groups has an optimum, so there is no law over them")
        table = pl.DataFrame([item.row for item in usable], infer_schema_length=None) if usable else table.clear()
    laws = [(text, _law(text, table, steps.interactions, warnings)) for text in steps.power_law]
    document["laws"] = [{"formula": text, **law.to_dict()} for text, law in laws]
    document["warnings"] = warnings
    if output is not None:
        write_json(output, _show.plain(document))
    if as_json:
        _show.document(document)
        return 0
    if steps.within:
        print(
            f"{document['selected']} of {document['rows']} rows are within {steps.within} of their group's least loss"
        )
    if found:
        text = steps.scan or steps.quadratic
        print(text)
        _show.table([_shown(item, _formula(text, start)[1]) for item in found])
    for text, law in laws:
        _show_law(text, law)
    _show.warn(warnings)
    return 0


def _formula(text: str, table: pl.DataFrame, terms: int = 0) -> tuple[str, list[str]]:
    """Left side and terms of "y ~ a + b"; ``terms``: how many there must be, if not 0."""
    left, tilde, right = text.partition("~")
    names = [part.strip().strip("`") for part in (left, *right.split("+"))]
    if not tilde or not all(names) or (terms and len(names) != terms + 1):
        form = "'Y ~ " + " + ".join(f"X{i + 1}" for i in range(terms)) + "'" if terms else "'Y ~ X1 + X2'"
        raise UserError(f"{text!r} is not a formula {form} of columns; arithmetic goes into --map")
    for name in names:
        _needed(name, table, f"formula {text!r}")
    if len(set(names)) < len(names):
        raise UserError(f"formula {text!r} names a column twice")
    return names[0], names[1:]


def _needed(name: str, table: pl.DataFrame, where: str) -> None:
    if name not in table.columns:
        raise UserError(f"{where}: no column {name!r}; {nearest(name, table.columns)}")


def _fraction(text: str) -> float:
    try:
        value = float(text.rstrip("% ")) / (100 if text.rstrip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--within must be a positive fraction such as 0.25% or 0.0025, got {text!r}")
    return value


def _numbers(table: pl.DataFrame, name: str) -> np.ndarray:
    """A column as numbers, NaN where it holds none."""
    values = table[name].cast(pl.Float64, strict=False)
    if len(values) and values.null_count() == len(values) and table[name].null_count() < len(values):
        raise UserError(f"column {name!r} must be numbers, got {str(table[name].drop_nulls()[0])[:40]!r}")
    return values.fill_null(math.nan).to_numpy()


def _near(table: pl.DataFrame, loss: str, within: float, by: Sequence[str], warnings: list[str]) -> pl.DataFrame:
    _needed(loss, table, "--of")
    values = _numbers(table, loss)
    unknown = int((~np.isfinite(values)).sum())
    if unknown:
        warnings.append(f"{unknown} of {len(table)} rows dropped: {loss} is missing or not finite")
    return table.filter(pl.Series(near_minimum(values, within, [table[name].to_numpy() for name in by])))


def _groups(table: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    if not by:
        yield {}, table
        return
    for piece in table.sort(by, maintain_order=True).partition_by(by, maintain_order=True):
        yield {name: piece[name][0] for name in by}, piece


def _scan(key: Mapping[str, Any], rows: pl.DataFrame, steps: Steps) -> _Found:
    y, (x,) = _formula(steps.scan, rows, 1)
    at, loss = _numbers(rows, x), _numbers(rows, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(at > 0, np.log2(at), math.nan)
    sigma = _numbers(rows, "sigma") if "sigma" in rows.columns else None
    anchor = steps.anchor
    if anchor is None and steps.recipe == "paper" and "loss_start" in rows.columns:
        starts = _numbers(rows, "loss_start")
        anchor = float(starts[np.isfinite(starts)].mean()) if np.isfinite(starts).any() else None
    found = optimum(logs, loss, sigma, cast(Recipe, steps.recipe), anchor)
    row = rows.row(found.nearest, named=True) if found.nearest is not None else {}
    row |= {x: 2.0**found.x, y: found.y} if math.isfinite(found.x) else {}
    return _Found(key, found, row, found.usable, ", ".join(found.flags))


def _quadratic(key: Mapping[str, Any], rows: pl.DataFrame, steps: Steps) -> _Found:
    y, (a, b) = _formula(steps.quadratic, rows, 2)
    first, second, loss = _numbers(rows, a), _numbers(rows, b), _numbers(rows, y)
    known = np.isfinite(loss) & (first > 0) & (second > 0) & np.isfinite(first) & np.isfinite(second)
    try:
        found = bowl(np.log2(first[known]), np.log2(second[known]), loss[known])
    except UserError as error:
        return _Found(key, None, {}, False, str(error).removeprefix("bowl: "))
    u, v = found.vertex
    if not found.is_minimum:
        return _Found(key, found, {}, False, "no minimum")
    distance = np.hypot(np.log2(first[known]) - u, np.log2(second[known]) - v)
    row = rows.row(int(np.flatnonzero(known)[np.argmin(distance)]), named=True)
    row |= {a: 2.0**u, b: 2.0**v, y: found.value}
    return _Found(key, found, row, found.interior, "" if found.interior else "outside the rows")


def _law(text: str, table: pl.DataFrame, interactions: bool, warnings: list[str]) -> PowerLaw:
    y, names = _formula(text, table)
    columns = {name: _numbers(table, name) for name in (y, *names)}
    good = np.all([np.isfinite(values) & (values > 0) for values in columns.values()], axis=0)
    if not good.all():
        warnings.append(f"{text}: {int((~good).sum())} of {len(good)} rows dropped: a value is missing or not positive")
    return power_law(columns[y][good], {name: columns[name][good] for name in names}, interactions=interactions)


def _shown(item: _Found, names: Sequence[str]) -> dict[str, str]:
    """One row of the table of optima; ``names``: the variables of the fit."""
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in item.key.items()}
    fit = item.fit
    if isinstance(fit, Optimum):
        low, high = fit.interval or (math.nan, math.nan)
        shown |= {
            f"{names[0]}*": two_to(fit.x),
            "90%": f"{two_to(low)} .. {two_to(high)}" if fit.interval else "",
            "loss": _show.fixed(fit.y),
            "curvature": f"{fit.curvature:.4g}" if math.isfinite(fit.curvature) else UNKNOWN,
        }
    else:
        u, v, value = (*fit.vertex, fit.value) if fit and fit.is_minimum else (math.nan, math.nan, math.nan)
        shown |= {f"{names[0]}*": two_to(u), f"{names[1]}*": two_to(v), "loss": _show.fixed(value)}
    return shown | {"rows": str(fit.n) if fit else f"under {TERMS} or too alike", "flags": item.why}


def _show_law(text: str, law: PowerLaw) -> None:
    terms = {"intercept (log2)": (law.intercept, law.intercept_error)}
    terms |= {name: (value, law.standard_errors[name]) for name, value in law.exponents.items()}
    rows = []
    for name, (value, error) in terms.items():
        row = {"": name, "exponent": error_digits(value, error)}
        if name in law.exponents:
            low, high = law.interval(name)
            row["90%"] = f"{low:.3f} .. {high:.3f}" if math.isfinite(low) else ""
        rows.append({"90%": "", **row})
    columns = ("", "exponent", "90%")
    print(f"{text}: n = {law.n}, R2 = {law.r2:.3f}, scatter {law.scatter:.3f} octaves")
    _show.table([{key: row[key] for key in columns} for row in rows])
    _show.warn(f"{text}: {warning}" for warning in law.warnings)
