"""Scion on one device: short, readable, and the oracle that ``disco.Disco`` must equal.

Pethick et al., arXiv:2502.07529. Every parameter group names its norm; the step is

    M <- momentum M + (1 - momentum) G
    W <- (1 - lr weight_decay) W - lr scale lmo(M)

so that with weight decay 0 one step changes a layer by exactly lr * scale in its norm. Groups with rule "adamw" take
Adam's direction instead: a Muon recipe is one optimizer and one state dict. Parameters with leading batch dimensions
(``batch_dims``) are independent matrices, and lr, momentum, weight_decay and betas may then be tensors over these
dimensions: many runs that differ in them are one optimizer (``train/cohort.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor

from disco import rules, split
from disco.base import Asked, NormOptimizer


@final
class Scion(NormOptimizer):
    """Scion, and with groups of rule "adamw" any Muon-like mixture, on plain tensors.

    Args:
        params: parameter groups, from ``disco.param_groups(model)`` or by hand: dicts with ``params`` and ``norm``, and
            optionally ``layout``, ``batch_dims``, ``names``, ``rule`` ("lmo" or "adamw"), ``scale`` and any argument
            below.
        lr: size of a step in the layer's norm.
        momentum: weight that stays on the old buffer; 0 is none, 0.9 the usual.
        weight_decay: lambda of W <- (1 - lr lambda) W.
        nesterov: look ahead by one update of the buffer.
        orthogonalize, steps, dtype: see ``disco.polar.orthogonalize``.
        scale: multiplier of the direction, or for an LMO a name in ``rules.SIZE_FACTORS``.
        betas, eps: of the groups with rule "adamw".
        light: keep the momentum in ``.grad`` and nothing else (ScionLight, ``disco.light``). ``zero_grad`` then leaves
            these gradients alone, the next backward pass adds to them, and ``step`` raises RuntimeError if anything
            else, such as gradient clipping, a gradient scaler or ``zero_grad`` of the model, has changed them.
        momentum_dtype: of the momentum buffers; None is the parameter's.
        keep_updates: remember the last update of each parameter, for ``norms(of="updates")``.

    Raises:
        ValueError: a group without a norm, unknown keys, norms or rules, a parameter whose dimensions do not fit its
            norm, or hyper-parameters out of range; the message names the parameter.
    """

    def _update(self, ready: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        for group, params in ready:
            for param, direction, scale in self._directions(params, group):
                if self._keep_updates:
                    self.state[param]["update"] = direction * (rules.broadcast(group["lr"], param) * scale)
                rules.apply_(param, direction, lr=group["lr"], weight_decay=group["weight_decay"], scale=scale)

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(parameter, direction, scale) of each parameter of a group, whose state is updated."""
        gradients = [cast(Tensor, param.grad) for param in params]
        states = [self.state[param] for param in params]
        if group["rule"] == "adamw":
            for param, gradient, state in zip(params, gradients, states, strict=True):
                yield param, rules.adamw(gradient, state, betas=group["betas"], eps=group["eps"]), group["scale"]
            return
        operator = self._norm(group)
        if self._is_light(group):
            averages = gradients  # the buffer times 1 / (1 - momentum), to which the LMO is invariant
        else:
            settings = {key: group[key] for key in ("momentum", "nesterov")}
            averages = [rules.average(g, s, **settings) for g, s in zip(gradients, states, strict=True)]
        matrices = [split.parts(average, group["split"], operator) for average in averages]
        lmos = iter(operator.lmo_each([part for parts in matrices for part in parts]))
        for param, gradient, parts in zip(params, gradients, matrices, strict=True):
            if self._is_light(group):
                self._in_grad.put(param, gradient.mul_(group["momentum"]), group["momentum"])
            scales = [rules.scale_factor(group["scale"], operator, part.shape) for part in parts]
            if len(parts) == 1:
                yield param, next(lmos), scales[0]
            else:
                yield param, torch.cat([next(lmos) * scale for scale in scales], split.out_dim(operator)), 1.0

    @torch.no_grad()
    def norms_each(
        self, which: str | None = None, of: str = "weights", groups: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """As ``norms``, of every matrix along the batch dimensions: tensors [batch...]."""
        asked = self._asked(which, of, groups)
        return {name: split.values(one.tensor, one.operator, one.split, which) for name, one in asked.items()}

    def _values(self, asked: list[Asked], which: str | None) -> list[float]:
        return [split.value(one.tensor, one.operator, one.split, which) for one in asked]


def constrained(lr: float, radius: float) -> dict[str, float]:
    """Hyper-parameters of a group in the constrained form of LIONS, W <- (1 - lr) W - lr radius lmo(M).

    Returns:
        ``{"lr": lr * radius, "weight_decay": 1 / radius}``, to be merged into a parameter group (arXiv:2502.07529,
        algorithm 2).

    Raises:
        ValueError: the radius is not positive.
    """
    if not radius > 0:
        raise ValueError(f"the radius of the norm ball must be above 0, got {radius}")
    return {"lr": lr * radius, "weight_decay": 1 / radius}
