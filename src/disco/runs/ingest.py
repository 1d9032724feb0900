"""Anybody's table of runs, checked and in the units of this project. ``runs.convert`` makes records of it. No torch.

Two forms: "results" has a row per run, or per run and horizon; "series" has a row per run and step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from disco.errors import UserError
from disco.runs.imported import NEAR, Form
from disco.runs.mapping import nearest, with_columns
from disco.runs.presets import expand
from disco.runs.units import power, short

TEXT = {
    "run": "name of the run",
    "model": "name of the model",
    "family": "what else separates studies",
    "optimizer": "",
}
NUMBERS = {
    "batch": "tokens per step",
    "lr": "peak learning rate",
    "tokens": "tokens trained on",
    "step": "optimizer steps",
    "loss": "nats per token",
    "loss_train": "nats per token",
    "loss_start": "loss at step 0, nats",
    "sigma": "standard deviation of the loss, nats",
    "seed": "",
    "width": "",
    "depth": "layers",
    "parameters": "",
    "ratio_input": "learning rate of the group over lr",
    "ratio_hidden": "learning rate of the group over lr",
    "ratio_output": "learning rate of the group over lr",
    "momentum": "weight of the old buffer",
    "weight_decay": "",
    "warmup": "tokens",
    "decay": "share of the run over which the rate falls, 0 to 1",
    "context": "tokens",
    "points": "evaluations behind a loss",
}
DIVERGED = "diverged"
REQUIRED = ("lr", "batch", "tokens", "loss")
LARGEST = 2.0**53
RANGES = {
    **dict.fromkeys(("width", "depth", "parameters", "context"), (1, LARGEST)),
    **dict.fromkeys(("seed", "weight_decay", "warmup"), (0, LARGEST)),
    **dict.fromkeys(("momentum", "decay"), (0, 1)),
    **dict.fromkeys(("ratio_input", "ratio_hidden", "ratio_output"), (1e-300, LARGEST)),
}
"""Least and largest value of settings; missing is allowed, it means unknown."""
WHOLE = ("batch", "tokens", "width", "depth", "parameters", "seed", "context")
NORM = re.compile(r"norm/(input|hidden|output|vector)/(\w+)")
SHORT = {"norm": "norm/output/rms_to_inf"}

SETTINGS = (
    "model", "family", "optimizer", "width", "depth", "parameters", "batch", "ratio_input", "ratio_hidden",
    "ratio_output", "momentum", "weight_decay", "warmup", "decay", "context", "seed",
)  # fmt: skip
"""What is the same in all rows of a run; the learning rate too, but in a series it may be logged as it decays."""


@dataclass(frozen=True)
class Ingested:
    """A table whose columns are those of ``TEXT`` and ``NUMBERS``, diverged, and norm/<group>/<norm>."""

    table: pl.DataFrame
    form: Form
    source: str
    """The files."""
    rows: int
    """Before any was dropped."""
    dropped: Mapping[str, int]
    """Rows by the reason why they were."""
    notes: tuple[str, ...]
    """What was assumed, and what looks wrong."""


def ingest(
    table: pl.DataFrame, maps: Sequence[str] = (), preset: str = "", form: str = "", source: str = ""
) -> Ingested:
    """Checks a table and brings it into columns and units that fits understand.

    Columns that have one of the names already need no map: batch and tokens are then in tokens, the loss in nats.

    Args:
        table: See ``sources.read_tables``.
        maps: Assignments, see ``mapping``; they win over the preset's.
        preset: See ``presets``.
        form: "results" or "series"; "" means series just where there is a step (and no points, the count of
            evaluations behind a result).
        source: For messages and records.

    Raises:
        UserError: a map that cannot be used, a column that is needed and missing, or no row that can be used.
    """
    if form not in ("", "results", "series"):
        raise UserError(f"--form must be results or series, got {form!r}")
    given = [text.partition("=")[0].strip() for text in maps]
    raw = table.columns
    if preset:
        table, own = expand(preset, table)
        maps = [text for text in own if text.partition("=")[0] not in given] + list(maps)
    targets = {text.partition("=")[0].strip() for text in maps}
    for name in targets:
        if not _known(name):
            raise UserError(
                f"--map {name}=...: a run has no {name}; {nearest(name, [*_all(), 'norm/output/rms_to_inf'])}"
            )
    full = with_columns(table, maps)
    twice = next((to for name, to in SHORT.items() if {name, to} <= set(full.columns)), "")
    if twice:
        raise UserError(f"the columns norm and {twice} are one; map or rename one of them")
    used = [name for name in full.columns if _known(name)]
    words = [name for name in used if name not in {*targets, *REQUIRED} and _is_text(name, full[name])]
    full = full.select(pl.col(name).alias(SHORT.get(name, name)) for name in used if name not in words)
    full = _typed(full)
    kind: Form = "series" if (form or _guess(full)) == "series" else "results"
    if kind == "series" and "run" in full.columns:  # a setting that was logged now and then holds in between
        held = [name for name in (*SETTINGS, "lr", "loss_start") if name in full.columns]
        full = full.with_columns(pl.col(held).forward_fill().backward_fill().over("run"))
    if {"step", "batch"} <= set(full.columns):
        known = ["tokens"] if "tokens" in full.columns else []
        full = full.with_columns(pl.coalesce(*known, pl.col("step") * pl.col("batch")).alias("tokens"))
    for name in REQUIRED:
        if name not in full.columns:
            also = " (or step)" if name == "tokens" else ""
            raise UserError(
                f"{source or 'the table'}: nothing gives {name}{also}, in {NUMBERS[name]}; "
                f"say which column with --map {name}=COLUMN; {nearest(name, raw)}"
            )
    notes = [f"column {name} is left out: it holds text, and a run's {name} is a number" for name in words]
    notes += _checks(full, kind)
    kept, dropped = _clean(full, kind, notes)
    if not len(kept):
        reasons = "; ".join(f"{count}: {reason}" for reason, count in dropped.items())
        raise UserError(f"{source or 'the table'}: none of {len(full)} rows can be used ({reasons})")
    return Ingested(kept, kind, source, len(full), dropped, tuple(notes))


def norm_of(name: str) -> tuple[str, str] | None:
    """Group and norm of a column norm/<group>/<norm>; None of any other."""
    match = NORM.fullmatch(name)
    return (match[1], match[2]) if match else None


def _all() -> list[str]:
    return [*TEXT, *NUMBERS, DIVERGED, *SHORT]


def _known(name: str) -> bool:
    return name in _all() or NORM.fullmatch(name) is not None


def _guess(table: pl.DataFrame) -> str:
    return "series" if "step" in table.columns and "points" not in table.columns else "results"


def _typed(table: pl.DataFrame) -> pl.DataFrame:
    """Numbers as Float64, text as text; a column of the wrong kind is an error, a cell of the wrong kind missing."""
    columns = []
    for name in table.columns:
        values = table[name]
        if name in TEXT:
            columns.append(values.cast(pl.String))
        elif name == DIVERGED:
            columns.append(_truth(values))
        else:
            numbers = values.cast(pl.Float64, strict=False)
            if _is_text(name, values):
                got = str(values.drop_nulls()[0])[:40]
                raise UserError(f"{name} must be numbers ({NUMBERS.get(name, 'a norm')}), got {got!r}")
            columns.append(numbers if name in (*REQUIRED, "step") else numbers.fill_nan(None))
    return pl.DataFrame(columns)


def _is_text(name: str, values: pl.Series) -> bool:
    """Whether a column that should hold numbers holds none, but something else."""
    if name in TEXT or name == DIVERGED or values.null_count() == len(values):
        return False
    return values.cast(pl.Float64, strict=False).null_count() == len(values)


def _truth(values: pl.Series) -> pl.Series:
    if values.dtype == pl.String:
        lower = values.str.strip_chars().str.to_lowercase()
        wrong = values.filter(~lower.is_in(["true", "false", "1", "0", "yes", "no", ""]).fill_null(True))
        if len(wrong):
            raise UserError(f"diverged must be true or false, got {wrong[0]!r}")
        return lower.is_in(["true", "1", "yes"]).fill_null(False).alias(values.name)
    return (values.cast(pl.Float64, strict=False) != 0).fill_null(False).alias(values.name)


def _checks(table: pl.DataFrame, form: Form) -> Iterator[str]:
    """What looks like a wrong unit, or a wrong form."""
    good = table.filter(pl.all_horizontal(pl.col(name) > 0 for name in ("batch", "tokens")))
    if "step" in table.columns:
        ratio = good.filter(pl.col("step") > 0).select(pl.col("tokens") / (pl.col("step") * pl.col("batch")))
        middle = ratio.to_series().median() if len(ratio) else None
        if isinstance(middle, float) and math.isfinite(middle) and abs(middle - 1) > 0.02:
            hint = f"; if it is in sequences of {middle:.0f}, --map batch=...*{middle:.0f}" if middle > 16 else ""
            yield f"tokens are {middle:.4g} x step x batch in the middle of the table: is batch in tokens?{hint}"
    elif len(good):
        steps = good.select((pl.col("tokens") / pl.col("batch")).median()).item()
        if steps > 3e6:
            size = power(float(np.median(good["batch"].to_numpy())))
            yield f"batches of {size} would mean {short(steps)} steps: is batch in tokens, not in sequences?"
    losses = table["loss"].drop_nulls().to_numpy()
    losses = losses[np.isfinite(losses)]
    if len(losses) and (np.median(losses) > 15 or losses.min() <= 0):
        shown = f"{losses.min():.4g} to {losses.max():.4g}"
        yield f"losses from {shown} are unusual for nats per token; bits become nats with --map loss=...*0.693147"
    if form == "series":
        if "sigma" in table.columns:
            yield "sigma is not used in a series: the spread of a horizon's evaluations takes its place"
        if "decay" not in table.columns:
            yield "horizons are cut from the series as of runs at a constant rate; if it falls, add --map decay=..."


def _clean(table: pl.DataFrame, form: Form, notes: list[str]) -> tuple[pl.DataFrame, dict[str, int]]:
    """Usable rows, whole numbers whole, and a number for every run in _run; what was dropped, by reason."""
    if DIVERGED not in table.columns:
        bad = pl.col("loss").is_nan() | pl.col("loss").is_infinite()
        table = table.with_columns(bad.fill_null(False).alias(DIVERGED))
        count = int(table[DIVERGED].sum())
        if count:
            notes.append(f"{count} rows with a loss that is not finite: taken as diverged")
    norms = [name for name in table.columns if norm_of(name)]
    table = table.with_columns(pl.when(pl.col("loss").is_finite()).then("loss").alias("loss"))
    table = table.with_columns(pl.when(pl.col(n).is_finite() & (pl.col(n) > 0)).then(n).alias(n) for n in norms)
    if "sigma" in table.columns:
        table = table.with_columns(pl.when(pl.col("sigma") >= 0).then("sigma").alias("sigma"))
    reasons = [pl.when(wrong).then(pl.lit(text)) for text, wrong in _reasons(table, form, norms)]
    table = table.with_columns(pl.coalesce(reasons).alias("_reason"))
    dropped = dict(table["_reason"].drop_nulls().value_counts(sort=True).iter_rows())
    kept = table.filter(pl.col("_reason").is_null()).drop("_reason")
    whole = [name for name in WHOLE if name in kept.columns]
    kept = kept.with_columns(pl.col(whole).round().cast(pl.Int64))
    return (_series if form == "series" else _results)(kept, dropped, notes), dropped


def _reasons(table: pl.DataFrame, form: Form, norms: Sequence[str]) -> Iterator[tuple[str, pl.Expr]]:
    """Why a row cannot be used; the first reason that holds counts."""
    if "run" in table.columns:
        yield "no name of the run", pl.col("run").is_null()
    for name in ("lr", "batch", "tokens"):
        small = pl.col(name) < 1e-300 if name == "lr" else pl.col(name).round() < 1
        if form == "series" and name == "tokens":  # step 0 of a series is a row, of results none
            small = pl.col(name) < 0
        yield f"{name} is missing", pl.col(name).is_null() | pl.col(name).is_nan()
        yield f"{name} is not positive", small
        yield f"{name} is too large", pl.col(name) > LARGEST
    if form == "series" and "step" in table.columns:
        yield "step is missing", pl.col("step").is_null() | pl.col("step").is_nan()
        yield "step is not a count", (pl.col("step") < 0) | (pl.col("step") > LARGEST)
    for name, (low, high) in RANGES.items():
        if name in table.columns:
            between = f"between {low:g} and {high:g}" if high < LARGEST else ("0 or more" if not low else "positive")
            yield f"{name} is not {between}", ~pl.col(name).is_between(low, high)
    measured = pl.col("loss").is_not_null() | pl.col(DIVERGED)
    if form == "results":
        yield "loss is missing", ~measured
        return
    others = [name for name in (*norms, "loss_train") if name in table.columns]
    yield "nothing was measured", ~pl.any_horizontal(measured, *(pl.col(name).is_not_null() for name in others))


def _series(table: pl.DataFrame, dropped: dict[str, int], notes: list[str]) -> pl.DataFrame:
    table = table.drop("sigma", strict=False)
    if "step" not in table.columns:
        table = table.with_columns(step=(pl.col("tokens") / pl.col("batch")))
    table = table.with_columns(pl.col("step").round().cast(pl.Int64))
    keys = _keys(table, "run" not in table.columns)
    if "run" not in table.columns:
        if table.select(*keys, "step").is_duplicated().any():
            raise UserError("several rows have the same settings and step; name the runs with --map run=COLUMN")
    else:  # a run whose batch grows has no one batch to be an optimum of
        one = [name for name in keys if name != "batch"]
        ramp = (pl.col("batch").n_unique().over(one) > 1) & (pl.len().over(one) == pl.col("step").n_unique().over(one))
        ramps = table.with_columns(ramp.alias("_ramp"))
        table = ramps.filter(~pl.col("_ramp")).drop("_ramp")
        if len(table) < len(ramps):
            dropped["the batch changes within the run"] = len(ramps) - len(table)
    table = table.with_columns(pl.struct(keys).rank("dense").alias("_run"))
    last = table.group_by("_run", "step", maintain_order=True).agg(pl.exclude("_run", "step").drop_nulls().last())
    if len(last) < len(table):
        dropped["repeats a step of its run (the last value of each column is kept)"] = len(table) - len(last)
    return last.sort("_run", "step", maintain_order=True)


def _results(table: pl.DataFrame, dropped: dict[str, int], notes: list[str]) -> pl.DataFrame:
    table = table.drop("step", strict=False).with_columns(tokens=_snapped(table["tokens"]))
    keys = [*_keys(table, True), *(["run"] if "run" in table.columns else [])]
    same = [*keys, "tokens"]
    unique = table.unique([*same, "loss", DIVERGED], keep="first", maintain_order=True)
    if len(unique) < len(table):
        dropped["repeats another row"] = len(table) - len(unique)
    if unique.select(same).is_duplicated().any():
        if "seed" in table.columns or "run" in table.columns:
            first = unique.unique(same, keep="first", maintain_order=True)
            dropped["another loss for the run and horizon of an earlier row"] = len(unique) - len(first)
            unique = first
        else:
            unique = unique.with_columns(seed=pl.int_range(pl.len()).over(same))
            notes.append("rows with equal settings are taken as seeds, numbered in their order")
            keys.append("seed")
    decayed = (pl.col("decay").fill_null(0) > 0) if "decay" in unique.columns else pl.lit(False)
    own = pl.when(decayed).then("tokens").otherwise(0).alias("_own")  # a decayed run has one horizon
    run = pl.struct(*keys, own).rank("dense").alias("_run")
    unique = unique.with_columns(run)
    most = max(unique["_run"].value_counts()["count"].to_list(), default=0)
    if most > 60:
        notes.append(f"up to {most} horizons of one run: if each row is an evaluation, use --form series")
    return unique.sort("_run", "tokens", maintain_order=True)


def _keys(table: pl.DataFrame, rate: bool) -> list[str]:
    """The columns whose values make a run."""
    names = (*SETTINGS, "lr") if rate else (*SETTINGS, "run")
    return [name for name in names if name in table.columns]


def _snapped(tokens: pl.Series) -> pl.Series:
    """Horizons that differ by less than a step's rounding made equal, so that batches share them."""
    return pl.Series("tokens", snap(tokens.to_numpy()), dtype=pl.Int64)


def snap(tokens: np.ndarray) -> np.ndarray:
    """Values within 0.1% of each other as one: the power of two among them, else the largest.

    A chain of close values that as a whole is wider than that is left alone.
    """
    distinct = np.unique(tokens)
    label = dict(zip(distinct.tolist(), distinct.tolist(), strict=True))
    breaks = np.flatnonzero(np.diff(distinct) > NEAR * distinct[1:]) + 1
    for group in np.split(distinct, breaks):
        if len(group) and group[-1] <= (1 + NEAR) * group[0]:
            two = 2 ** round(math.log2(group[-1])) if group[-1] > 0 else 0
            chosen = two if group[0] * (1 - NEAR) <= two <= group[-1] * (1 + NEAR) and len(group) > 1 else group[-1]
            label |= dict.fromkeys(group.tolist(), int(chosen))
    return np.array([label[value] for value in tokens.tolist()], dtype=np.int64)
