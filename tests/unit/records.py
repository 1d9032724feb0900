"""Run records made by hand."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from disco.runs.schema import SCHEMA_VERSION, Outcome
from disco.runs.writer import RunWriter
from disco.train.config import DataConfig, ModelConfig, TrainConfig, from_dict, to_dict

GROUPS = {"input": ["tok_embeddings"], "hidden": ["layers.0.wq", "layers.0.wo"], "output": ["output"], "vector": []}
DATA = DataConfig(valid_tokens=256, digest="0123456789", vocab=256)
MODEL = ModelConfig(width=16, depth=1, head_size=8, context=64)


def config(**changes: Any) -> TrainConfig:
    """A small run; ``changes`` are keys of TrainConfig, or of its optimizer and schedule as tables."""
    table = {"model": to_dict(MODEL), "data": to_dict(DATA), "batch": 256, "horizon": 2**14, **changes}
    result: TrainConfig = from_dict(TrainConfig, table)
    return result


def write(
    runs: Path,
    config: TrainConfig,
    lines: Iterable[Mapping[str, float]],
    outcome: Outcome | None = Outcome.FINISHED,
    **fields: Any,
) -> Path:
    """Writes a record and returns its folder."""
    document = {"schema": SCHEMA_VERSION, "id": config.id, "config": to_dict(config), "parameters": 11520}
    with RunWriter(runs / config.id) as writer:
        writer.start({**document, "groups": GROUPS})
        for line in lines:
            writer.append({"tokens": line["step"] * config.batch, **line})
        if outcome is not None:
            writer.finish(outcome, **fields)
    return runs / config.id
