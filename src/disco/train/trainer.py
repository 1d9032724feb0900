"""A program that trains, as the loop drives it: what programs of one process and of many have in common."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disco.base import NormOptimizer
from disco.errors import UserError
from disco.train.config import TrainConfig

VALID_CHUNK = 8192
"""Held-out tokens per forward pass of a process, of all runs together; at least one sequence."""


class Trainer(abc.ABC):
    """Model and optimizer of R runs that train together.

    Attributes:
        optimizer: over the model's parameters.
        loss_fn: from tokens and targets, of all runs, to their losses: what is trained.
    """

    optimizer: NormOptimizer
    loss_fn: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, config: TrainConfig) -> None:
        """Takes what all runs share from the configuration of one of them."""
        self.device = device_of(config)
        self._context, self._micro = config.model.context, config.parallel.micro_batch
        self._half = config.precision == "bf16"

    @abc.abstractmethod
    def initialise(self, run: int) -> None:
        """Draws the initial weights of a run from its seed."""

    @abc.abstractmethod
    def load(self, run: int, path: Path) -> None:
        """Takes a run's weights and optimizer state from a checkpoint, of one process or of many."""

    @abc.abstractmethod
    def save(self, run: int, folder: Path, header: Mapping[str, Any], kept: int | None = None) -> None:
        """Makes a checkpoint of a run in the folder of its checkpoints, perhaps in the background.

        Args:
            header: what else belongs into it (``Member.header``).
            kept: None for the latest one, which in time makes room for others; else the tokens that it is kept under.

        Raises:
            UserError: it, or the one before, cannot be written.
        """

    @abc.abstractmethod
    def settle(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
            UserError: it cannot be written.
        """

    @abc.abstractmethod
    def keep(self, runs: Sequence[int]) -> None:
        """Goes on with these runs only, in this order."""

    @abc.abstractmethod
    def rates(self, run: int) -> dict[str, float]:
        """Layer group -> learning rate of a run."""

    @abc.abstractmethod
    def norms(self) -> list[dict[str, float]]:
        """Of each run: metric key -> norm (``probe``)."""

    @abc.abstractmethod
    def valid_losses(self, tokens: Tensor, targets: Tensor) -> list[float]:
        """Held-out loss of each run, on the same tokens and targets [B, T]."""

    def _remember_rates(self) -> None:
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def set_rates(self, factor: float) -> None:
        """Sets the learning rates to ``factor`` times the configured ones."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def gradients(self, tokens: Tensor, targets: Tensor) -> list[float]:
        """Losses of the runs before the update; their gradients take the place of earlier ones.

        Args:
            tokens, targets: this process's part of the batch of each run, [R, B, T].
        """
        self.optimizer.zero_grad()
        rows = self._micro // self._context if self._micro else tokens.shape[-2]
        parts = list(zip(tokens.split(rows, -2), targets.split(rows, -2), strict=True))
        total: Tensor | None = None
        for index, part in enumerate(parts):
            with self._adding(last=index + 1 == len(parts)):
                with self._precision():
                    losses = self.loss_fn(*(x.to(self.device) for x in part))
                share = losses if len(parts) == 1 else losses / len(parts)
                share.sum().backward()
            total = share.detach() if total is None else total + share.detach()
        assert total is not None
        return self._agreed(total)

    def step(self) -> None:
        """One update."""
        self.optimizer.step()

    def _adding(self, last: bool) -> AbstractContextManager[object]:
        """Around the passes of one micro-batch, of which ``last`` completes the gradients."""
        return nullcontext()

    def _agreed(self, losses: Tensor) -> list[float]:
        """The losses of the whole batch from those of this process's part of it."""
        return losses.tolist()

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)


def device_of(config: TrainConfig) -> torch.device:
    """Where this process trains.

    Raises:
        UserError: a GPU is asked for and not here, or bf16 on a CPU that was not asked for.
    """
    asked = config.parallel.device
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("parallel.device is cuda, but torch finds no GPU here; use auto or cpu")
    if config.precision == "bf16" and asked == "auto" and not there:
        raise UserError("precision is bf16, which is for GPUs, but there is none here; or set parallel.device to cpu")
    if asked == "cpu" or not there:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device
