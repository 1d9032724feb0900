"""What trackers hold of a run, and its record, as (step, values) in order."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np

from disco.runs.schema import METRICS

Points = list[tuple[int, dict[str, float]]]


def record(folder: Path) -> Points:
    """What metrics.jsonl holds."""
    lines = map(json.loads, (folder / METRICS).read_bytes().splitlines())
    return [(int(each.pop("step")), each) for each in lines]


def to_float32(points: Points) -> Points:
    """As TensorBoard keeps them."""
    return [(step, {key: float(np.float32(value)) for key, value in values.items()}) for step, values in points]


def in_tensorboard(folder: Path) -> Points:
    """By its own EventAccumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.parent / "tensorboard" / folder.name), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for key in events.Tags()["scalars"]:
        for point in events.Scalars(key):
            assert key not in found.setdefault(point.step, {}), "a point twice"
            found[point.step][key] = point.value
    return sorted(found.items())


def in_wandb(folder: Path) -> Points:
    """By the reader that comes with W&B, over all its files of the run."""
    found: Points = []
    for file in sorted(folder.parent.glob(f"wandb/offline-run-*/run-{folder.name}.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for item in map(json.loads, printed.splitlines()):
            if item["type"] == "history":
                values = {k: v for k, v in item["history"]["item"].items() if not k.startswith("_")}
                assert item["history"]["item"]["_step"] == item["history"]["step"]["num"]
                found.append((item["history"]["step"]["num"], values))
    return sorted(found, key=lambda point: point[0])


def in_trackio(folder: Path, project: str = "disco") -> Points:
    """From its database, which is in the folder "trackio" beside that of the runs."""
    database = folder.parents[1] / "trackio" / f"{project}.db"
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics where run_name = ? order by step", [folder.name])
        return [(step, json.loads(metrics)) for step, metrics in rows]
