"""Optimizers that ``benchmarks/optimizer_step.py`` runs side by side: one adapter each, and the harness around them.

An adapter is a module with

    NAME       as in the table and on the command line
    FOLDERS    checkouts it needs, by the name of their folder; empty for what is installed
    LAYOUTS    layout ("single", "ddp", "fsdp") -> how the optimizer handles it; any other is not run
    SETTINGS   coefficients, where embeddings and gains go, and stand-ins for what a CPU does not have
    build      (weights, world, lr, folders) -> Built
    scale      shape of a matrix -> documented factor between the polar factor and the update, learning rate aside

Adapters call the public interface of a peer and import it only inside ``build``: one worker process imports one peer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ADAPTERS = {
    "disco": "disco_disco", "disco-sharp": "disco_sharp", "scion": "disco_scion", "floor": "floor",
    "own-floor": "own_floor",    "torch-muon": "torch_muon", "dion": "dion",
    "dion-gram": "dion_gram", "gram-newton-schulz": "gram", "rakkit-disco": "rakkit", "lions-scion": "lions",
    "muon": "jordan", "torchtitan": "torchtitan", "emerging-optimizers": "emerging",
}  # fmt: skip
"""Name -> module in this package."""

OURS = ("disco", "disco-sharp", "scion", "floor", "own-floor")
"""Not peers: the best peer is sought among the others."""

MOMENTUM, WEIGHT_DECAY, ADAM = 0.95, 0.1, {"betas": (0.9, 0.95), "eps": 1e-8}
"""Of every optimizer that takes them; the names of ``ADAM`` are those of torch."""


@dataclass(frozen=True)
class Weight:
    """One parameter: ``role`` is "matrix", "input", "output" (embeddings) or "vector"."""

    name: str
    role: str
    param: torch.nn.Parameter

    @property
    def grad(self) -> Tensor:
        assert self.param.grad is not None
        return self.param.grad


@dataclass(frozen=True)
class World:
    """What a process knows of the others. The process group spans all ``size`` ranks, also when that is 1."""

    layout: str
    rank: int
    size: int
    mesh: Any

    @property
    def group(self) -> Any:
        return self.mesh.get_group()


@dataclass(frozen=True)
class Built:
    """A step of everything, and the optimizers whose ``state`` it keeps."""

    step: Callable[[], Any]
    optimizers: Sequence[torch.optim.Optimizer] = field(default_factory=tuple)


def params(weights: Sequence[Weight], *roles: str) -> list[torch.nn.Parameter]:
    """Parameters of the given roles, in order."""
    return [weight.param for weight in weights if weight.role in roles]


def matrices(weights: Sequence[Weight]) -> list[torch.nn.Parameter]:
    """What Muon is for."""
    return params(weights, "matrix")


def others(weights: Sequence[Weight]) -> list[torch.nn.Parameter]:
    """What Muon leaves to AdamW: embeddings and vectors."""
    return params(weights, "input", "output", "vector")


def adamw(weights: Sequence[Weight], lr: float) -> list[torch.optim.Optimizer]:
    """AdamW (foreach) for what Muon leaves to it; no optimizer where there is nothing."""
    rest = others(weights)
    return [torch.optim.AdamW(rest, lr=lr, weight_decay=WEIGHT_DECAY, foreach=True, **ADAM)] if rest else []


def together(optimizers: Sequence[torch.optim.Optimizer]) -> Built:
    """All of them, one after the other."""
    return Built(lambda: [optimizer.step() for optimizer in optimizers], optimizers)
