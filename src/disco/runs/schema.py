"""The run record, schema version 1: file names, metric keys, outcomes. Keys only grow; docs/metrics.md explains each.

<runs>/<id>/config.json     {"schema", "id", "config", "parameters", "groups": {group: [layer, ...]}}
<runs>/<id>/metrics.jsonl   one JSON object per evaluation point, keys sorted
<runs>/<id>/summary.json    {"schema", "id", "outcome", "reason", "step", "tokens", "parent", ...}; last, atomic
<runs>/<id>/checkpoints/    what an exact resume needs
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

SCHEMA_VERSION = 1
CONFIG, METRICS, SUMMARY, CHECKPOINTS = "config.json", "metrics.jsonl", "summary.json", "checkpoints"
DATA = "data"
"""Folder beside the runs with the tokens that they share."""


class Outcome(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    PRUNED = "pruned"
    FAILED = "failed"


class Metric(StrEnum):
    """Keys of a metrics line. Those that end in "/" are completed by ``lr_key`` and ``norm_key``."""

    STEP = "step"
    TOKENS = "tokens"
    PATH = "path"
    """Path length: the sum over steps of the base learning rate."""
    LOSS_TRAIN = "loss/train"
    """Mean training loss in nats over the window that ends at this line: the last 1/64 of the steps, at least one."""
    LOSS_TRAIN_STD = "loss/train_std"
    """Standard deviation of the single-step training losses in that window."""
    LOSS_TRAIN_COUNT = "loss/train_count"
    """Steps in that window."""
    LOSS_VALID = "loss/valid"
    """Held-out loss in nats at this step."""
    LR = "lr/"
    NORM = "norm/"
    TIME_WALL = "time/wall"
    """Seconds this run has been trained for, over all its resumptions. Keys under ``time/`` are not deterministic."""


OF = ("weights", "updates", "momentum")


def lr_key(group: str) -> str:
    """``lr/<group>``: the learning rate of a layer group at this step."""
    return f"{Metric.LR}{group}"


MOMENTUM = ("frobenius", "momentum")
"""The norm of the momentum (without any, of the gradient) that is logged after each step. It tells how noisy gradients
are, and so how large batches really were: late in a run most of it is noise (McCandlish et al., arXiv:1812.06162)."""


def norm_key(norm: str, layer: str, of: str = "weights") -> str:
    """``norm/<weights|updates|momentum>/<norm>/<layer>``.

    Raises:
        ValueError: ``of`` is not one of the three.
    """
    if of not in OF:
        raise ValueError(f"norms are taken of {', '.join(OF)}, got {of!r}")
    return f"{Metric.NORM}{of}/{norm}/{layer}"


def deterministic(line: Mapping[str, object]) -> dict[str, object]:
    """The fields of a metrics line that two executions of the same run share byte for byte."""
    return {key: value for key, value in line.items() if not key.startswith("time/")}
