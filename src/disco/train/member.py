"""One run of a cohort: its record, its checkpoints, and what it remembers while it trains."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from disco._version import __version__
from disco.groups import param_groups
from disco.runs.horizons import WINDOW
from disco.runs.lock import LOCK, locked
from disco.runs.reader import outcome_so_far, read_summary
from disco.runs.schema import CHECKPOINTS, SCHEMA_VERSION, Metric, Outcome, lr_key
from disco.runs.writer import RunWriter
from disco.train import checkpoint
from disco.train.config import TrainConfig, to_dict
from disco.train.model import Llama

ORPHAN_SECONDS = 10.0
"""How long to wait for the lock of a run that the worker of a killed sweep still holds while it exits."""

DIVERGED_STEPS = 20
"""Steps in a row above the divergence threshold that end a run."""


@dataclass
class State:
    """What changes while a run trains, besides model and optimizer."""

    step: int = 0
    path: float = 0.0
    """Sum of the base learning rates so far."""
    losses: list[float] = field(default_factory=list)
    """Training losses of the last 1/64 of the steps so far, and of at least one."""
    alarm: int = 0
    """Steps in a row whose loss was above the divergence threshold."""
    wall: float = 0.0
    """Seconds of training so far: of a cohort, the run's share."""


class Member:
    """A run that trains alone or with others. A context manager: within it, the run's folder is locked.

    Attributes:
        outcome: how the run has ended, if it needs no training.
    """

    def __init__(self, config: TrainConfig, runs: Path) -> None:
        self.config = config
        self.outcome: Outcome | None = None
        self.state = State()
        self.writer = RunWriter(runs / config.id)
        self._runs = runs
        self._checkpoints = self.writer.folder / CHECKPOINTS
        self._kept = {tokens // config.batch for tokens in config.keep}
        self._threshold = config.divergence * math.log(config.data.vocab)
        self._starts: dict[int, tuple[dict[str, Any] | None, int]] = {}
        """Step -> checkpoint, None for initial weights, and the length of the record that belongs to it."""
        self._open = ExitStack()

    def __enter__(self) -> Self:
        folder = self.writer.folder
        self._open.enter_context(locked(folder / LOCK, wait=ORPHAN_SECONDS))
        self._open.enter_context(self.writer)
        for unfinished in folder.rglob(".*.tmp"):  # of a process that was killed while it saved
            unfinished.unlink(missing_ok=True)
        self.outcome = outcome_so_far(folder, self.config.horizon)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def prepare(self) -> set[int]:
        """Writes the configuration; returns the steps that the run can start from.

        These are the last two checkpoints, or where there are fewer the beginning: of the training, or where a decay
        branch leaves its parent.

        Raises:
            UserError: a damaged checkpoint, or a folder that cannot be written.
        """
        goes_on = read_summary(self.writer.folder) is not None
        groups = param_groups(Llama(self.config.model, self.config.data.vocab)).layers()
        self.writer.start(
            {
                "schema": SCHEMA_VERSION,
                "id": self.config.id,
                "disco": __version__,
                "torch": torch.__version__,
                "config": to_dict(self.config),
                "parameters": self.config.model.parameters(self.config.data.vocab),
                "groups": {group: layers for group, layers in groups.items() if layers},
            }
        )
        self._checkpoints.mkdir(exist_ok=True)
        for name in (checkpoint.PREVIOUS, checkpoint.LATEST):
            saved = checkpoint.load(self._checkpoints / name)
            if saved is not None:
                self._starts[_step(saved)] = saved, saved["offset"]
        if not self._starts or (len(self._starts) == 1 and not goes_on):
            parent = self._parent_checkpoint()
            self._starts.setdefault(_step(parent), (parent, 0))
        return set(self._starts)

    def start(self, step: int) -> dict[str, Any] | None:
        """Cuts the record back to one of the steps that ``prepare`` returned; returns its checkpoint, if it has one."""
        saved, offset = self._starts[step]
        self._starts = {}
        self.writer.resume(offset)
        if saved is not None:
            self.state = State(**{**saved["state"], "losses": saved["state"]["losses"].tolist()})
        return saved

    def count(self, loss: float, factor: float, seconds: float) -> None:
        """Counts a step: the loss before it, the learning rate over the configured one, and the time it took."""
        state = self.state
        state.step += 1
        state.path += self.config.optimizer.lr * factor
        state.wall += seconds
        state.losses.append(loss)
        del state.losses[: -max(1, state.step // WINDOW)]
        state.alarm = state.alarm + 1 if loss > self._threshold else 0

    @property
    def exploded(self) -> bool:
        """Whether the training loss has stayed above the threshold."""
        return self.state.alarm >= DIVERGED_STEPS

    def record(self, valid: float | None, rates: dict[str, float], norms: dict[str, float]) -> None:
        """Appends the metrics of this step."""
        state = self.state
        line: dict[str, float] = {
            Metric.STEP: state.step,
            Metric.TOKENS: state.step * self.config.batch,
            Metric.PATH: state.path,
            Metric.TIME_WALL: round(state.wall, 3),
        }
        window = torch.tensor(state.losses, dtype=torch.float64)
        if len(window):
            line[Metric.LOSS_TRAIN] = float(window.mean())
            line[Metric.LOSS_TRAIN_COUNT] = len(window)
        if len(window) > 1:
            line[Metric.LOSS_TRAIN_STD] = float(window.std())
        if valid is not None:
            line[Metric.LOSS_VALID] = valid
        self.writer.append(line | {lr_key(group): rate for group, rate in rates.items()} | norms)

    @property
    def keeps(self) -> bool:
        """Whether the checkpoint of this step is to be kept for good."""
        return self.state.step in self._kept

    def save(self, program: dict[str, Any], keep: bool = False) -> None:
        """Writes a checkpoint with the run's weights and optimizer state; the one before it stays."""
        content = {
            "schema": SCHEMA_VERSION,
            "offset": self.writer.offset,
            "state": {**vars(self.state), "losses": torch.tensor(self.state.losses, dtype=torch.float64)},
            **program,
        }
        if keep:
            checkpoint.save(checkpoint.path_at(self._checkpoints, self.state.step * self.config.batch), content)
        else:
            checkpoint.rotate(self._checkpoints, content)

    def finish(self, outcome: Outcome, reason: str = "") -> None:
        """Writes the summary: the run has ended."""
        step = self.state.step
        tokens, wall = step * self.config.batch, round(self.state.wall, 3)
        if reason:
            reason = f"{reason} at step {step}"
        self.writer.finish(outcome, reason, step=step, tokens=tokens, parent=self.config.parent, wall=wall)

    def _parent_checkpoint(self) -> dict[str, Any] | None:
        """Where a decay branch starts; None if it was not kept: the run then trains the constant part itself."""
        config = self.config
        if config.parent is not None:
            folder, start = self._runs / config.parent / CHECKPOINTS, config.branch_tokens // config.batch
            for path in (checkpoint.path_at(folder, config.branch_tokens), folder / checkpoint.LATEST):
                saved = checkpoint.load(path)
                if saved is not None and _step(saved) == start:
                    return saved
        return None


def _step(saved: dict[str, Any] | None) -> int:
    return int(saved["state"]["step"]) if saved is not None else 0
