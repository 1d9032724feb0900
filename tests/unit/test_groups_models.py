"""What param_groups decides for models of transformers, against what their forward pass does with each parameter."""

from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from disco import Disco, Scion, init_, norm, param_groups

SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 24,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 6}),
    "gpt2": ("GPT2", {"vocab_size": 31, "n_embd": 16, "n_inner": 20, "n_layer": 2, "n_head": 4, "n_positions": 24}),
    "mixtral": ("Mixtral", SIZES | EXPERTS | {"num_local_experts": 3}),
    "qwen3 moe": ("Qwen3Moe", SIZES | EXPERTS | {"num_experts": 3, "moe_intermediate_size": 10, "head_dim": 6}),
}


def model_of(name: str) -> nn.Module:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model: nn.Module = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**sizes))
    return model


class Uses(TorchFunctionMode):
    """Notes what a forward pass does with each parameter, by the storage that it finds in the arguments of functions.

    ``how``: parameter -> "rows" (looked up), "x W^T" (inputs along the last axis), "x W" (along the one before it).
    ``parts``: parameter -> equal parts that the result is cut into along its last axis.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self.how: dict[str, set[str]] = defaultdict(set)
        self.parts: dict[str, int] = {}
        self.results: dict[int, str] = {}
        self.keep: list[Any] = []

    def name(self, value: Any) -> str | None:
        return self.names.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        called = getattr(func, "__name__", "")
        if called == "embedding":
            self.note(args[0] if self.name(args[0]) else args[1], "rows", result)
        elif called == "linear":
            self.note(args[1], "x W^T", result)
        elif called == "addmm":
            self.note(args[2], "x W", result)
        elif called in ("matmul", "__matmul__", "bmm", "mm"):
            self.note(args[1], "x W", result)
        elif called in ("split", "chunk"):
            owner = self.results.get(args[0].untyped_storage().data_ptr())
            if owner is not None and len({part.shape for part in result}) == 1:
                self.parts[owner] = len(result)
        return result

    def note(self, weight: Tensor, how: str, result: Tensor) -> None:
        name = self.name(weight)
        if name is not None:
            self.how[name].add(how)
            self.results[result.untyped_storage().data_ptr()] = name
            self.keep.append(result)  # or its storage would be used again


def expected(model: nn.Module) -> dict[str, tuple[str, str, str, int, Any]]:
    """Group, norm, layout, batch dimensions and split of each parameter, by the forward pass."""
    with Uses(model) as uses, torch.no_grad():
        logits = model(input_ids=torch.arange(48).view(2, 24) % 31, use_cache=False).logits
    head = uses.results[logits.untyped_storage().data_ptr()]
    result: dict[str, tuple[str, str, str, int, Any]] = {}
    for name, param in model.named_parameters():
        how = uses.how.get(name, set())
        if name == head:
            assert "x W^T" in how
            result[name] = ("output", "rms_to_inf", "out_in", 0, ())
        elif how == {"rows"}:
            result[name] = ("input", "one_to_rms", "in_out", 0, ())
        elif how:
            (way,) = how
            layout = "out_in" if way == "x W^T" else "in_out"
            result[name] = ("hidden", "rms_to_rms", layout, param.ndim - 2, uses.parts.get(name, ()))
        else:
            assert param.ndim == 1
            result[name] = ("vector", "rms", "out_in", 0, ())
    return result


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_what_the_forward_pass_takes_it_for(name: str) -> None:
    model = model_of(name)
    groups = param_groups(model)
    found = {
        d.name: (d.group, d.norm, d.layout, d.batch_dims, dict(d.options).get("split", ())) for d in groups.decisions
    }
    assert found == expected(model)
    rows = groups.describe().splitlines()[1:]
    assert [row.split()[:4] for row in rows] == [[name, *decided[:3]] for name, decided in found.items()]


def test_what_the_models_are() -> None:
    """That the oracle sees what it should: these are facts of the models, by hand."""
    mixtral, gpt2, qwen2 = (expected(model_of(name)) for name in ("mixtral", "gpt2", "qwen2"))
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"] == ("hidden", "rms_to_rms", "out_in", 1, 2)
    assert mixtral["model.layers.1.mlp.experts.down_proj"] == ("hidden", "rms_to_rms", "out_in", 1, ())
    assert mixtral["model.layers.1.mlp.gate.weight"] == ("hidden", "rms_to_rms", "out_in", 0, ())
    assert gpt2["transformer.wte.weight"] == ("output", "rms_to_inf", "out_in", 0, ())
    assert gpt2["transformer.wpe.weight"] == ("input", "one_to_rms", "in_out", 0, ())
    assert gpt2["transformer.h.1.attn.c_attn.weight"] == ("hidden", "rms_to_rms", "in_out", 0, 3)
    assert gpt2["transformer.h.1.mlp.c_proj.weight"] == ("hidden", "rms_to_rms", "in_out", 0, ())
    assert qwen2["model.layers.0.self_attn.q_proj.bias"][0] == "vector"
    assert qwen2["lm_head.weight"][0] == "output"
    assert qwen2["model.embed_tokens.weight"][0] == "input"


def test_reasons_are_told() -> None:
    text = param_groups(model_of("gpt2")).describe()
    assert "tied to the input embedding; belongs to the output" in text
    assert "Conv1D, stored in x out; 3 matrices in one" in text
    assert "get_output_embeddings() of the model" in param_groups(model_of("llama")).describe()
    mixtral = param_groups(model_of("mixtral")).describe()
    assert "MixtralExperts: a batch of matrices, taken as out x in; 2 matrices in one" in mixtral
    assert "matrix 'weight' of MixtralTopKRouter, taken as out x in" in mixtral


def test_gate_and_up_of_every_expert_are_matrices_of_their_own() -> None:
    """One step of both optimizers is the LMO of each expert's gate and of its up."""
    for optimizer_class in (Scion, Disco):
        model = init_(model_of("mixtral"))
        experts = model.get_submodule("model.layers.0.mlp.experts")
        weight = experts.get_parameter("gate_up_proj")
        for part in weight.detach().chunk(2, 1):
            values = norm("rms_to_rms", batch_dims=1).value(part)
            torch.testing.assert_close(values, torch.ones(3), rtol=1e-5, atol=0)
        before = weight.detach().clone()
        optimizer = optimizer_class(param_groups(model, lr=0.5), orthogonalize="svd")
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        for part, gradient in zip((before - weight.detach()).chunk(2, 1), weight.grad.chunk(2, 1), strict=True):
            u, _, v = torch.linalg.svd(gradient, full_matrices=False)
            torch.testing.assert_close(part, 0.5 * (20 / 16) ** 0.5 * u @ v, rtol=1e-4, atol=1e-5)
