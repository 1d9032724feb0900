"""Scion on one device: short, readable, and the oracle that ``disco.Disco`` must equal.

Pethick et al., arXiv:2502.07529. Every parameter group names its norm; the step is

    M <- momentum M + (1 - momentum) G
    W <- (1 - lr weight_decay) W - lr scale lmo(M)

so that with weight decay 0 one step changes a layer by exactly lr * scale in its norm. Groups with rule "adamw" take
Adam's direction instead: a Muon recipe is one optimizer and one state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from disco import rules
from disco.light import GradMomentum, to_average
from disco.norms import OperatorNorm, norm

GROUP_KEYS = {
    "params", "names", "group", "norm", "layout", "batch_dims", "lr", "rule", "momentum", "weight_decay", "nesterov",
    "scale", "betas", "eps", "initial_lr",
}  # fmt: skip


class Scion(torch.optim.Optimizer):
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
        keep_updates: remember the last update of each parameter, for ``norms(of="updates")``.

    Raises:
        ValueError: a group without a norm, unknown keys, norms or rules, a parameter whose dimensions do not fit its
            norm, or hyper-parameters out of range; the message names the parameter.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 2**-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        orthogonalize: str = "polar_express",
        steps: int = 5,
        *,
        scale: float | str = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        dtype: torch.dtype | None = None,
        light: bool = False,
        keep_updates: bool = False,
    ) -> None:
        self._orthogonalisation: dict[str, Any] = {"orthogonalize": orthogonalize, "steps": steps, "dtype": dtype}
        self._light = light
        self._keep_updates = keep_updates
        self._in_grad = GradMomentum()
        defaults = {
            "norm": None, "layout": "out_in", "batch_dims": 0, "lr": lr, "rule": "lmo", "momentum": momentum,
            "weight_decay": weight_decay, "nesterov": nesterov, "scale": scale, "betas": betas, "eps": eps,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking it, and allocates its state."""
        group = {**self.defaults, **param_group}
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        self._check(group)
        super().add_param_group(group)
        for param in group["params"]:
            if self._is_light(group):
                self._in_grad.watch(param)
            elif group["rule"] == "adamw":
                self.state[param] = rules.adamw_state(param)
            else:
                self.state[param] = rules.lmo_state(param, momentum=group["momentum"])

    def _check(self, group: dict[str, Any]) -> None:
        names = _names(group, len(self.param_groups))
        unknown = set(group) - set(self.defaults) - GROUP_KEYS
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)} in the parameter group of {names[0]}")
        if group["norm"] is None:
            raise ValueError(
                f"the parameter group of {names[0]} names no norm; build groups with disco.param_groups(model), "
                'or pass dicts such as {"params": [...], "norm": "rms_to_rms"}'
            )
        if group["rule"] not in ("lmo", "adamw"):
            raise ValueError(f'rule must be "lmo" or "adamw", got {group["rule"]!r} for {names[0]}')
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum is the weight of the old buffer, in [0, 1), got {group['momentum']}")
        if group["nesterov"] and self._light:
            raise ValueError("light mode keeps no gradient beside the momentum, so it cannot do nesterov")
        for key in ("lr", "weight_decay", "eps"):
            if not float(torch.as_tensor(group[key]).min()) >= 0:
                raise ValueError(f"{key} must be 0 or more, got {group[key]} for {names[0]}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must lie in [0, 1), got {group['betas']} for {names[0]}")
        if group["rule"] == "adamw" and isinstance(group["scale"], str):
            raise ValueError(f'rule "adamw" takes a number as scale, got {group["scale"]!r} for {names[0]}')
        if len(names) != len(group["params"]):
            raise ValueError(f"a group has {len(names)} names for {len(group['params'])} parameters")
        operator = self._norm(group)
        for name, param in zip(names, group["params"], strict=True):
            try:
                operator.check(param)
                rules.scale_factor(group["scale"], operator, param.shape)
            except ValueError as error:
                raise ValueError(f"parameter {name}: {error}") from None

    def _norm(self, group: dict[str, Any], name: str | None = None) -> OperatorNorm:
        return norm(
            name or group["norm"], layout=group["layout"], batch_dims=group["batch_dims"], **self._orthogonalisation
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a new gradient.

        Raises:
            RuntimeError: in light mode, before any update, if the momentum in ``.grad`` was tampered with.
        """
        if self._light and hasattr(self, "found_inf"):
            raise RuntimeError("light mode keeps momentum in .grad, so it takes no gradient scaler; use light=False")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, params in [(group, self._ready(group)) for group in self.param_groups]:
            for param, direction, scale in self._directions(params, group):
                if self._keep_updates:
                    self.state[param]["update"] = direction * (rules.broadcast(group["lr"], param) * scale)
                rules.apply_(param, direction, lr=group["lr"], weight_decay=group["weight_decay"], scale=scale)
        return loss

    def _ready(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that have a new gradient."""
        if self._is_light(group):
            return [param for param in group["params"] if self._in_grad.is_fresh(param, group["momentum"])]
        return [param for param in group["params"] if param.grad is not None]

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
        for param, gradient, direction in zip(params, gradients, operator.lmo_each(averages), strict=True):
            if self._is_light(group):
                self._in_grad.put(param, gradient.mul_(group["momentum"]), group["momentum"])
            yield param, direction, rules.scale_factor(group["scale"], operator, param.shape)

    @torch.no_grad()
    def norms(
        self, which: str | None = None, of: str = "weights", groups: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Norm of every parameter, by name; a layer group's value is the largest of its layers'.

        Args:
            which: name of a norm; None takes each parameter's own. Parameters that the norm does not fit are left out.
            groups: layer groups to measure; None takes all.
            of: "weights", "momentum" (the buffer, or the gradient without momentum; in light mode after a backward
                pass with the new gradient in it) or "updates" (needs ``keep_updates``).

        Raises:
            ValueError: unknown ``which`` or ``of``, or updates that were not kept.
        """
        result = {}
        for index, group in enumerate(self.param_groups):
            if groups is not None and group.get("group") not in groups:
                continue
            operator = self._norm(group, which)
            for name, param in zip(_names(group, index), group["params"], strict=True):
                tensor = self._quantity(param, of, group)
                if tensor is not None and (which is None or operator.fits(tensor)):
                    result[name] = float(operator.value(tensor).max())
        return result

    def _quantity(self, param: Tensor, of: str, group: dict[str, Any]) -> Tensor | None:
        if of == "weights":
            return param
        if of == "momentum":
            if self._is_light(group):
                return self._in_grad.average(param, group["momentum"])
            return self.state[param].get("momentum", self.state[param].get("first", param.grad))
        if of == "updates" and self._keep_updates:
            return self.state[param].get("update")
        raise ValueError(f"norms are taken of weights, momentum or (with keep_updates=True) updates, got {of!r}")

    # Light mode, and state

    def _is_light(self, group: dict[str, Any]) -> bool:
        return self._light and group["rule"] == "lmo"

    def _light_params(self) -> list[Tensor]:
        return [param for group in self.param_groups if self._is_light(group) for param in group["params"]]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes a gradient scaler announce itself (as ``found_inf``) instead of scaling ``.grad`` unseen."""
        return self._light

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, except those that hold the momentum of light mode."""
        kept = {param: param.grad for param in self._light_params() if self._in_grad.holds(param)}
        for param in kept:
            param.grad = None
        super().zero_grad(set_to_none)
        for param, grad in kept.items():
            param.grad = grad

    def state_dict(self) -> dict[str, Any]:
        """As any torch optimizer's; of light mode ``.grad`` is part of it. Loads into either mode."""
        result = super().state_dict()
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        for index, (group, param) in enumerate(pairs):
            grad = self._in_grad.saved(param, group["momentum"])
            if grad is not None:
                result["state"][index] = {**result["state"].get(index, {}), "grad": grad}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any torch optimizer's; in light mode puts the momentum back into ``.grad``."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if self._is_light(group):
                    self._in_grad.load(param, state, group["momentum"])
                elif "grad" in state:
                    state["momentum"] = state.pop("grad") * to_average(group["momentum"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("_orthogonalisation", "_light", "_keep_updates", "_in_grad")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_in_grad" in state:  # a copy; load_state_dict passes only groups and state
            self._in_grad.reattach(self._light_params())


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


def _names(group: dict[str, Any], index: int) -> list[str]:
    return group.get("names") or [f"{index}.{position}" for position in range(len(group["params"]))]
