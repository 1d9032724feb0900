"""One run in a tracker: TensorBoard, W&B or trackio. What a tracker has is asked of the tracker itself. No torch.

A tracker is a copy of the run record (``follow`` keeps it up to date), with the record's own keys; its axis is steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from disco.errors import UserError
from disco.runs.schema import Metric, Outcome

PROJECT = "disco"
"""Where runs go in W&B and trackio if nothing else is said."""

Line = Mapping[str, float]


@dataclass(frozen=True)
class Head:
    """What a tracker is told of a run."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The run's name everywhere."""
        return self.folder.name

    @property
    def group(self) -> str:
        """The name of the folder of runs."""
        return self.folder.parent.name


class Tracker(Protocol):
    """One run in a tracker; ``where`` is what the user put behind its name. Methods raise whatever the tool raises."""

    last: int
    """The last step that the tracker has; -1 if none."""

    def __init__(self, run: Head, where: str) -> None: ...

    def log(self, lines: Sequence[Line]) -> None:
        """Adds lines of the record, all of them behind ``last``, so that they stay whatever is killed next."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the run, or leaves it as it is if it has no summary."""


class TensorBoard:
    """Event files in ``where``/<run>, or tensorboard/<run> beside the runs: one event per line, of 32-bit scalars."""

    def __init__(self, run: Head, where: str) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        self.run = run
        self.folder = (Path(where) if where else run.folder.parent / "tensorboard") / run.id
        files = sorted(self.folder.glob("events.out.tfevents.*"))
        events = (event for file in files for event in LegacyEventFileLoader(str(file)).Load())
        self.last = max((event.step for event in events if event.summary.value), default=-1)
        self._writer: Any = None

    def log(self, lines: Sequence[Line]) -> None:
        """Adds events, and flushes them."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self.folder))
        for line in lines:
            values = [Summary.Value(tag=key, simple_value=value) for key, value in _values(line).items()]
            if self.last < 0:
                values.append(_text("config", f"```\n{json.dumps(self.run.config, indent=1)}\n```"))
            step = int(line[Metric.STEP])
            self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
            self.last = step
        self._writer.flush()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


def _text(tag: str, text: str) -> Any:
    """A value for TensorBoard's page of texts."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


class Wandb:
    """A run of the project ``where`` (else WANDB_PROJECT, else "disco"), with the run's id and the folder as its group.

    Account, host and mode are W&B's own settings, such as WANDB_API_KEY and WANDB_MODE=offline. Its files go beside the
    runs, or to WANDB_DIR. What was sent before is read from these files, and asked of the server if there is one.
    """

    def __init__(self, run: Head, where: str) -> None:
        self.run = run
        self.project = where or os.environ.get("WANDB_PROJECT") or PROJECT
        self.folder = Path(os.environ.get("WANDB_DIR") or run.folder.parent)
        files = self.folder.glob(f"wandb/*run-*/run-{run.id}.wandb")
        self.last = max((step for file in files for step in _steps(file)), default=-1)
        self._wandb: Any = None

    def log(self, lines: Sequence[Line]) -> None:
        """Hands lines to W&B's own process, which survives this one."""
        import wandb

        if self._wandb is None:
            quiet = wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
            )
            self._wandb = wandb.init(
                project=self.project, id=self.run.id, name=self.run.id, group=self.run.group, dir=str(self.folder),
                config=dict(self.run.config), resume="allow", reinit="create_new", settings=quiet,
            )  # fmt: skip
        for line in lines:
            self.last = int(line[Metric.STEP])
            if self.last >= self._wandb.step:  # the next one that the server expects
                self._wandb.log(_values(line), step=self.last, commit=True)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the run; only one that finished counts as a success."""
        if self._wandb is None:
            return
        outcome = (summary or {}).get("outcome")
        if summary is not None:
            self._wandb.summary.update({"outcome": outcome, "reason": summary.get("reason", "")})
        self._wandb.finish(exit_code=0 if outcome == Outcome.FINISHED else 1)


def _steps(file: Path) -> list[int]:
    """Steps in a file of W&B, complete or cut, by its own reader (``wandb leet inspect``).

    Raises:
        UserError: it cannot be read.
    """
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    done = subprocess.run([*command, str(file), str(file.parents[1])], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason"])[0]
        raise UserError(f"cannot read {file} ({why}); it takes wandb 0.31 or newer")
    records = map(json.loads, done.stdout.splitlines())
    return [int(record["history"]["step"]["num"]) for record in records if record["type"] == "history"]


class Trackio:
    """A run of the local project ``where`` (else "disco"), in trackio's database (TRACKIO_DIR).

    trackio's own ``init`` has one run at a time; its storage takes any, a line at once or not at all.
    """

    def __init__(self, run: Head, where: str) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self.run, self.project, self._storage = run, where or PROJECT, SQLiteStorage
        last = SQLiteStorage.get_max_step_for_run(self.project, run.id)
        self.last = -1 if last is None else int(last)

    def log(self, lines: Sequence[Line]) -> None:
        """Adds rows, in one transaction."""
        steps = [int(line[Metric.STEP]) for line in lines]
        group = {"_Group": self.run.group, "_Created": datetime.now(UTC).isoformat()}
        self._storage.bulk_log(
            self.project,
            self.run.id,
            [_values(line) for line in lines],
            steps=steps,
            config={**self.run.config, **group} if self.last < 0 else None,
            log_ids=[f"{self.run.id}:{step}" for step in steps],
        )
        self.last = steps[-1]

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Nothing is open."""


def _values(line: Line) -> dict[str, float]:
    """All but the step, which is the axis."""
    return {key: value for key, value in line.items() if key != Metric.STEP}


TRACKERS: Mapping[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
"""By the name of the package that each needs."""


def chosen(track: str) -> dict[str, str]:
    """Tracker -> where, from ``tensorboard,wandb:my-project``.

    Raises:
        UserError: no such tracker.
    """
    found = {}
    for part in filter(None, map(str.strip, track.split(","))):
        name, _, where = part.partition(":")
        if name not in TRACKERS:
            raise UserError(f"trackers are {', '.join(TRACKERS)}, or NAME:PROJECT (tensorboard:FOLDER), got {part!r}")
        found[name] = where
    if not found:
        raise UserError(f"no tracker is named; there are {', '.join(TRACKERS)}")
    return found
