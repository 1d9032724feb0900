"""The record of a run that any loop trains: settings, losses, norms, and how it goes on after an interruption.

The record has the form of an imported series (``runs.imported``): whatever steps the loop measures at, ``disco fit``
and ``disco report`` read it. Settings that are not told are not there.
"""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from disco._version import __version__
from disco.base import NormOptimizer
from disco.errors import UserError
from disco.probe import Probe, largest, layers
from disco.runs.horizons import powers_of_two, window
from disco.runs.imported import IMPORTED
from disco.runs.lock import LOCK, locked
from disco.runs.reader import read_run
from disco.runs.schema import CONFIG, SCHEMA_VERSION, Metric, Outcome, lr_key
from disco.runs.writer import RunWriter

State = dict[str, Any]

_OPEN: weakref.WeakValueDictionary[Path, Recorder] = weakref.WeakValueDictionary()
"""Recorders of this process by folder: a new one for the same folder takes the place of the old one."""


ORPHAN_SECONDS = 10.0
"""How long to wait for a process that was killed and still holds the folder while it exits."""


class Recorder:
    """Writes the record of one run. Call it on every rank: all take part in measuring norms, rank 0 writes.

    A line is written when the next step is recorded, so that what is known of a step may come in several calls.

    Args:
        folder: the run's own folder, such as ``runs/llama-0.03-1``; its name is the run's id.
        optimizer: ``disco.Disco`` or ``disco.Scion``, bare or wrapped (``.optimizer``).
        batch: tokens of one optimizer step, of all ranks and micro-batches together.
        horizon: tokens of the whole run.
        lr: base learning rate; None: the peak rate of the output layer, if it has one, or of the first group.
        seed: of the run.
        model: what is known of the model: ``name`` (one for each size), ``width``, ``depth``, ``context`` (tokens).
        schedule: what is known of the learning rate: ``warmup`` (tokens), ``decay`` (last fraction of the run over
            which it falls), ``shape``. A run that decays is a result at its end only.
        data: what is known of the data: ``tokenizer``, ``vocab``, ``valid_tokens``, ``digest``.
        parameters: of the model; None: those of the optimizer.
        trainer: what trains, for the record.
        of: what norms are taken of: "weights", "updates", "momentum".

    Raises:
        UserError: another optimizer, numbers that are not positive, a folder with a run of other settings, or one that
            cannot be written or that another process writes.
    """

    def __init__(
        self,
        folder: Path | str,
        optimizer: Any,
        *,
        batch: int,
        horizon: int,
        lr: float | None = None,
        seed: int = 0,
        model: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        parameters: int | None = None,
        trainer: str = "a loop of one's own",
        of: Sequence[str] = ("weights",),
    ) -> None:
        self.folder = Path(folder).resolve()
        self._optimizer = norm_optimizer(optimizer)
        self._probe = Probe(self._optimizer, of=of)
        groups = self._optimizer.param_groups
        peaks = [_peak(group) for group in groups]
        self._base = max(range(len(groups)), key=lambda i: (peaks[i] > 0, groups[i]["group"] == "output"))
        """Index of the group whose learning rate tells the base rate."""
        lr = lr or peaks[self._base]
        for name, number in {"batch": batch, "horizon": horizon, "base learning rate": lr}.items():
            if not number > 0:
                raise UserError(f"a run record needs a {name} above 0, got {number}")
        self._ratio = peaks[self._base] / lr
        self.batch, self.steps = int(batch), int(horizon) // int(batch)
        self._layers = layers(self._optimizer)
        self._due = _points(self.steps, self.batch)
        self._line: dict[str, float] = {}
        """What is known of the last step that was recorded; not written yet."""
        self._path, self._wall, self._since = 0.0, 0.0, time.monotonic()
        self._exploded = ""
        self._rates = _rates(groups)
        config = {
            "batch": self.batch,
            "horizon": int(horizon),
            "seed": seed,
            "model": {"name": "model", **(model or {})},
            "optimizer": _settings(self._optimizer, lr),
            "schedule": dict(schedule or {}),
            "data": dict(data or {}),
            IMPORTED: {"form": "series", "trainer": trainer},
        }
        params = [param for group in groups for param in group["params"]]
        self._open = ExitStack()
        self._writer: RunWriter | None = None
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            self._start(
                {
                    "schema": SCHEMA_VERSION,
                    "id": self.folder.name,
                    "disco": __version__,
                    "torch": torch.__version__,
                    "config": config,
                    "parameters": parameters or sum(param.numel() for param in params),
                    "groups": self._layers,
                }
            )
        self._hook = self._optimizer.register_step_post_hook(self._stepped)

    def _start(self, document: Mapping[str, Any]) -> None:
        if self.folder in _OPEN:
            _OPEN[self.folder].close()
        self._open.enter_context(locked(self.folder / LOCK, wait=ORPHAN_SECONDS))
        try:
            if (self.folder / CONFIG).is_file():
                _refuse_another(self.folder, document["config"])
            self._writer = self._open.enter_context(RunWriter(self.folder))
            self._writer.start(document)
        except BaseException:
            self._open.close()
            raise
        _OPEN[self.folder] = self

    def _stepped(self, *_: Any) -> None:
        """After every step of the optimizer: the path grows by the base learning rate."""
        self._rates = _rates(self._optimizer.param_groups)
        self._path += float(self._optimizer.param_groups[self._base]["lr"]) / self._ratio

    def due(self, step: int) -> bool:
        """Whether ``disco fit`` looks at this step: the start, the window of the run's end and, for runs at a constant
        rate, those of the powers of two in tokens before it, from eight steps on."""
        return step in self._due

    def record(
        self,
        step: int,
        *,
        tokens: int | None = None,
        loss: float | None = None,
        valid: float | None = None,
        **more: float,
    ) -> None:
        """Records what is known after ``step`` steps, and the norms at it.

        Args:
            step: optimizer steps made; 0 is the initial weights.
            tokens: seen so far; None: step times batch.
            loss: training loss in nats, as a mean over whatever the loop averages.
            valid: held-out loss in nats, which ``disco fit`` uses.
            more: other numbers, by key.

        Raises:
            ValueError: a step before the last one.
        """
        if step < self.step:
            raise ValueError(f"step {step} is recorded after step {self.step}")
        if not self._line or step > self.step:
            self._write()
            self._line = {Metric.STEP: step, Metric.TOKENS: step * self.batch, Metric.PATH: self._path}
            self._line |= {lr_key(label): rate for label, rate in self._rates.items()} | self._probe.measure()
        known: dict[str, float | None] = {Metric.LOSS_TRAIN: loss, Metric.LOSS_VALID: valid, Metric.TOKENS: tokens}
        for key, value in (known | more).items():
            if value is None:
                continue
            if not math.isfinite(value) and key.startswith("loss/"):
                self._exploded = f"{key} {value:.4g} at step {step}"
            self._line[str(key)] = value
        self._line[Metric.TIME_WALL] = round(self._elapsed(), 3)

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return int(self._line.get(Metric.STEP, 0))

    @property
    def norms(self) -> dict[str, float]:
        """``norm/<group>/<norm>`` -> that of the group's largest layer, when last recorded."""
        return largest(self._line, self._layers)

    def state_dict(self) -> State:
        """What a checkpoint of this step keeps, in plain numbers and text."""
        offset = self._writer.offset if self._writer is not None else 0
        line = {str(key): value for key, value in self._line.items() if math.isfinite(value)}
        exploded = self._exploded
        return {"offset": offset, "path": self._path, "wall": self._elapsed(), "line": line, "exploded": exploded}

    def load_state_dict(self, state: State | None) -> None:
        """Goes on from a checkpoint: what was recorded after it is cut off.

        Raises:
            UserError: the checkpoint has no state of the record, or the record has lost lines that it relies on.
        """
        if not state:
            raise UserError(
                f"the checkpoint knows nothing of the record in {self.folder}: it was saved without one; "
                "go on without a record, or train from the beginning"
            )
        if self._writer is not None:
            self._writer.resume(state["offset"])
        self._path, self._wall, self._since = state["path"], state["wall"], time.monotonic()
        self._line, self._exploded = dict(state["line"]), state["exploded"]

    def finish(self, outcome: Outcome | None = None, reason: str = "") -> None:
        """Writes the summary and closes: the run has ended.

        Args:
            outcome: None: diverged if a loss was not finite, else finished.
            reason: of an outcome other than finished.
        """
        outcome = outcome or (Outcome.DIVERGED if self._exploded else Outcome.FINISHED)
        step, tokens = self.step, int(self._line.get(Metric.TOKENS, 0))
        self._write()
        if self._writer is not None:
            wall = round(self._elapsed(), 3)
            self._writer.finish(outcome, reason or self._exploded, step=step, tokens=tokens, parent=None, wall=wall)
        self.close()

    def close(self) -> None:
        """Writes what is known and lets go of the folder; the run can be resumed from a checkpoint."""
        self._write()
        self._hook.remove()
        self._open.close()
        self._writer = None

    def _write(self) -> None:
        if self._writer is not None and self._line:
            self._writer.append(self._line)
        self._line = {}

    def _elapsed(self) -> float:
        return self._wall + time.monotonic() - self._since


def norm_optimizer(optimizer: Any) -> NormOptimizer:
    """The ``Disco`` or ``Scion`` in what a trainer wraps it in.

    Raises:
        UserError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, NormOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, NormOptimizer):
        raise UserError(
            f"norms are told by disco.Disco and disco.Scion, got {type(inner).__name__}; for AdamW give them groups "
            'with overrides={"*": {"rule": "adamw"}}'
        )
    if not all("group" in group for group in inner.param_groups):
        raise UserError('a parameter group has no "group", its layer group; build them with disco.param_groups(model)')
    return inner


def _peak(group: Mapping[str, Any]) -> float:
    """The learning rate that a scheduler started from, or the rate."""
    return float(group.get("initial_lr", group["lr"]))


def _rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Layer group -> learning rate now, of its first parameters where they differ."""
    return {str(group["group"]): float(group["lr"]) for group in reversed(groups)}


def _settings(optimizer: NormOptimizer, lr: float) -> dict[str, Any]:
    """Of the optimizer, as ``train.config.OptimizerConfig`` names them; what differs between its groups is left out."""
    ratios: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        ratios.setdefault(str(group["group"]), set()).add(_peak(group) / lr)
    adamw = {group["rule"] == "adamw" for group in optimizer.param_groups}
    name = type(optimizer).__name__.lower()
    settings: dict[str, Any] = {
        "name": "adamw" if adamw == {True} else name if adamw == {False} else f"{name} and adamw",
        "lr": lr,
        "ratios": {label: values.pop() for label, values in ratios.items() if len(values) == 1},
    }
    if False in adamw:
        settings["orthogonalize"] = optimizer._orthogonalisation["orthogonalize"]
    keys = (
        "weight_decay",
        *(("momentum", "nesterov") if False in adamw else ()),
        *(("betas",) if True in adamw else ()),
    )
    for key in keys:
        found = {group[key] for group in optimizer.param_groups}
        if len(found) == 1:
            settings[key] = found.pop()
    return settings


def _points(steps: int, batch: int) -> frozenset[int]:
    """As the horizons of ``train.schedule.evaluation_points``, from eight steps on."""
    ends = [steps, *(tokens // batch for tokens in powers_of_two(batch, 2 * batch, 2 * steps * batch))]
    return frozenset(step for step in {0}.union(*map(window, ends)) if step <= steps)


def _refuse_another(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises a UserError if the folder holds a run whose settings, other than the horizon, are not these."""
    there, here = read_run(folder).config, json.loads(json.dumps(config))
    for key in here:
        if key != "horizon" and here[key] != there.get(key):
            raise UserError(
                f"{folder} holds a run with other settings ({key} {there.get(key)}, here {here[key]}); "
                "choose another folder, or delete it"
            )
