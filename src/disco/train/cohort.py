"""Several runs as one program: parameters, gradients and optimizer states carry a leading run dimension.

One forward and backward pass and one batched orthogonalisation then serve all runs of a cohort. A run alone is a cohort
of one. Shape letters as in ``model.py``, and R runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disco.groups import ParamGroups, init_, param_groups
from disco.probe import measure_each
from disco.scion import Scion
from disco.train import checkpoint
from disco.train.config import OptimizerConfig, TrainConfig
from disco.train.model import Llama
from disco.train.trainer import VALID_CHUNK, Trainer

VARIED = ("lr", "momentum", "weight_decay", "betas")
"""Settings of a parameter group in which the runs of a cohort may differ."""


def optimizer_groups(model: nn.Module, config: OptimizerConfig) -> ParamGroups:
    """The parameter groups of a run: scion (all by LMO), adam or adamw, or muon (hidden by LMO, the rest by AdamW)."""
    everywhere: dict[str, dict[str, Any]] = {"*": {"rule": "adamw"}}
    overrides = {"scion": {}, "adam": everywhere, "adamw": everywhere, "muon": everywhere}[config.name]
    groups = param_groups(model, lr=config.lr, ratios=config.ratios, overrides=overrides)
    for group in groups:
        if config.name == "muon" and group["group"] == "hidden":
            group |= {"rule": "lmo", "scale": "max_spectral"}
        group |= {"momentum": config.momentum, "weight_decay": config.weight_decay, "betas": config.betas}
    return groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Scion:
    """The optimizer of one run; see ``optimizer_groups``."""
    return _scion(optimizer_groups(model, config), config)


def _scion(groups: list[dict[str, Any]], config: OptimizerConfig) -> Scion:
    return Scion(groups, **optimizer_settings(config))


def optimizer_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Arguments of ``Scion`` and ``Disco`` that hold for all groups."""
    return {
        "lr": config.lr,
        "nesterov": config.nesterov,
        "orthogonalize": config.orthogonalize,
        "eps": config.eps,
    }


class Program(Trainer):
    """Model and optimizer of a cohort, with weights that are still to be filled by ``initialise`` or ``load``.

    Args:
        configs: runs with one ``train.config.cohort_key``.
        compiled: compile the model, also where the configuration does not ask for it; it changes the rounding only.

    Attributes:
        model: its parameters are [R, ...]; takes tokens [R, B, T].
        optimizer: over these; settings in which the runs differ are tensors [R].
    """

    optimizer: Scion

    def __init__(self, configs: Sequence[TrainConfig], compiled: bool = False) -> None:
        super().__init__(configs[0])
        self.configs = list(configs)
        model, vocab = configs[0].model, configs[0].data.vocab
        self._one = Llama(model, vocab)
        """Model of one run, through which weights come and go."""
        self.model = Llama(model, vocab)
        for name, param in list(self.model.named_parameters()):
            _replace(self.model, name, nn.Parameter(param.new_zeros(len(configs), *param.shape)))
        self.model.to(self.device)
        self.model.recompute(configs[0].parallel.recompute)
        params = dict(self.model.named_parameters())
        groups = []
        for same in zip(*(optimizer_groups(self._one, config.optimizer) for config in configs), strict=True):
            settings = {key: _merged([group[key] for group in same]) for key in VARIED}
            own = {"params": [params[name] for name in same[0]["names"]], "batch_dims": same[0]["batch_dims"] + 1}
            groups.append({**same[0], **settings, **own})
        self.optimizer = _scion(groups, configs[0].optimizer)
        self._remember_rates()
        self.loss_fn = self.model.loss
        if compiled or configs[0].compile:
            torch.compiler.reset()  # what earlier cohorts compiled counts towards a limit
            self.loss_fn = torch.compile(self.model.loss, dynamic=False)

    def initialise(self, run: int) -> None:
        generator = torch.Generator().manual_seed(self.configs[run].seed)
        init_(self._one, self._one.init_scales(), generator=generator)
        self._put(run, build_optimizer(self._one, self.configs[run].optimizer))

    def load(self, run: int, path: Path) -> None:
        optimizer = build_optimizer(self._one, self.configs[run].optimizer)
        checkpoint.restore(path, checkpoint.tensors(optimizer))
        self._put(run, optimizer)

    def save(self, run: int, folder: Path, header: Mapping[str, Any], kept: int | None = None) -> None:
        losses = torch.tensor(header["state"]["losses"], dtype=torch.float64)
        content = {**header, "state": {**header["state"], "losses": losses}, **self.state(run)}
        if kept is None:
            checkpoint.rotate(folder, content)
        else:
            checkpoint.save(checkpoint.path_at(folder, kept), content)

    def settle(self) -> None:
        """Nothing: saves are complete when they return."""

    def state(self, run: int) -> dict[str, Any]:
        """A run's weights and optimizer state, as copies and as those of a model and optimizer of its own."""
        optimizer = build_optimizer(self._one, self.configs[run].optimizer)
        with torch.no_grad():
            for param, stacked in self._pairs():
                param.copy_(stacked[run])
                for key, value in optimizer.state[param].items():
                    value.copy_(_part(self.optimizer.state[stacked][key], stacked, run))
        weights = {name: weight.clone() for name, weight in self._one.state_dict().items()}
        return {"model": weights, "optimizer": optimizer.state_dict()}

    def keep(self, runs: Sequence[int]) -> None:
        self.configs = [self.configs[run] for run in runs]
        index = list(runs)  # for tensors of any device: settings are on the CPU
        kept: dict[Tensor, nn.Parameter] = {}
        for name, old in list(self.model.named_parameters()):
            kept[old] = nn.Parameter(old.detach()[index])
            if old.grad is not None:  # whose norms are logged
                kept[old].grad = old.grad[index]
            _replace(self.model, name, kept[old])
            state = self.optimizer.state.pop(old)
            self.optimizer.state[kept[old]] = {
                key: value[index] if value.ndim == old.ndim else value for key, value in state.items()
            }
        for group in self.optimizer.param_groups:
            group["params"] = [kept[old] for old in group["params"]]
            group |= {key: _taken(group[key], index) for key in VARIED}
        self._rates = [_taken(rate, index) for rate in self._rates]

    def rates(self, run: int) -> dict[str, float]:
        return {
            group["group"]: float(group["lr"][run] if isinstance(group["lr"], Tensor) else group["lr"])
            for group in self.optimizer.param_groups
        }

    def norms(self) -> list[dict[str, float]]:
        return measure_each(self.optimizer)

    @torch.no_grad()
    def valid_losses(self, tokens: Tensor, targets: Tensor) -> list[float]:
        runs = len(self.configs)
        rows = max(1, VALID_CHUNK // (runs * self._context))
        totals = torch.zeros(runs, dtype=torch.float64)
        for chunk, target in zip(tokens.split(rows), targets.split(rows), strict=True):
            with self._precision():
                losses = self.model.loss(*(x.to(self.device).expand(runs, -1, -1) for x in (chunk, target)))
            totals += losses.double().cpu() * len(chunk)
        return [float(total) for total in totals / len(tokens)]

    def _put(self, run: int, optimizer: Scion) -> None:
        with torch.no_grad():
            for param, stacked in self._pairs():
                stacked[run].copy_(param)
                for key, value in optimizer.state[param].items():
                    _part(self.optimizer.state[stacked][key], stacked, run).copy_(value)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter of one run, of all runs)."""
        return list(zip(self._one.parameters(), self.model.parameters(), strict=True))


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, parameter)


def _merged(values: Sequence[Any]) -> Any:
    """One setting for all runs: the number that they share, or a tensor [R]; of pairs, a pair of these."""
    if isinstance(values[0], tuple):
        return tuple(_merged(part) for part in zip(*values, strict=True))
    return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=torch.float64)


def _taken(setting: Any, index: list[int]) -> Any:
    if isinstance(setting, tuple):
        return tuple(_taken(part, index) for part in setting)
    return setting[index] if isinstance(setting, Tensor) else setting


def _part(state: Tensor, stacked: Tensor, run: int) -> Tensor:
    """One run's part of a state; counters of steps are shared."""
    return state[run] if state.ndim == stacked.ndim else state
