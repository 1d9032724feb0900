"""Three operations of the model with derivatives written by hand, because autograd's make twice the passes over memory.

Leading dimensions are any; docs/log.md has what each gains.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    return cast(Tensor, _RMSNorm.apply(x, eps))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv:2002.05202)."""
    return cast(Tensor, _SwiGLU.apply(gate, up))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the tokens of the cross entropy in nats: [..., N, V] and [..., N] to [...], in at least fp32."""
    return cast(Tensor, _CrossEntropy.apply(logits.float(), targets))


class _RMSNorm(torch.autograd.Function):
    """With y = x r and r = 1 / rms(x): dx = r (dy - y mean(dy y))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        along = (dy * y).sum(-1, keepdim=True) / y.shape[-1]
        return torch.addcmul(dy, y, along, value=-1).mul_(scale), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        opened = F.silu(gate)
        ctx.save_for_backward(gate, up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, opened = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * opened


class _CrossEntropy(torch.autograd.Function):
    """dlogits = (softmax - one_hot) / N, written over the logarithms of the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(log_p, targets)
        return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).mean(-1)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        log_p, targets = ctx.saved_tensors
        share = (dloss / targets.shape[-1])[..., None, None]
        dlogits = log_p.exp().mul_(share)
        one = share.expand(*targets.shape, 1)
        return dlogits.scatter_add_(-1, targets.unsqueeze(-1), -one), None
