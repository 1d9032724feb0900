"""Lightning: a callback for any module that logs norms and writes a run record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import __version__ as version
from torch import Tensor

from disco.errors import UserError
from disco.integrations.record import Recorder


class LightningCallback(Callback):
    """Logs the norms of layer groups and writes the run's record; a resumed training goes on with it.

    Needs one optimizer, ``Disco`` or ``Scion``, of a module that Lightning optimizes by itself.

    Args:
        folder: the run's own folder, such as ``runs/llama-0.03-1``.
        batch: tokens of one optimizer step, of all ranks and micro-batches together.
        valid: name under which the module logs its held-out loss.
        every: steps between lines; None: ``log_every_n_steps`` of the ``Trainer``. Validations get a line too.
        lr, seed, model, schedule, data: as of ``Recorder``.

    Attributes:
        recorder: of the training that goes on; None outside of one.
    """

    def __init__(
        self,
        folder: Path | str,
        batch: int,
        valid: str = "val_loss",
        every: int | None = None,
        *,
        lr: float | None = None,
        seed: int = 0,
        model: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.batch, self.valid, self.every = Path(folder), batch, valid, every
        self.settings: dict[str, Any] = {"lr": lr, "seed": seed, "model": model, "schedule": schedule, "data": data}
        self.recorder: Recorder | None = None
        self._step = 0
        self._sum: Tensor | float = 0.0
        """Of the training losses since the last line, and how many."""
        self._count = 0
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps of this callback in a checkpoint."""
        if self.recorder is None:
            return {}
        return {"recorder": self.recorder.state_dict(), "sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what the checkpoint says until the training starts."""
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the record, or goes on with it from the checkpoint."""
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise UserError("a run record needs the length of the run: give the Trainer max_steps or max_epochs")
        if len(trainer.optimizers) != 1:
            raise UserError(f"a run record is of one optimizer, the module has {len(trainer.optimizers)}")
        settings = dict(self.settings)
        settings["model"] = settings["model"] or {"name": type(pl_module).__name__}
        self.recorder = Recorder(
            self.folder,
            trainer.optimizers[0],
            batch=self.batch,
            horizon=int(steps) * self.batch,
            parameters=sum(param.numel() for param in pl_module.parameters()),
            trainer=f"lightning {version}",
            **settings,
        )
        self._step, self._sum, self._count = trainer.global_step, 0.0, 0
        if trainer.global_step:
            self.recorder.load_state_dict(self._saved.get("recorder"))
            self._sum, self._count = self._saved["sum"], self._saved["count"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages the training loss, and records it with the norms every few steps."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if self.recorder is None or loss is None:
            return
        self._sum += loss.detach() * trainer.accumulate_grad_batches  # Lightning has divided by it
        self._count += 1
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % (self.every or trainer.log_every_n_steps) == 0 or self._step == self.recorder.steps:
            mean = trainer.strategy.reduce(self._sum / self._count, reduce_op="mean")
            self.recorder.record(self._step, loss=float(mean))
            self._sum, self._count = 0.0, 0
            for logger in trainer.loggers:
                logger.log_metrics(self.recorder.norms, self._step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the held-out loss."""
        valid = trainer.callback_metrics.get(self.valid)
        if self.recorder is not None and valid is not None and not trainer.sanity_checking:
            self.recorder.record(trainer.global_step, valid=float(valid))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the record if the training is complete; else it can be resumed."""
        if self.recorder is not None:
            if trainer.global_step >= self.recorder.steps:
                self.recorder.finish()
            else:
                self.recorder.close()
            self.recorder = None
