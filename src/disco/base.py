"""What ``Scion`` and ``Disco`` share: parameter groups and their checks, state, light mode and norms."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disco import rules, split
from disco.light import GradMomentum, to_average
from disco.norms import NORMS, OperatorNorm, norm
from disco.spectrum import MEASURES

GROUP_KEYS = {
    "params", "names", "group", "norm", "layout", "batch_dims", "lr", "rule", "momentum", "weight_decay", "nesterov",
    "scale", "betas", "eps", "split", "initial_lr",
}  # fmt: skip


class Asked(NamedTuple):
    """A tensor whose norm is asked for: a parameter, its momentum or its update; ``split`` as ``split.sizes`` gives."""

    name: str
    of: str
    param: Tensor
    tensor: Tensor
    operator: OperatorNorm
    split: tuple[int, ...]


class NormOptimizer(torch.optim.Optimizer, abc.ABC):
    """Base of ``Scion`` and ``Disco``; see there for the arguments."""

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
        momentum_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(params, nn.Module):
            raise ValueError(
                f"{type(self).__name__} takes parameter groups, got a {type(params).__name__}; pass "
                "disco.param_groups(model)"
            )
        self._orthogonalisation: dict[str, Any] = {"orthogonalize": orthogonalize, "steps": steps, "dtype": dtype}
        self._light = light
        self._keep_updates = keep_updates
        self._momentum_dtype = momentum_dtype
        self._in_grad = GradMomentum()
        defaults = {
            "norm": None, "layout": "out_in", "batch_dims": 0, "lr": lr, "rule": "lmo", "momentum": momentum,
            "weight_decay": weight_decay, "nesterov": nesterov, "scale": scale, "betas": betas, "eps": eps, "split": (),
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
                self.state[param] = rules.lmo_state(param, momentum=group["momentum"], dtype=self._momentum_dtype)

    def _check(self, group: dict[str, Any]) -> None:
        names = parameter_names(group, len(self.param_groups))
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
        if not all(0 <= momentum < 1 for momentum in _numbers(group["momentum"])):
            raise ValueError(f"momentum is the weight of the old buffer, in [0, 1), got {group['momentum']}")
        if group["nesterov"] and self._light:
            raise ValueError("light mode keeps no gradient beside the momentum, so it cannot do nesterov")
        for key in ("lr", "weight_decay", "eps"):
            if not all(number >= 0 for number in _numbers(group[key])):
                raise ValueError(f"{key} must be 0 or more, got {group[key]} for {names[0]}")
        if not all(0 <= number < 1 for beta in group["betas"] for number in _numbers(beta)):
            raise ValueError(f"betas must lie in [0, 1), got {group['betas']} for {names[0]}")
        if group["rule"] == "adamw" and isinstance(group["scale"], str):
            raise ValueError(f'rule "adamw" takes a number as scale, got {group["scale"]!r} for {names[0]}')
        if len(names) != len(group["params"]):
            raise ValueError(f"a group has {len(names)} names for {len(group['params'])} parameters")
        operator = self._norm(group)
        for name, param in zip(names, group["params"], strict=True):
            try:
                operator.check(param)
                for shape in split.shapes(param, group["split"], operator):
                    rules.scale_factor(group["scale"], operator, shape)
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
        self._update([(group, self._ready(group)) for group in self.param_groups])
        return loss

    @abc.abstractmethod
    def _update(self, ready: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Updates the parameters of each group that have a new gradient."""

    def _ready(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that have a new gradient."""
        if self._is_light(group):
            fresh = [param for param in group["params"] if self._in_grad.is_fresh(param, group["momentum"])]
            self._in_grad.compare(fresh)
            return fresh
        return [param for param in group["params"] if param.grad is not None]

    @torch.no_grad()
    def norms(
        self, which: str | None = None, of: str = "weights", groups: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Norm of every parameter, by name; a layer group's value is the largest of its layers'.

        Args:
            which: name of a norm, "frobenius", "max_abs" or "stable_rank"; None takes each parameter's own norm.
                Parameters that the norm does not fit are left out.
            groups: layer groups to measure; None takes all.
            of: "weights", "momentum" (the buffer, or the gradient without momentum; in light mode after a backward
                pass with the new gradient in it) or "updates" (needs ``keep_updates``).

        Raises:
            ValueError: unknown ``which`` or ``of``, or updates that were not kept.
        """
        asked = self._asked(which, of, groups)
        return dict(zip(asked, self._values(list(asked.values()), which), strict=True))

    def _asked(self, which: str | None, of: str, groups: Sequence[str] | None) -> dict[str, Asked]:
        if which is not None and which not in (*NORMS, *MEASURES):
            raise ValueError(f"unknown norm {which!r}; known: {', '.join((*NORMS, *MEASURES))}")
        asked: dict[str, Asked] = {}
        for index, group in enumerate(self.param_groups):
            if groups is not None and group.get("group") not in groups:
                continue
            own = self._norm(group)
            operator = own if which is None or which in MEASURES else self._norm(group, which)
            for name, param in zip(parameter_names(group, index), group["params"], strict=True):
                tensor = self._quantity(param, of, group)
                if tensor is not None and operator.fits(tensor):
                    asked[name] = Asked(name, of, param, tensor, operator, split.sizes(group["split"], param, own))
        return asked

    @abc.abstractmethod
    def _values(self, asked: list[Asked], which: str | None) -> list[float]:
        """The norm of each tensor; ``which`` names one of ``MEASURES`` or a norm, None each operator's own."""

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
        own = ("_orthogonalisation", "_light", "_keep_updates", "_momentum_dtype", "_in_grad")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_in_grad" in state:  # a copy; load_state_dict passes only groups and state
            self._in_grad.reattach(self._light_params())


def _numbers(setting: rules.Setting) -> list[float]:
    """A setting, or those of all runs of a cohort."""
    return torch.as_tensor(setting, dtype=torch.float64).flatten().tolist()


def parameter_names(group: dict[str, Any], index: int) -> list[str]:
    return group.get("names") or [f"{index}.{position}" for position in range(len(group["params"]))]
