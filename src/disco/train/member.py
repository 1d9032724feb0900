"""One run of a cohort: its record, its checkpoints, and what it remembers while it trains."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from disco.train.team import Team

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
    notes: list[str] = field(default_factory=list)
    """What the summary should tell besides: checkpoints that were damaged."""


class Member:
    """A run that trains alone or with others. A context manager: within it, the run's folder is locked.

    Of a team, all processes have it and remember the same; the leader alone has the record.

    Attributes:
        outcome: how the run has ended, if it needs no training.
        checkpoints: their folder.
    """

    def __init__(self, config: TrainConfig, runs: Path, team: Team) -> None:
        self.config = config
        self.outcome: Outcome | None = None
        self.state = State()
        self.writer = RunWriter(runs / config.id)
        self._runs, self._team = runs, team
        self.checkpoints = self.writer.folder / CHECKPOINTS
        self._kept = {tokens // config.batch for tokens in config.keep}
        self._threshold = config.divergence * math.log(config.data.vocab)
        self._starts: dict[int, tuple[Path | None, dict[str, Any], int]] = {}
        """Step -> checkpoint, None for initial weights; its state; and the length of the record that belongs to it."""
        self._notes: list[str] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        outcome = self._team.first(self._enter)
        self.outcome = Outcome(outcome) if outcome else None
        return self

    def _enter(self) -> str | None:
        folder = self.writer.folder
        self._open.enter_context(locked(folder / LOCK, wait=ORPHAN_SECONDS))
        self._open.enter_context(self.writer)
        checkpoint.clean(folder)
        return outcome_so_far(folder, self.config.horizon)

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def prepare(self) -> set[int]:
        """Writes the configuration; returns the steps that the run can start from.

        These are the last two checkpoints, or where there are fewer the beginning: of the training, or where a decay
        branch leaves its parent.

        A damaged checkpoint is passed over, and said, if there is another.

        Raises:
            UserError: no checkpoint but damaged ones, or a folder that cannot be written.
        """
        return set(self._team.first(self._prepare))

    def _prepare(self) -> list[int]:
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
        self.checkpoints.mkdir(exist_ok=True)
        damage: dict[Path, checkpoint.DamagedError] = {}
        for name in (checkpoint.PREVIOUS, checkpoint.LATEST):
            self._offer(self.checkpoints / name, damage)
        for path in checkpoint.sharded(self.checkpoints):
            if self._offer(path, damage):
                break
        if damage and not self._starts:
            raise next(iter(damage.values()))
        for path, error in damage.items():
            aside = checkpoint.set_aside(path)
            self._notes.append(f"{str(error).partition(';')[0]}, now {aside.name}: went on from the one before")
            warnings.warn(self._notes[-1], stacklevel=2)
        if not self._starts or (len(self._starts) == 1 and not goes_on):
            parent, state = self._parent_checkpoint()
            self._starts.setdefault(int(state.get("step", 0)), (parent, state, 0))
        return list(self._starts)

    def _offer(self, path: Path, damage: dict[Path, checkpoint.DamagedError]) -> bool:
        """Takes a checkpoint among those to start from, if it is there and whole."""
        try:
            header = checkpoint.read_header(path)
        except checkpoint.DamagedError as error:
            damage[path] = error
            return False
        if header is not None:
            self._starts[header["state"]["step"]] = path, header["state"], header["offset"]
        return header is not None

    def start(self, step: int) -> Path | None:
        """Cuts the record back to one of the steps that ``prepare`` returned; returns its checkpoint, if it has one."""
        path, state, notes = self._team.first(lambda: self._start(step))
        self.state = State(**state)
        self.state.notes += notes
        return Path(path) if path else None

    def _start(self, step: int) -> tuple[str | None, dict[str, Any], list[str]]:
        path, state, offset = self._starts[step]
        self._starts = {}
        self.writer.resume(offset)
        return str(path) if path else None, state, self._notes

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
        if not self._team.leads:
            return
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
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.state.step * self.config.batch

    @property
    def keeps(self) -> bool:
        """Whether the checkpoint of this step is to be kept for good."""
        return self.state.step in self._kept

    def header(self) -> dict[str, Any]:
        """What belongs into a checkpoint besides weights and optimizer state."""
        return {"schema": SCHEMA_VERSION, "offset": self.writer.offset, "state": asdict(self.state)}

    def finish(self, outcome: Outcome, reason: str = "", passes: float = 0.0) -> None:
        """Writes the summary: the run has ended. ``passes`` over the training text are told where text was repeated."""
        if not self._team.leads:
            return
        wall = round(self.state.wall, 3)
        if reason:
            reason = f"{reason} at step {self.state.step}"
        told: dict[str, Any] = {"passes": round(passes, 3)} if passes > 1 else {}
        if self.state.notes:
            told["notes"] = self.state.notes
        self.writer.finish(
            outcome, reason, step=self.state.step, tokens=self.tokens, parent=self.config.parent, wall=wall, **told
        )

    def _parent_checkpoint(self) -> tuple[Path | None, dict[str, Any]]:
        """Where a decay branch starts; nothing if it was not kept: the run then trains the constant part itself."""
        config = self.config
        if config.parent is not None:
            folder, start = self._runs / config.parent / CHECKPOINTS, config.branch_tokens // config.batch
            kept = checkpoint.path_at(folder, config.branch_tokens)
            sharded = [kept.with_suffix(checkpoint.SHARDED), checkpoint.path_of_latest(folder, config.branch_tokens)]
            for path in (kept, folder / checkpoint.LATEST, *sharded):
                header = checkpoint.read_header(path)
                if header is not None and header["state"]["step"] == start:
                    return path, header["state"]
        return None, {}
