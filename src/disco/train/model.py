"""The proxy model: a Llama-style decoder with a parameter-free RMSNorm on the input of every Linear.

Source: Filatov et al., arXiv:2510.03871, section 2 ("norm-everywhere"). The residual stream is never normalised.
Weights come from ``disco.init_``, not from here; ``Llama.init_scales`` says which of them start smaller. The forms
below were chosen by their speed on one CPU core; docs/log.md has the measurements.

Shape letters: B sequences, T positions, N = B T tokens, D width, H heads (of queries, then keys, then values), K head
size, P = K/2 rotated pairs, V vocabulary. Weights may have one more dimension in front, R runs of a cohort
(``cohort.py``); then so have tokens, activations and losses.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disco.train.config import ModelConfig, Placement
from disco.train.kernels import cross_entropy, rms_norm, swiglu


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, without parameters."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def norm_sites(placement: Placement) -> frozenset[str]:
    """Where a placement puts its norms.

    Sites: ``residual`` is the input of both blocks, ``qk`` queries and keys per head, before RoPE, ``inner`` values per
    head and the inputs of the last projections ``wo`` and ``w2``, ``output`` the input of the output layer.
    """
    everywhere = frozenset({"residual", "qk", "inner", "output"})
    named = {"everywhere": everywhere, "all-but-output": everywhere - {"output"}, "none": frozenset[str]()}
    return named[placement] if placement in named else frozenset(placement.split("+"))


def rotations(context: int, head_size: int, theta: float) -> Tensor:
    """Cosine and sine (T, P, 2) of the RoPE angles t theta^(-2i/K) (Su et al., arXiv:2104.09864)."""
    frequency_P = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle_TP = torch.outer(torch.arange(context, dtype=torch.float64), frequency_P)
    return torch.stack((angle_TP.cos(), angle_TP.sin()), -1).float()


def rotate(x_BTHK: Tensor, rotation_TP2: Tensor) -> Tensor:
    """Turns each pair (2i, 2i+1) of every head by its angle, as one complex product."""
    x_BTHP = torch.view_as_complex(x_BTHK.float().unflatten(-1, (-1, 2)))
    turned_BTHP = x_BTHP * torch.view_as_complex(rotation_TP2.float()).unsqueeze(1)
    return torch.view_as_real(turned_BTHP).flatten(-2).type_as(x_BTHK)


class Linear(nn.Linear):
    """A bias-free Linear whose weight may be one for each run of a cohort, [R, out, in]; then so is the input."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: of [N, in] and [out, in], or for each run of a cohort of [R, N, in] and [R, out, in]."""
    return F.linear(x, weight) if weight.ndim == 2 else torch.bmm(x, weight.mT)


class Embedding(nn.Embedding):
    """A look-up whose table may be one for each run of a cohort, [R, V, D]; the tokens are [N], or [R, N]."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return F.embedding(tokens, self.weight)
        runs, vocab, width = self.weight.shape
        first = torch.arange(0, runs * vocab, vocab, device=tokens.device).unsqueeze(-1)
        return F.embedding(tokens + first, self.weight.view(runs * vocab, width))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads or config.heads, config.head_size
        kv_width = self.kv_heads * config.head_size
        self.wq = Linear(config.width, config.width, bias=False)
        self.wk = Linear(config.width, kv_width, bias=False)
        self.wv = Linear(config.width, kv_width, bias=False)
        self.wo = Linear(config.width, config.width, bias=False)
        sites = norm_sites(config.placement)
        self.qkv_norm = _norm(config, "inner" in sites)
        self.qk_norm = _norm(config, "qk" in sites and "inner" not in sites)
        self.o_norm = _norm(config, "inner" in sites)

    def forward(self, x_ND: Tensor, rotation_TP2: Tensor) -> Tensor:
        qkv_BTHK = self.qkv(x_ND).view(-1, len(rotation_TP2), self.heads + 2 * self.kv_heads, self.head_size)
        qk_BTHK, v_BTHK = self.qkv_norm(qkv_BTHK).split((self.heads + self.kv_heads, self.kv_heads), 2)
        q_BTHK, k_BTHK = rotate(self.qk_norm(qk_BTHK), rotation_TP2).split((self.heads, self.kv_heads), 2)
        o_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2),
            is_causal=True, enable_gqa=self.kv_heads != self.heads,
        )  # fmt: skip
        y_ND: Tensor = self.wo(self.o_norm(o_BHTK.transpose(1, 2).reshape(*x_ND.shape[:-1], -1)))
        return y_ND

    def qkv(self, x_ND: Tensor) -> Tensor:
        """Queries, keys and values of all heads: one product, fewer and larger operations."""
        return product(x_ND, torch.cat((self.wq.weight, self.wk.weight, self.wv.weight), -2))


class FeedForward(nn.Module):
    """SwiGLU: w2 norm(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.width, config.hidden, bias=False)
        self.w2 = Linear(config.hidden, config.width, bias=False)
        self.w3 = Linear(config.width, config.hidden, bias=False)
        self.norm = _norm(config, "inner" in norm_sites(config.placement))

    def forward(self, x_ND: Tensor) -> Tensor:
        y_ND: Tensor = self.w2(self.norm(swiglu(self.w1(x_ND), self.w3(x_ND))))
        return y_ND


class Block(nn.Module):
    """Attention, then feed-forward, each as Y = a X + b f(Norm(X)) (arXiv:2510.03871, depth-transfer schemes)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        residual = "residual" in norm_sites(config.placement)
        self.attention_norm = _norm(config, residual)
        self.ffn_norm = _norm(config, residual)
        part = 1 / (2 * config.depth)
        schemes = {"identity": (1.0, 1.0), "depth-normalised": (1 - part, part), "completep": (1.0, part)}
        self.skip, self.branch = schemes[config.residual]
        self.recompute = False
        """Activation checkpointing: keep only the input, and compute the rest again in the backward pass."""

    def forward(self, x_ND: Tensor, rotation_TP2: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            kept = checkpoint(self._forward, x_ND, rotation_TP2, use_reentrant=False, preserve_rng_state=False)
            return cast(Tensor, kept)
        return self._forward(x_ND, rotation_TP2)

    def _forward(self, x_ND: Tensor, rotation_TP2: Tensor) -> Tensor:
        x_ND = self._add(x_ND, self.attention(self.attention_norm(x_ND), rotation_TP2))
        return self._add(x_ND, self.feed_forward(self.ffn_norm(x_ND)))

    def _add(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        return torch.add(x_ND if self.skip == 1 else self.skip * x_ND, y_ND, alpha=self.branch)


class Llama(nn.Module):
    """Decoder with untied embeddings and no biases; parameter names are those of the published Llama."""

    rotation: Tensor

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = _norm(config, "output" in norm_sites(config.placement))
        self.output = Linear(config.width, vocab, bias=False)
        self.register_buffer(
            "rotation", rotations(config.context, config.head_size, config.rope_theta), persistent=False
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token at each position; T is at most the context."""
        positions = tokens_BT.shape[-1]
        if positions > self.config.context:
            raise ValueError(f"{positions} positions do not fit the model's context of {self.config.context}")
        rotation_TP2 = self.rotation[:positions]
        x_ND = self.tok_embeddings(tokens_BT.flatten(-2))  # two dimensions: a Linear is then one matrix product
        for layer in self.layers:
            x_ND = layer(x_ND, rotation_TP2)
        logits_NV: Tensor = self.output(self.norm(x_ND))
        return logits_NV.unflatten(-2, tokens_BT.shape[-2:])

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats, in fp32."""
        return cross_entropy(self(tokens_BT).flatten(-3, -2), targets_BT.flatten(-2))

    def recompute(self, wanted: bool) -> None:
        """Turns activation checkpointing of the blocks on or off."""
        for layer in self.layers:
            cast(Block, layer).recompute = wanted

    def init_scales(self) -> dict[str, float]:
        """Parameter name -> factor on its initial norm; names not listed have 1.

        The last projection of each block starts at 1/sqrt(2L) ("total") or, in layer l = 1..L, 1/sqrt(2l) ("relative").
        """
        depth, scheme = self.config.depth, self.config.depth_init
        scales = {}
        for index in range(depth if scheme != "identity" else 0):
            scale = 1 / math.sqrt(2 * (depth if scheme == "total" else index + 1))
            scales[f"layers.{index}.attention.wo.weight"] = scale
            scales[f"layers.{index}.feed_forward.w2.weight"] = scale
        return scales


def _norm(config: ModelConfig, wanted: bool) -> nn.Module:
    return RMSNorm(config.norm_eps) if wanted else nn.Identity()
