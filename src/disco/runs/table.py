"""Records as polars tables: one row per run and horizon for fits, one row per evaluation for plots. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from disco.runs import imported
from disco.runs.horizons import powers_of_two, window
from disco.runs.imported import IMPORTED
from disco.runs.reader import Array, Run
from disco.runs.schema import Metric, Outcome
from disco.runs.units import exact

AXES = (
    "model.width", "model.depth", "batch", "horizon", "seed", "optimizer.lr", "parent", "keep", "checkpoint_seconds",
    "data.source", "data.tokenizer", "data.text_field", "data.vocab",
    "parallel.replicate", "parallel.shard", "parallel.tensor", "parallel.micro_batch", "parallel.recompute",
    "parallel.device",
)  # fmt: skip
"""Settings that do not separate families: what a study varies, what changes no numbers, and what data.digest covers."""

DEFAULTS: Mapping[str, Any] = {
    "optimizer.ratios.input": 1.0,
    "optimizer.ratios.hidden": 1.0,
    "optimizer.ratios.output": 1.0,
    "optimizer.ratios.vector": 1.0,
    "optimizer.momentum": 0.0,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.eps": 1e-8,
    "optimizer.orthogonalize": "newton_schulz",
    "schedule.warmup": 0,
    "schedule.decay": 0.0,
    "model.kv_heads": None,
    "model.ffn_width": None,
    "model.placement": "everywhere",
    "model.residual": "identity",
    "model.depth_init": "total",
    "model.rope_theta": 1e4,
    "model.norm_eps": 1e-20,
    "divergence": 3.0,
    "compile": False,
    "precision": "fp32",
    "data.repeat": 1,
}
"""What a family's name leaves out (the defaults of ``train.config``); other values of these are mentioned."""


def cells(runs: Sequence[Run], loss: str = Metric.LOSS_VALID) -> pl.DataFrame:
    """One row per run and horizon D that it reached, or did not reach because it diverged.

    Horizons are the run's own and, at a constant rate, the powers of two that it was evaluated at. Columns:

    * run, model, width, depth, parameters, optimizer, family, ratio_input, ratio_hidden, ratio_output, seed, batch, lr;
    * tokens (D), step, path: at the horizon itself;
    * loss: mean over the (up to three) evaluations of the horizon's trailing window, sigma: their standard deviation,
      points: how many; loss_start: held-out loss at step 0 (a decay branch has its parent's);
    * norm/<group>/<norm>: largest of the group's layers, geometric mean over the window;
    * diverged: true in rows without a loss, which bound the grid of learning rates.

    Missing values are null.
    """
    starts = {run.id: _at(run, Metric.LOSS_VALID, [0]) for run in runs}
    rows = []
    for run, name in zip(runs, families(runs), strict=True):
        head = _head(run, name)
        start = starts[run.id] if starts[run.id].size else starts.get(run.config.get("parent") or "", np.empty(0))
        head["loss_start"] = float(start[0]) if start.size else None
        norms = _group_norms(run)
        for tokens in horizons(run):
            row = _cell(run, tokens, loss, norms)
            if row or diverged(run):
                rows.append(head | {"tokens": tokens, "diverged": not row} | row)
    return _frame(rows)


def columns(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """``cells`` as arrays by column, as ``disco.fit.fit_table`` takes them; missing numbers are NaN."""
    table = cells(runs)
    return {name: table[name].to_numpy() for name in table.columns}


def curves(runs: Sequence[Run]) -> pl.DataFrame:
    """One row per evaluation of every run: step, tokens, path; loss_train, loss_valid and norm/<group>/<norm>."""
    parts = []
    for run, family in zip(runs, families(runs), strict=True):
        measured = {
            "step": Metric.STEP,
            "tokens": Metric.TOKENS,
            "path": Metric.PATH,
            "loss_train": Metric.LOSS_TRAIN,
            "loss_valid": Metric.LOSS_VALID,
        }
        columns = {name: run.column(key) for name, key in measured.items()} | _group_norms(run)
        head = _head(run, family)
        part = pl.DataFrame(columns, nan_to_null=True)
        keys = ("run", "model", "family", "batch", "lr", "seed")
        part = part.with_columns(pl.col("step", "tokens").cast(pl.Int64), *(pl.lit(head[k]).alias(k) for k in keys))
        parts.append(part.select(*keys, pl.exclude(*keys)))
    return pl.concat(parts, how="diagonal_relaxed") if parts else pl.DataFrame()


def layer_norms(run: Run, of: str = "weights") -> pl.DataFrame:
    """Every measured norm of every layer of one run, long: step, tokens, group, layer, norm, value."""
    steps, tokens = run.column(Metric.STEP), run.column(Metric.TOKENS)
    parts = [
        pl.DataFrame({"step": steps, "tokens": tokens, "value": run.metrics[key]}, nan_to_null=True)
        .drop_nulls("value")
        .with_columns(
            pl.col("step", "tokens").cast(pl.Int64),
            pl.lit(group).alias("group"), pl.lit(layer).alias("layer"), pl.lit(norm).alias("norm"),
        )
        for key, norm, layer, group in _norm_keys(run, of)
    ]  # fmt: skip
    columns = ("step", "tokens", "group", "layer", "norm", "value")
    return pl.concat(parts).select(columns) if parts else pl.DataFrame(schema=columns)


def families(runs: Iterable[Run]) -> list[str]:
    """For each run a readable name of all that separates studies: "scion", "scion, ratio hidden 2^-3, momentum 0.9".

    Two runs share it just when their configurations are equal but for ``AXES``. Of ``DEFAULTS`` it mentions what
    differs from them; of the rest, such as the data, that in which the runs at hand differ. Imported runs may bring a
    name of their own, which then stands for that of the optimizer.
    """
    settings = [dict(_flat({key: part for key, part in run.config.items() if key != IMPORTED})) for run in runs]
    apart = {*AXES, *DEFAULTS, "optimizer.name", "model.name", "family"}
    others = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in apart]
    varied = [key for key in others if len({str(each.get(key)) for each in settings}) > 1]
    return [_family(each, varied) for each in settings]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _family(settings: Mapping[str, Any], varied: Iterable[str]) -> str:
    unusual = [key for key, default in DEFAULTS.items() if settings.get(key, default) != default]
    name = str(settings.get("family") or settings["optimizer.name"])
    return ", ".join([*([name] if name else []), *(_said(key, settings.get(key)) for key in (*unusual, *varied))])


def _said(key: str, value: Any) -> str:
    """ "weight decay 0.1", "nesterov", "warmup 2^16", "ratio hidden 2^-3", "residual completep"."""
    word = key.replace("ratios.", "ratio ").split(".")[-1].replace("_", " ")
    if isinstance(value, bool):
        return word if value else f"no {word}"
    if key == "data.digest":
        return f"data {str(value)[:6]}"
    if isinstance(value, list):
        return f"{word} {' '.join(f'{item:.12g}' for item in value)}"
    if isinstance(value, int) or word.startswith("ratio"):
        return f"{word} {exact(value)}"
    return f"{word} {value:.12g}" if isinstance(value, float) else f"{word} {value}"


def horizons(run: Run) -> list[int]:
    """The horizons (tokens) that a run is evaluated for, reached or not: its own and, without a decay, those before it.

    The rule is the trainer's (``runs.horizons``); imported runs have one of their own (``runs.imported``).
    """
    if IMPORTED in run.config:
        return imported.horizons(run)
    batch, own = run.config["batch"], run.config["horizon"]
    if dict(_flat(run.config)).get("schedule.decay"):
        return [own]
    return sorted({own, *powers_of_two(batch, run.config["data"]["valid_tokens"], own)})


def diverged(run: Run) -> bool:
    """Whether a run, or the run that it was to branch from, diverged."""
    return run.summary is not None and Outcome.DIVERGED in (run.outcome, run.summary.get("parent_outcome"))


def _cell(run: Run, tokens: int, loss: str, norms: Mapping[str, Array]) -> dict[str, Any]:
    """What was measured at a horizon; empty if it was not reached."""
    if IMPORTED in run.config:
        return imported.cell(run, tokens, loss, norms)
    step = tokens // run.config["batch"]
    if not np.isfinite(_at(run, loss, [step])).any() or not np.isfinite(_at(run, Metric.LOSS_VALID, [step])).any():
        return {}
    steps = window(step)
    losses = _at(run, loss, steps)
    losses = losses[np.isfinite(losses)]
    at = np.isin(run.column(Metric.STEP), steps)
    with np.errstate(divide="ignore"):
        logs = {key: np.log2(values[at & np.isfinite(values)]) for key, values in norms.items()}
    return {
        "step": step,
        "path": float(_at(run, Metric.PATH, [step])[0]),
        "loss": float(losses.mean()),
        "sigma": float(losses.std(ddof=1)) if losses.size > 1 else None,
        "points": int(losses.size),
        **{key: float(2 ** values.mean()) if values.size else None for key, values in logs.items()},
    }


def _at(run: Run, key: str, steps: Sequence[int]) -> Array:
    """A metric's values at those of ``steps`` that have a line."""
    return run.column(key)[np.isin(run.column(Metric.STEP), steps)]


def _norm_keys(run: Run, of: str) -> list[tuple[str, str, str, str]]:
    """(key, norm, layer, group) of every norm that was measured."""
    group_of = {layer: group for group, layers in run.groups.items() for layer in layers}
    prefix = f"{Metric.NORM}{of}/"
    split = [(key, *key.removeprefix(prefix).split("/", 1)) for key in run.metrics if key.startswith(prefix)]
    return [(key, norm, layer, group_of[layer]) for key, norm, layer in split if layer in group_of]


def _group_norms(run: Run) -> dict[str, Array]:
    pairs = sorted({(group, norm) for _, norm, _, group in _norm_keys(run, "weights")})
    return {f"norm/{group}/{norm}": run.norm(group, norm) for group, norm in pairs}


def model_name(config: Mapping[str, Any]) -> str:
    """ "d64-L2", or the name that an imported table gave."""
    model = config["model"]
    return str(model["name"]) if "name" in model else f"d{model['width']}-L{model['depth']}"


def _head(run: Run, name: str) -> dict[str, Any]:
    """What is the same in all rows of a run."""
    config = run.config
    model, optimizer = config["model"], config["optimizer"]
    ratios = {f"ratio_{group}": optimizer["ratios"].get(group, 1.0) for group in ("input", "hidden", "output")}
    return {
        "run": run.id,
        "model": model_name(config),
        "width": model.get("width"),
        "depth": model.get("depth"),
        "parameters": run.parameters,
        "optimizer": optimizer["name"],
        "family": name,
        **ratios,
        "seed": config["seed"],
        "batch": config["batch"],
        "lr": optimizer["lr"],
    }


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    schema = {
        "run": pl.String, "model": pl.String, "width": pl.Int64, "depth": pl.Int64, "parameters": pl.Int64,
        "optimizer": pl.String, "family": pl.String,
        "ratio_input": pl.Float64, "ratio_hidden": pl.Float64, "ratio_output": pl.Float64,
        "seed": pl.Int64, "batch": pl.Int64, "lr": pl.Float64, "tokens": pl.Int64, "step": pl.Int64,
        "path": pl.Float64, "loss": pl.Float64, "sigma": pl.Float64, "points": pl.Int64,
        "loss_start": pl.Float64, "diverged": pl.Boolean,
    }  # fmt: skip
    norms = dict.fromkeys(key for row in rows for key in row if key not in schema)
    return pl.DataFrame(rows, schema=schema | dict.fromkeys(norms, pl.Float64))
