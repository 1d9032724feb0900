"""Update rules: pure functions from (gradient, state, hyper-parameters) to a direction, and the one step they share,

    W <- (1 - lr weight_decay) W - lr scale direction.

Directions: the LMO of ``average`` (``OperatorNorm.lmo``; Scion, Muon) and ``adamw``. A setting (learning rate,
momentum, weight decay, betas) may be a number, or a tensor that runs over the leading (batch) dimensions of the
parameter: one for each run of a cohort.
``momentum`` is the weight that stays on the OLD buffer: M <- momentum M + (1 - momentum) G; 0 is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from disco.norms import OperatorNorm

Rule = Literal["lmo", "adamw"]
State = dict[str, Tensor]
Setting = float | Tensor

SIZE_FACTORS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda d_out, d_in: math.sqrt(d_out / d_in),  # Scion; Bernstein & Newhouse 2024
    "max_spectral": lambda d_out, d_in: math.sqrt(max(1.0, d_out / d_in)),  # Muon, Jordan et al. 2024
    "match_adamw_rms": lambda d_out, d_in: 0.2 * math.sqrt(max(d_out, d_in)),  # Moonlight, arXiv:2502.16982
    "unit": lambda d_out, d_in: 1.0,
}
"""Named sizes of an orthogonalised update, which replace the factor sqrt(d_out / d_in) of the norm rms_to_rms."""


def lmo_state(param: Tensor, *, momentum: Setting, dtype: torch.dtype | None = None) -> State:
    """What ``average`` remembers of one parameter: nothing without momentum."""
    return {"momentum": torch.zeros_like(param, dtype=dtype)} if has_buffer(momentum) else {}


def has_buffer(momentum: Setting) -> bool:
    """Whether a momentum is kept: it is not 0, or there is one for each run."""
    return isinstance(momentum, Tensor) or momentum != 0


def average(gradient: Tensor, state: State, *, momentum: Setting, nesterov: bool = False) -> Tensor:
    """What the LMO is taken of: the momentum buffer, which is updated in place, or without momentum the gradient.

    Nesterov: momentum M + (1 - momentum) G with the updated M. A momentum that was 0 before starts from a zero buffer.
    """
    if not has_buffer(momentum):
        return gradient
    if "momentum" not in state:
        state |= lmo_state(gradient, momentum=momentum)
    buffer = state["momentum"]
    new, share = gradient.to(buffer.dtype), 1 - broadcast(momentum, buffer)
    buffer.lerp_(new, share)
    return buffer.lerp(new, share) if nesterov else buffer


def adamw_state(param: Tensor) -> State:
    """First and second moment of one parameter, and the number of steps taken."""
    return {
        "first": torch.zeros_like(param),
        "second": torch.zeros_like(param),
        "step": torch.zeros((), device=param.device),
    }


def adamw(gradient: Tensor, state: State, *, betas: tuple[Setting, Setting], eps: float) -> Tensor:
    """Adam's bias-corrected direction (Kingma & Ba, arXiv:1412.6980; decay is decoupled, arXiv:1711.05101)."""
    beta1, beta2 = (broadcast(beta, gradient) for beta in betas)
    step = state["step"].add_(1)
    first = state["first"].lerp_(gradient, 1 - beta1)
    second = state["second"].lerp_(gradient.square(), 1 - beta2)
    return (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)


def adamw_each(gradients: list[Tensor], states: list[State], *, betas: tuple[float, float], eps: float) -> list[Tensor]:
    """``adamw`` of each, by foreach operations: few kernels for many small parameters."""
    beta1, beta2 = betas
    first, second, steps = ([state[key] for state in states] for key in ("first", "second", "step"))
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    roots = torch._foreach_div(second, [1 - beta2**step for step in steps])
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, eps)
    directions = torch._foreach_div(first, [1 - beta1**step for step in steps])
    torch._foreach_div_(directions, roots)
    return list(directions)


def apply_(param: Tensor, direction: Tensor, *, lr: Setting, weight_decay: Setting, scale: float) -> None:
    """W <- (1 - lr weight_decay) W - lr scale direction, in place."""
    rate, decay = broadcast(lr, param), broadcast(weight_decay, param)
    if isinstance(decay, Tensor) or decay:
        param.mul_(1 - rate * decay)
    if isinstance(rate, Tensor):
        param.sub_(direction * (rate * scale))
    else:
        param.add_(direction.to(param.dtype), alpha=-rate * scale)


def broadcast(setting: Setting, param: Tensor) -> Setting:
    """The setting in a form that multiplies ``param``, over whose leading dimensions a tensor runs."""
    if not isinstance(setting, Tensor):
        return setting
    return setting.to(param).reshape(setting.shape + (1,) * (param.ndim - setting.ndim))


def scale_factor(scale: float | str, norm: OperatorNorm, shape: torch.Size) -> float:
    """Multiplier of the LMO: ``scale`` itself, or the one that turns the norm's size factor into a named one.

    Raises:
        ValueError: unknown name, or a name with a norm other than rms_to_rms.
    """
    if not isinstance(scale, str):
        return float(scale)
    if scale not in SIZE_FACTORS or norm.name != "rms_to_rms":
        raise ValueError(
            f"scale must be a number or, for the norm rms_to_rms, one of {', '.join(SIZE_FACTORS)}; "
            f"got {scale!r} with the norm {norm.name}"
        )
    d_out, d_in = shape[-2:] if norm.layout == "out_in" else shape[-2:][::-1]
    return SIZE_FACTORS[scale](d_out, d_in) / SIZE_FACTORS["spectral"](d_out, d_in)
