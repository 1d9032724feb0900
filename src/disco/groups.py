"""From a module tree to layer groups: which norm, storage and learning rate each parameter gets, and why.

A layer group (input, hidden, output, vector) names a norm and a ratio to the base learning rate. The decision reads
module types, shapes and, where those do not tell, names; ``describe()`` prints it, ``overrides`` change it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from disco import split
from disco.norms import norm

GROUP_NORMS = {"input": "one_to_rms", "hidden": "rms_to_rms", "output": "rms_to_inf", "vector": "rms"}
"""Layer group -> its norm, unless the kind of module (a convolution) or an override says otherwise."""

GROUPS = tuple(GROUP_NORMS)
OUTPUT_NAMES = ("output", "lm_head", "unembed", "unembedding", "embed_out", "head", "classifier")
"""Last part of the names that output layers commonly have."""

IN_OUT_EXPERTS = ("Llama4TextExperts", "GptOssExperts")
"""Modules of transformers whose 3-D expert weights are stored [expert, in, out], besides those that say so themselves
(``is_transposed``); all others are taken as out_in."""

FUSED = {
    ("MultiheadAttention", "in_proj_weight"): 3,
    ("Conv1D", "c_attn"): 3,
    ("Linear", "gate_up_proj"): 2,
    ("Llama4TextExperts", "gate_up_proj"): 2,
}
"""(kind of module, its name or the parameter's) -> equal parts of the outputs: queries, keys, values; gate, up. The
experts of transformers say themselves whether gate and up lie one after the other (``is_concatenated``)."""

_POSITIONS = re.compile(r"(^|[._])(pos|wpe)")
"""In the name of an embedding: its rows are positions, not a vocabulary."""

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")


@dataclass(frozen=True)
class Decision:
    """What was decided for one parameter, and why."""

    name: str
    param: Tensor
    group: str
    norm: str
    layout: str = "out_in"
    batch_dims: int = 0
    reason: str = ""
    ratio: float | None = None
    options: tuple[tuple[str, Any], ...] = ()


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for ``Scion`` or ``Disco``, with the decisions behind them."""

    def __init__(self, groups: list[dict[str, Any]], decisions: list[Decision]) -> None:
        super().__init__(groups)
        self.decisions = decisions

    def layers(self) -> dict[str, list[str]]:
        """Layer group -> its layers: parameter names without a final ".weight"."""
        result: dict[str, list[str]] = {group: [] for group in GROUPS}
        for decision in self.decisions:
            result.setdefault(decision.group, []).append(layer_name(decision.name))
        return result

    def describe(self) -> str:
        """A table of every parameter: group, norm, storage, shape, learning rate, and why."""
        rates = {id(param): group["lr"] for group in self for param in group["params"]}
        rows = [("parameter", "group", "norm", "layout", "shape", "lr", "why")]
        for d in self.decisions:
            shape = "x".join(map(str, d.param.shape)) or "scalar"
            rows.append((d.name, d.group, d.norm, d.layout, shape, f"{float(rates[id(d.param)]):.4g}", d.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def param_groups(
    model: nn.Module,
    lr: float = 2**-5,
    ratios: Mapping[str, float] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParamGroups:
    """Parameter groups of a model for norm-based optimizers.

    Embeddings are input (one_to_rms, stored in_out); the layer to the vocabulary is output (rms_to_inf); other matrices
    are hidden (rms_to_rms; convolutions conv; 3-D experts a batch of matrices); biases and gains are vector (rms). An
    embedding tied to the output layer belongs to the output. Weights of 3 or more dimensions in modules not known here
    (``IN_OUT_EXPERTS``) are taken as [batch..., out, in]; ``{"layout": "in_out"}`` in ``overrides`` changes that.

    Args:
        model: any module; frozen parameters are left out.
        lr: base learning rate, the step size in each layer's norm.
        ratios: learning rate of a group over ``lr``, for instance ``{"hidden": 1 / 8}``.
        overrides: shell-style pattern of parameter names -> any of ``group``, ``norm``, ``layout``, ``batch_dims``,
            ``ratio``, or optimizer settings such as ``rule``, ``momentum``, ``weight_decay``, ``scale``, ``split``
            (sizes or number of parts of a fused weight; ``FUSED`` has the known ones). Another ``group`` without a
            ``norm`` brings that group's norm. Later patterns win.

    Raises:
        ValueError: a negative rate or ratio, unknown layer group or norm, a pattern that matches nothing, a parameter
            that does not fit its norm, or a model without trainable parameters.
    """
    ratios = dict(ratios or {})
    if not lr >= 0:
        raise ValueError(f"lr must be 0 or more, got {lr}")
    for group, ratio in ratios.items():
        if group not in GROUPS:
            raise ValueError(f"unknown layer group {group!r} in ratios; known: {', '.join(GROUPS)}")
        if not ratio >= 0:
            raise ValueError(f"the ratio of {group} must be 0 or more, got {ratio}")
    decisions = [_override(decision, overrides or {}) for decision in _decide(model)]
    if not decisions:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    for pattern in overrides or {}:
        if not any(fnmatch.fnmatchcase(d.name, pattern) for d in decisions):
            raise ValueError(f"override {pattern!r} matches no parameter; the first is {decisions[0].name!r}")

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for d in decisions:
        try:
            norm(d.norm, layout=d.layout, batch_dims=d.batch_dims).check(d.param)
        except ValueError as error:
            raise ValueError(f"parameter {d.name}: {error}") from None
        ratio = d.ratio if d.ratio is not None else ratios.get(d.group, 1.0)
        key = (d.group, d.norm, d.layout, d.batch_dims, ratio, repr(d.options))
        if key not in groups:
            groups[key] = {
                "params": [], "names": [], "group": d.group, "norm": d.norm, "layout": d.layout,
                "batch_dims": d.batch_dims, "lr": lr * ratio, **dict(d.options),
            }  # fmt: skip
        groups[key]["params"].append(d.param)
        groups[key]["names"].append(d.name)
    return ParamGroups(list(groups.values()), decisions)


def init_(
    model: nn.Module,
    scales: Mapping[str, float] | None = None,
    *,
    groups: ParamGroups | None = None,
    generator: Generator | None = None,
) -> nn.Module:
    """Fills every trainable parameter in place with weights of norm 1; biases become 0, gains 1.

    Args:
        model: the module.
        scales: parameter name -> its initial norm where that is not 1, for instance 1/sqrt(2L) for last projections.
        groups: decisions to follow; None makes them with ``param_groups(model)``.
        generator: source of randomness, drawn from in the order of the parameters.

    Raises:
        ValueError: ``scales`` names a parameter that is not there.
    """
    decisions = (groups or param_groups(model)).decisions
    scales = dict(scales or {})
    unknown = set(scales) - {d.name for d in decisions}
    if unknown:
        raise ValueError(f"scales names parameters that the model does not have: {', '.join(sorted(unknown))}")
    for d in decisions:
        if d.group == "vector" and "bias" in d.name.rpartition(".")[2]:
            with torch.no_grad():
                d.param.zero_()
        else:
            operator = norm(d.norm, layout=d.layout, batch_dims=d.batch_dims)
            for part in split.parts(d.param.detach(), dict(d.options).get("split", ()), operator):
                operator.init_(part, scale=scales.get(d.name, 1.0), generator=generator)
    return model


def layer_name(parameter: str) -> str:
    """A layer's name: the parameter's without a final ".weight"."""
    return parameter.removesuffix(".weight")


def clean_name(parameter: str) -> str:
    """The parameter's name without the prefixes of torch.compile, checkpointing, FSDP and DDP wrappers."""
    return _WRAPPERS.sub("", parameter).lstrip(".").removeprefix("module.")


def _override(decision: Decision, overrides: Mapping[str, Mapping[str, Any]]) -> Decision:
    for pattern, settings in overrides.items():
        if fnmatch.fnmatchcase(decision.name, pattern):
            own = {k: v for k, v in settings.items() if k in ("group", "norm", "layout", "batch_dims", "ratio")}
            if own.get("group", GROUPS[0]) not in GROUPS:
                raise ValueError(f"unknown layer group {own['group']!r} in override {pattern!r}")
            if own.get("group", decision.group) != decision.group:
                own.setdefault("norm", GROUP_NORMS[own["group"]])
            options = dict(decision.options) | {k: v for k, v in settings.items() if k not in own}
            if own.get("norm", "rms_to_rms") != "rms_to_rms" and "split" not in settings:
                options.pop("split", None)
            decision = replace(
                decision, **own, options=tuple(options.items()), reason=f"override {pattern!r}"
            )  # fmt: skip
    return decision


def _decide(model: nn.Module) -> Iterator[Decision]:
    """One decision for each trainable parameter, in the order of the modules; a shared parameter once."""
    output, reason = _output_weight(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for short, param in module.named_parameters(recurse=False):
            if id(param) in seen or not param.requires_grad:
                continue
            seen.add(id(param))
            name = clean_name(f"{prefix}.{short}" if prefix else short)
            if output is not None and param is output:
                tied = id(param) in embeddings
                why = "tied to the input embedding; belongs to the output" if tied else reason
                yield Decision(name, param, "output", "rms_to_inf", reason=why)
            else:
                yield _fused(_decide_one(name, short, param, module), module)


def _decide_one(name: str, short: str, param: Tensor, module: nn.Module) -> Decision:
    kind = type(module).__name__
    if param.ndim <= 1:
        return Decision(name, param, "vector", "rms", reason=f"vector of {kind}")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Decision(name, param, "input", "one_to_rms", layout="in_out", reason=f"{kind}, stored V x d")
    if isinstance(module, nn.modules.conv._ConvNd):
        layout = "in_out" if module.transposed else "out_in"
        return Decision(name, param, "hidden", "conv", layout=layout, reason=kind)
    if param.ndim == 2:
        if "bias" in short and any(other.ndim > 2 for other in module.parameters(recurse=False)):
            return Decision(name, param, "vector", "rms", batch_dims=1, reason=f"{kind}: one bias for each expert")
        if kind == "Conv1D":
            return Decision(name, param, "hidden", "rms_to_rms", layout="in_out", reason="Conv1D, stored in x out")
        why = kind if isinstance(module, nn.Linear) else f"matrix {short!r} of {kind}, taken as out x in"
        return Decision(name, param, "hidden", "rms_to_rms", reason=why)
    layout = "in_out" if kind in IN_OUT_EXPERTS or getattr(module, "is_transposed", False) else "out_in"
    why = f"{kind}: a batch of matrices, taken as {layout.replace('_', ' x ')}"
    return Decision(name, param, "hidden", "rms_to_rms", layout=layout, batch_dims=param.ndim - 2, reason=why)


def _fused(decision: Decision, module: nn.Module) -> Decision:
    """The decision, with the number of parts where several matrices share the parameter."""
    short = layer_name(decision.name).rpartition(".")[2]
    count = FUSED.get((type(module).__name__, short))
    if short == "gate_up_proj" and getattr(module, "is_concatenated", False):
        count = 2
    if count is None or decision.param.ndim < 2:
        return decision
    matrix = decision.param.shape[-2:]
    into, out = matrix if decision.layout == "in_out" else reversed(matrix)
    if out % count or (count == 3 and out != 3 * into):  # GPT-2's cross-attention has keys and values only
        return decision
    return replace(decision, options=(("split", count),), reason=f"{decision.reason}; {count} matrices in one")


def _output_weight(model: nn.Module) -> tuple[Tensor | None, str]:
    """Weight of the layer to the vocabulary, and how it was found."""
    if any(getattr(model, name, model) is None for name in OUTPUT_NAMES):
        return None, ""  # a stage of a pipeline, whose head is elsewhere
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    if isinstance(found, nn.Module) and isinstance(found.weight, Tensor):
        return found.weight, "get_output_embeddings() of the model"
    modules = [(clean_name(name), m) for name, m in model.named_modules()]
    attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    linears = [(name, m) for name, m in modules if isinstance(m, nn.Linear) and id(m) not in attention]
    embeddings = [(name, m) for name, m in modules if isinstance(m, nn.Embedding)]
    for _, module in linears:
        if any(module.weight is embedding.weight for _, embedding in embeddings):
            return module.weight, "tied"
    vocabularies = [m.num_embeddings for name, m in embeddings if not _POSITIONS.search(name)]
    named = [(name, m) for name, m in reversed(linears) if name.rpartition(".")[2] in OUTPUT_NAMES]
    for name, module in named:
        if module.out_features in vocabularies:
            return module.weight, f"Linear named {name.rpartition('.')[2]!r} to a vocabulary"
    for _, module in reversed(linears):
        if vocabularies and module.out_features == max(vocabularies):
            return module.weight, f"Linear to {module.out_features} entries, as the largest embedding has"
    for name, module in named:
        if "." not in name:
            return module.weight, f"Linear of the model named {name!r}"
    if linears and not vocabularies:
        return linears[-1][1].weight, "the last Linear of a model without token embeddings"
    return None, ""
