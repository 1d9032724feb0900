"""Hugging Face ``Trainer``: a callback that logs norms and writes a run record.

The optimizer goes in by ``optimizer_cls_and_kwargs=(Disco, {"params": groups})`` or ``optimizers=(optimizer, None)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import __version__ as version
from transformers.trainer_callback import ExportableState

from disco.integrations.record import Recorder, State

CONSTANT = ("constant", "constant_with_warmup")
TO_THE_END = ("linear", "cosine")
"""Schedules that fall from the end of the warmup to the end of the run."""


class TransformersCallback(TrainerCallback, ExportableState):
    """Logs the norms of layer groups and writes the run's record; a resumed training goes on with it.

    Norms are measured whenever the ``Trainer`` logs or evaluates. They are added to its logs, for callbacks that come
    after this one, and to ``state.log_history``.

    Args:
        folder: the run's own folder, such as ``runs/llama-0.03-1``.
        context: tokens of one sequence.
        lr, model, schedule, data: as of ``Recorder``; None: what the optimizer, the model's configuration and the
            training arguments tell (give the schedule if the ``Trainer`` was given one).
        evaluate: also have the ``Trainer`` evaluate at the steps where ``disco fit`` looks (``Recorder.due``).

    Attributes:
        recorder: of the training that goes on; None outside of one.
    """

    def __init__(
        self,
        folder: Path | str,
        context: int,
        lr: float | None = None,
        model: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        evaluate: bool = False,
    ) -> None:
        self.folder, self.context = Path(folder), context
        self.settings: dict[str, Any] = {"lr": lr, "model": model, "schedule": schedule, "data": data}
        self.evaluate = evaluate
        self.recorder: Recorder | None = None
        self.saved: State | None = None
        """Set by the ``Trainer`` with ``restore_callback_states_from_checkpoint``; else its own state has it."""

    def state(self) -> dict[str, Any]:
        """What the ``Trainer`` keeps of this callback in a checkpoint."""
        arguments = {"folder": str(self.folder), "context": self.context, "evaluate": self.evaluate, **self.settings}
        return {"args": arguments, "attributes": {"saved": self.recorder.state_dict() if self.recorder else None}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the record, or goes on with it from the checkpoint."""
        batch = (state.train_batch_size or args.train_batch_size) * args.gradient_accumulation_steps * args.world_size
        batch *= self.context
        known = dict(self.settings)
        model = kwargs["model"]
        config = getattr(model, "config", None)
        known["model"] = known["model"] or (_model(config) | {"context": self.context})
        known["schedule"] = known["schedule"] or _schedule(args, state.max_steps, batch)
        known["data"] = known["data"] or {"vocab": getattr(config, "vocab_size", None)}
        self.recorder = Recorder(
            self.folder,
            kwargs["optimizer"],
            batch=batch,
            horizon=state.max_steps * batch,
            seed=args.seed,
            parameters=sum(param.numel() for param in model.parameters()),
            trainer=f"transformers {version}",
            **known,
        )
        if state.global_step:
            callbacks: Any = state.stateful_callbacks or {}
            kept = callbacks.get(type(self).__name__, {})
            self.recorder.load_state_dict(self.saved or kept.get("attributes", {}).get("saved"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for an evaluation where one is due."""
        if self.evaluate and self.recorder is not None and self.recorder.due(state.global_step):
            control.should_evaluate = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records the training loss, and adds the norms to what is logged."""
        if self.recorder is not None and logs is not None and "loss" in logs:
            self.recorder.record(state.global_step, tokens=state.num_input_tokens_seen or None, loss=logs["loss"])
            logs |= self.recorder.norms
            state.log_history[-1] |= self.recorder.norms

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Records the held-out loss."""
        valid = (metrics or {}).get("eval_loss")
        if self.recorder is not None and valid is not None:
            self.recorder.record(state.global_step, tokens=state.num_input_tokens_seen or None, valid=valid)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the record if the training is complete; else it can be resumed."""
        if self.recorder is not None:
            if state.global_step >= state.max_steps:
                self.recorder.finish()
            else:
                self.recorder.close()
            self.recorder = None


def _model(config: Any) -> dict[str, Any]:
    """What a model's configuration tells."""
    width, depth = (getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers"))
    name = f"{getattr(config, 'model_type', 'model')}"
    if width is None or depth is None:
        return {"name": name}
    return {"name": f"{name}-d{width}-L{depth}", "width": width, "depth": depth}


def _schedule(args: TrainingArguments, steps: int, batch: int) -> dict[str, Any]:
    """What training arguments tell of the learning rate over a run."""
    shape = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup = 0 if shape == "constant" else args.get_warmup_steps(steps)
    if shape in CONSTANT:
        return {"warmup": warmup * batch, "decay": 0.0}
    if shape in TO_THE_END:
        return {"shape": shape, "warmup": warmup * batch, "decay": (steps - warmup) / steps}
    return {"shape": shape, "decay": 1.0}
