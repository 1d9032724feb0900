"""The training loop, top to bottom: build, resume, step, evaluate, checkpoint, finish.

A run is a pure function of its configuration: killed anywhere and started again, it continues from its last checkpoint
and leaves the record that an undisturbed run leaves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disco._version import __version__
from disco.groups import init_, param_groups
from disco.probe import Probe
from disco.runs.horizons import WINDOW
from disco.runs.lock import LOCK, locked
from disco.runs.reader import outcome_so_far
from disco.runs.schema import CHECKPOINTS, DATA, SCHEMA_VERSION, Metric, Outcome, lr_key
from disco.runs.writer import RunWriter
from disco.scion import Scion
from disco.train import checkpoint
from disco.train.config import OptimizerConfig, TrainConfig, to_dict
from disco.train.data import TokenStream, check, prepare
from disco.train.model import Llama
from disco.train.schedule import evaluation_points, learning_rate_factor

Progress = Callable[[int, int], None]

ORPHAN_SECONDS = 10.0
"""How long to wait for the lock of a run that the worker of a killed sweep still holds while it exits."""

DIVERGED_STEPS = 20
"""Steps in a row above the divergence threshold that end a run."""

VALID_CHUNK = 8192
"""Held-out tokens per forward pass."""


def train(config: TrainConfig, runs: Path, progress: Progress | None = None) -> Outcome:
    """Trains one run, or continues it, or returns at once if its record says that it is done.

    Args:
        config: the run; its data are prepared if they are not yet.
        runs: folder of run records; the run's own is ``runs / config.id``.
        progress: called with (step, tokens) after every step; what it raises ends the training, resumably.

    Returns:
        ``finished``, or ``diverged`` when the training loss exploded, or it or a held-out loss was not finite.

    Raises:
        UserError: bad data, a corpus too short for the horizon, an unwritable folder, a damaged checkpoint, or another
            process that trains the same run.
    """
    config = replace(config, data=prepare(config.data, runs / DATA))
    stream = TokenStream(config.data, runs / DATA, context=config.model.context, seed=config.seed)
    check(config, stream)
    folder = runs / config.id
    with locked(folder / LOCK, wait=ORPHAN_SECONDS), RunWriter(folder) as writer:
        for unfinished in folder.rglob(".*.tmp"):  # of a process that was killed while it saved
            unfinished.unlink(missing_ok=True)
        done = outcome_so_far(folder, config.horizon)
        if done:
            return done
        run = _Run(config, stream, writer, runs)
        run.begin()
        return run.go(progress)


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> Scion:
    """The optimizer of a run: scion (every group its LMO), adam or adamw, or muon (hidden LMO, the rest AdamW)."""
    everywhere: dict[str, dict[str, Any]] = {"*": {"rule": "adamw"}}
    overrides = {"scion": {}, "adam": everywhere, "adamw": everywhere, "muon": everywhere}[config.name]
    groups = param_groups(model, lr=config.lr, ratios=config.ratios, overrides=overrides)
    if config.name == "muon":
        for group in groups:
            if group["group"] == "hidden":
                group |= {"rule": "lmo", "scale": "max_spectral"}
    return Scion(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        orthogonalize=config.orthogonalize,
        betas=config.betas,
        eps=config.eps,
    )


@dataclass
class _State:
    """What changes while a run trains, besides model and optimizer."""

    step: int = 0
    path: float = 0.0
    """Sum of the base learning rates so far."""
    losses: list[float] = field(default_factory=list)
    """Training losses of the last 1/64 of the steps so far, and of at least one."""
    alarm: int = 0
    """Steps in a row whose loss was above the divergence threshold."""
    wall: float = 0.0


class _Run:
    def __init__(self, config: TrainConfig, stream: TokenStream, writer: RunWriter, runs: Path) -> None:
        self.config = config
        self.stream = stream
        self.writer = writer
        self.runs = runs
        self.checkpoints = writer.folder / CHECKPOINTS
        self.model = Llama(config.model, config.data.vocab)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.probe = Probe(self.optimizer)
        self.loss_fn: Any = torch.compile(self.model.loss) if config.compile else self.model.loss
        self.valid = [torch.from_numpy(part) for part in stream.valid_blocks()]
        self.state = _State()

    def begin(self) -> None:
        """Writes the configuration and restores the last checkpoint, or initialises the weights."""
        groups = param_groups(self.model)
        self.writer.start(
            {
                "schema": SCHEMA_VERSION,
                "id": self.config.id,
                "disco": __version__,
                "torch": torch.__version__,
                "config": to_dict(self.config),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "groups": {group: layers for group, layers in groups.layers().items() if layers},
            }
        )
        self.checkpoints.mkdir(exist_ok=True)
        saved = checkpoint.load(self.checkpoints / checkpoint.LATEST)
        if saved is not None:
            self.writer.resume(saved["offset"])
            self._restore(saved)
            return
        self.writer.resume(0)
        parent = self._parent_checkpoint()
        if parent is not None:
            self._restore(parent)
            return
        generator = torch.Generator().manual_seed(self.config.seed)
        init_(self.model, self.model.init_scales(), groups=groups, generator=generator)

    def go(self, progress: Progress | None) -> Outcome:
        """Trains to the horizon."""
        config, state = self.config, self.state
        started, saved_at = time.monotonic() - state.wall, time.monotonic()
        points = {point.step: point for point in evaluation_points(config)}
        first = config.branch_tokens // config.batch if config.parent else 0  # a branch records its own part only
        kept = {tokens // config.batch for tokens in config.keep}
        last = config.horizon // config.batch
        if state.step == 0 and first == 0:
            self._record(with_valid=True)
        while state.step < last:
            loss = self._step()
            state.wall = time.monotonic() - started
            if self._exploded(loss):
                return self._diverged(f"training loss {loss:.4g}")
            if state.step in points and state.step > first:
                valid = self._record(with_valid=points[state.step].horizon)
                if valid is not None and not math.isfinite(valid):
                    return self._diverged(f"held-out loss {valid:.4g}")
            if state.step in kept:
                self._save(checkpoint.path_at(self.checkpoints, state.step * config.batch))
            if state.step == last or time.monotonic() - saved_at >= config.checkpoint_seconds:
                self._save(self.checkpoints / checkpoint.LATEST)
                saved_at = time.monotonic()
            if progress is not None:
                self._report(progress)
        self._finish(Outcome.FINISHED)
        return Outcome.FINISHED

    def _report(self, progress: Progress) -> None:
        try:
            progress(self.state.step, self.state.step * self.config.batch)
        except BaseException:  # told to stop: keep what was trained
            self._save(self.checkpoints / checkpoint.LATEST)
            raise

    def _step(self) -> float:
        """One update; returns the loss before it. Where that is not finite, nothing changes."""
        config, state = self.config, self.state
        factor = learning_rate_factor(config, state.step)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        tokens, targets = self._tensors(*self.stream.batch(state.step, config.batch))
        self.optimizer.zero_grad()
        loss = self.loss_fn(tokens, targets)
        value = float(loss.item())
        if not math.isfinite(value):
            return value
        loss.backward()
        self.optimizer.step()
        state.step += 1
        state.path += config.optimizer.lr * factor
        state.losses.append(value)
        del state.losses[: -max(1, state.step // WINDOW)]
        return value

    def _exploded(self, loss: float) -> bool:
        threshold = self.config.divergence * math.log(self.config.data.vocab)
        self.state.alarm = self.state.alarm + 1 if loss > threshold else 0
        return not math.isfinite(loss) or self.state.alarm >= DIVERGED_STEPS

    def _record(self, with_valid: bool) -> float | None:
        """Appends the metrics of this step; returns the held-out loss, if it was asked for."""
        state, config = self.state, self.config
        line: dict[str, float] = {
            Metric.STEP: state.step,
            Metric.TOKENS: state.step * config.batch,
            Metric.PATH: state.path,
            Metric.TIME_WALL: round(state.wall, 3),
        }
        window = torch.tensor(state.losses, dtype=torch.float64)
        if len(window):
            line[Metric.LOSS_TRAIN] = float(window.mean())
            line[Metric.LOSS_TRAIN_COUNT] = len(window)
        if len(window) > 1:
            line[Metric.LOSS_TRAIN_STD] = float(window.std())
        valid = self._valid_loss() if with_valid else None
        if valid is not None:
            line[Metric.LOSS_VALID] = valid
        line |= {lr_key(group["group"]): group["lr"] for group in self.optimizer.param_groups}
        self.writer.append(line | self.probe.measure())
        return valid

    @torch.no_grad()
    def _valid_loss(self) -> float:
        tokens, targets = self.valid
        rows = max(1, VALID_CHUNK // self.config.model.context)
        total = 0.0
        for chunk, target in zip(tokens.split(rows), targets.split(rows), strict=True):
            total += float(self.model.loss(chunk, target)) * len(chunk)
        return total / len(tokens)

    def _tensors(self, *arrays: Any) -> list[Tensor]:
        return [torch.from_numpy(array) for array in arrays]

    # Checkpoints

    def _save(self, path: Path) -> None:
        state = self.state
        checkpoint.save(
            path,
            {
                "schema": SCHEMA_VERSION,
                "offset": self.writer.offset,
                "state": {**vars(state), "losses": torch.tensor(state.losses, dtype=torch.float64)},
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = _State(**{**saved["state"], "losses": saved["state"]["losses"].tolist()})

    def _parent_checkpoint(self) -> dict[str, Any] | None:
        """Where a decay branch starts; None if it was not kept: the run then trains the constant part itself."""
        config = self.config
        if config.parent is None:
            return None
        folder = self.runs / config.parent / CHECKPOINTS
        kept = checkpoint.load(checkpoint.path_at(folder, config.branch_tokens))
        if kept is not None:
            return kept
        latest = checkpoint.load(folder / checkpoint.LATEST)
        at_start = latest is not None and latest["state"]["step"] * config.batch == config.branch_tokens
        return latest if at_start else None

    def _diverged(self, what: str) -> Outcome:
        self._finish(Outcome.DIVERGED, f"{what} at step {self.state.step}")
        return Outcome.DIVERGED

    def _finish(self, outcome: Outcome, reason: str = "") -> None:
        state = self.state
        self.writer.finish(
            outcome,
            reason,
            step=state.step,
            tokens=state.step * self.config.batch,
            parent=self.config.parent,
            wall=round(state.wall, 3),
        )
