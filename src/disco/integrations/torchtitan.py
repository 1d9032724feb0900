"""torchtitan 0.3: an optimizer configuration that builds Disco, and a metrics processor that knows norms.

Both are components in torchtitan's own sense: put ``TorchtitanOptimizer.Config`` and ``TorchtitanMetrics.Config`` into
a ``Trainer.Config``; no code of torchtitan changes.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer

from disco.distributed.disco import Disco
from disco.errors import UserError
from disco.groups import clean_name, param_groups
from disco.integrations.record import Recorder
from disco.probe import Probe, largest, layers

RECORD = "disco.record"
"""Key of the run record's state among the optimizer's in a checkpoint."""


class TorchtitanOptimizer(OptimizersContainer):
    """torchtitan's container with one ``Disco`` for each model part; groups are found by ``param_groups``."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """What ``param_groups`` and ``Disco`` take; what torchtitan's own has besides is not used."""

        lr: float = 2**-5
        """Base learning rate: the step size in each layer's norm."""
        ratios: dict[str, float] = field(default_factory=dict)
        """Learning rate of a layer group (input, hidden, output, vector) over ``lr``."""
        overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
        """Pattern of parameter names -> settings, as ``param_groups`` takes them."""
        momentum: float = 0.0
        weight_decay: float = 0.0
        nesterov: bool = False
        orthogonalize: str = "polar_express"

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.recorder: Recorder | None = None
        self.saved = ""
        """State of the run record in the checkpoint that was loaded; "" if there was none."""
        self.optimizers = []
        for part in model_parts:
            names = {id(param): canonical_fqn(name) for name, param in part.named_parameters()}
            groups = param_groups(part, config.lr, config.ratios, _overrides(config.overrides, part))
            optimizer = Disco(
                groups,
                config.lr,
                config.momentum,
                config.weight_decay,
                config.nesterov,
                config.orthogonalize,
            )
            for group in optimizer.param_groups:
                group["param_names"] = [names[id(param)] for param in group["params"]]
            self.optimizers.append(optimizer)
        params = [
            param for optimizer in self.optimizers for group in optimizer.param_groups for param in group["params"]
        ]
        self._validate_params(params)
        self._post_init(params)

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's. Without the names of groups, which belong to how the model is cut into parts."""
        state = {key: value for key, value in super().state_dict().items() if not _names(key)}
        return state | {RECORD: self._record()}

    def _record(self) -> str:
        """State of the run record, the same on all ranks: any of them may be the one whose copy a checkpoint keeps."""
        if self.recorder is None:
            return self.saved
        told = [json.dumps(self.recorder.state_dict())]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(told, src=0)  # only rank 0 knows how long the record is
        return told[0]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torchtitan's; keeps the state of the run record for ``TorchtitanMetrics``."""
        names = {
            f"param_groups.{name}.names": group["names"]
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for name in group["param_names"]
        }
        self.saved = state_dict.get(RECORD, "")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != RECORD} | names)


class TorchtitanMetrics(MetricsProcessor):
    """torchtitan's metrics with the norm of each layer group, ``norm/<group>/<norm>``, and if asked a run record.

    With pipeline parallelism a rank logs the norms of its own parts, and there is no run record.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """torchtitan's, and where the record is."""

        record: str = ""
        """The run's own folder, such as ``runs/llama-0.03-1``; "": no record."""

    config: Config

    def __init__(self, config: Config, *, config_dict: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(config, config_dict=config_dict, **settings)
        self._job = config_dict or {}
        self._recorder: Recorder | None = None

    def should_log(self, step: int) -> bool:
        """As torchtitan's, and at the last step; before the first, the record starts or goes on from the checkpoint."""
        if self.config.record and self._recorder is None:
            self._recorder = self._start(step - 1)
        return super().should_log(step) or (self._recorder is not None and step == self._recorder.steps)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """As torchtitan's, with norms."""
        extra = dict(extra_metrics or {})
        if self._recorder is not None:
            self._recorder.record(step, tokens=extra.get("n_tokens_seen"), loss=global_avg_loss)
            extra |= self._recorder.norms
        else:
            extra |= self._norms()
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=extra)

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """As torchtitan's; the held-out loss goes into the record."""
        if self._recorder is not None:
            self._recorder.record(step, valid=loss)
        super().log_validation(loss, step, extra_metrics)

    def close(self) -> None:
        """Ends the record if the training is complete; else it can be resumed."""
        if self._recorder is not None:
            if self._recorder.step >= self._recorder.steps:
                self._recorder.finish()
            else:
                self._recorder.close()
            self._recorder = None
        super().close()

    def _norms(self) -> dict[str, float]:
        """The largest of each layer group, over the model parts of this rank."""
        result: dict[str, float] = {}
        for optimizer in self._container().optimizers:
            for key, value in largest(Probe(optimizer).measure(), layers(optimizer)).items():
                result[key] = max(value, result.get(key, value))
        return result

    def _container(self) -> TorchtitanOptimizer:
        if not isinstance(self.optimizers, TorchtitanOptimizer):
            raise UserError("TorchtitanMetrics logs norms of TorchtitanOptimizer; put its Config into the trainer's")
        return self.optimizers

    def _start(self, step: int) -> Recorder:
        """The record, with what the job's configuration tells; ``step`` steps are made."""
        container, training, spec = self._container(), self._job["training"], self._job["model_spec"]
        if self.parallel_dims.pp_enabled:
            raise UserError("with pipeline parallelism no rank knows all norms, so there is no run record")
        sequences = training["global_batch_size"]
        if sequences < 0:
            sequences = training["local_batch_size"] * self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        batch = sequences * training["seq_len"]
        model = {"name": f"{spec['name']} {spec['flavor']}", "width": spec["model"].get("dim")}
        recorder = Recorder(
            self.config.record,
            container.optimizers[0],
            batch=batch,
            horizon=training["steps"] * batch,
            seed=self._job["debug"].get("seed") or 0,
            model=model | {"depth": len(spec["model"].get("layers", ())) or None, "context": training["seq_len"]},
            schedule=_schedule(self._job["lr_scheduler"], training["steps"], batch),
            data={"vocab": spec["model"].get("vocab_size"), "source": self._job["dataloader"].get("dataset")},
            trainer=f"torchtitan {version('torchtitan')}",
        )
        if step:
            recorder.load_state_dict(json.loads(container.saved or "null"))
        container.recorder = recorder
        return recorder


def _overrides(overrides: dict[str, dict[str, Any]], part: nn.Module) -> dict[str, dict[str, Any]]:
    """Those for the part: a stage of a pipeline, some of whose modules are None, has only some of the parameters."""
    if None not in part._modules.values():
        return overrides
    names = [clean_name(name) for name, _ in part.named_parameters()]
    return {pattern: settings for pattern, settings in overrides.items() if fnmatch.filter(names, pattern)}


def _schedule(scheduler: dict[str, Any], steps: int, batch: int) -> dict[str, Any]:
    """What torchtitan's schedule (warmup, stable, decay) is called in a record."""
    warmup = min(scheduler["warmup_steps"], steps)
    decay = scheduler["decay_ratio"] if scheduler["decay_ratio"] is not None else 1 - warmup / steps
    return {"warmup": warmup * batch, "decay": decay} | ({"shape": scheduler["decay_type"]} if decay else {})


def _names(key: str) -> bool:
    return key.startswith("param_groups.") and key.endswith(".names")
