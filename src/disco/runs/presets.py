"""Mappings for published tables, by name. Those given with --map come on top and win."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import polars as pl

from disco.errors import UserError
from disco.runs.mapping import nearest


@dataclass(frozen=True)
class Preset:
    """How one kind of table is read."""

    about: str
    maps: Mapping[str, tuple[str, ...]]
    """Expressions by name; of several the first whose columns are all there is taken."""
    required: tuple[str, ...]
    """Names that must find their columns; the others are left out where theirs are missing."""
    derive: Callable[[pl.DataFrame], pl.DataFrame] = field(default=lambda table: table)
    """Adds what arithmetic cannot say."""


def expand(name: str, table: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The table with what the preset derives, and its assignments for that table.

    Raises:
        UserError: there is no such preset, or the table lacks a column it needs.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; {nearest(name, PRESETS)}")
    preset = PRESETS[name]
    table = preset.derive(table)
    maps = []
    for target, choices in preset.maps.items():
        found = next((text for text in choices if all(column in table.columns for column in _columns(text))), None)
        if found is not None:
            maps.append(f"{target}={found}")
        elif target in preset.required:
            column = next(each for each in _columns(choices[0]) if each not in table.columns)
            raise UserError(f"preset {name}: no column {column!r} for {target}; {nearest(column, table.columns)}")
    return table, maps


def _columns(text: str) -> list[str]:
    """The columns of a preset's expression: what stands in backquotes."""
    return text.split("`")[1::2]


_TRACKED = re.compile(r"track_param_(\w+?)/model_part_\d+/(?:.*/)?((tok_embeddings|output)|layers\.\d+\..*)")
_NORMS = {"rms_to_l1": "rms_to_inf", "l1_to_rms": "one_to_rms", "rms_to_rms": "rms_to_rms"}
"""Theirs and ours. They take the norms of an embedding of its transpose, as method and this project do."""
_GROUPS = {"tok_embeddings": "input", "output": "output"}


def _norm_transfer(table: pl.DataFrame) -> pl.DataFrame:
    """Norms by layer group, the base rate and ratios where groups have rates of their own, and decay branches by name.

    Runs with one rate for all groups have it in lr; where the groups differ lr is empty. The base is then the output
    layer's. A decayed run goes from its constant parent's checkpoint at 75% of the total horizon linearly to 0.
    """
    made = []
    if {"lr_in", "lr_hidden", "lr_out"} <= set(table.columns):
        base = pl.coalesce(pl.col("lr", "lr_out").cast(pl.Float64)) if "lr" in table.columns else pl.col("lr_out")
        ratios = {f"ratio_{to}_": pl.col(f"lr_{at}") / base for to, at in (("input", "in"), ("hidden", "hidden"))}
        made = [base.alias("lr_"), *(value.alias(key) for key, value in ratios.items())]
    if "run_name" in table.columns:
        decayed = pl.col("run_name").cast(pl.String).str.contains("decayed")
        made.append((decayed * 0.25).alias("decay_"))
    layers: dict[str, list[str]] = {}
    for name in table.columns:
        match = _TRACKED.fullmatch(name.removesuffix(".weight"))
        if match and match[1] in _NORMS:
            layers.setdefault(f"norm/{_GROUPS.get(match[3], 'hidden')}/{_NORMS[match[1]]}_", []).append(name)
    made += [pl.max_horizontal(names).alias(key) for key, names in layers.items()]
    return table.with_columns(made)


PRESETS: Mapping[str, Preset] = {
    "norm-transfer-logs": Preset(
        about="Logs of arXiv:2510.03871, as their extract_wandb_data.py or preprocess_data.py writes them. Batches "
        "there are sequences of 4096; rms_to_l1 is rms_to_inf, l1_to_rms is one_to_rms; momentum is the weight of "
        "the new gradient (1.0 = none); the loss at step 0 is 11.765.",
        maps={
            "run": ("`run_name`",),
            "step": ("`_step`", "`step`"),
            "batch": ("`bs`*4096",),
            "tokens": ("`_step`*`bs`*4096", "`horizon`", "`step`*`bs`*4096"),
            "loss": ("`loss_metrics/global_avg_loss`", "`train_loss`", "`train_loss_mean`"),
            "sigma": ("`train_loss_std`",),
            "lr": ("`lr_`", "`lr`"),
            "ratio_input": ("`ratio_input_`",),
            "ratio_hidden": ("`ratio_hidden_`",),
            "seed": ("`seed`",),
            "momentum": ("1-`momentum`",),
            "decay": ("`decay_`",),
            "context": ("4096",),
            "loss_start": ("11.765",),
            "optimizer": ("'scion'",),
            "norm/output/rms_to_inf": ("`norm/output/rms_to_inf_`", "`output_norm`", "`output_norm_mean`"),
            **{
                f"norm/{group}/{norm}": (f"`norm/{group}/{norm}_`",)
                for group in ("input", "hidden", "output")
                for norm in _NORMS.values()
                if (group, norm) != ("output", "rms_to_inf")
            },
        },
        required=("batch", "tokens", "loss", "lr"),
        derive=_norm_transfer,
    ),
    "step-law": Preset(
        about="Table of Step Law (Li et al. 2025, arXiv:2503.04715): AdamW with a rate that decays over the whole run, "
        "so each row is a run of its own. Batches there are sequences of 2048; the loss is the smoothed one.",
        maps={
            "run": ("`exp_name`",),
            "lr": ("`lr`",),
            "batch": ("`bs`*2048",),
            "tokens": ("`D`",),
            "loss": ("`smooth loss`", "`loss`"),
            "parameters": ("`N`",),
            "width": ("`h`",),
            "depth": ("`numl`",),
            "decay": ("1",),
            "context": ("2048",),
            "optimizer": ("'adamw'",),
        },
        required=("lr", "batch", "tokens", "loss", "parameters"),
    ),
    "torchtitan": Preset(
        about="Metrics of torchtitan, from its log on the terminal or exported from W&B. Batches are not in them: add "
        "--map batch=TOKENS. Norms are there only if the training loop logs them.",
        maps={
            "step": ("`step`", "`_step`"),
            "tokens": ("`n_tokens_seen`",),
            "loss": ("`loss_metrics/global_avg_loss`", "`loss`"),
            "lr": ("`lr`", "`loss_metrics/lr`"),
        },
        required=("step", "loss"),
    ),
    "transformers": Preset(
        about="log_history in the trainer_state.json of Hugging Face's Trainer. Batches are not in it: add "
        "--map batch=TOKENS. Norms are there only if a callback logs them.",
        maps={
            "step": ("`step`",),
            "tokens": ("`num_input_tokens_seen`",),
            "loss": ("`loss`",),
            "lr": ("`learning_rate`",),
        },
        required=("step", "loss"),
    ),
}  # fmt: skip
