"""What param_groups decides, for the module types people have, and what init_ leaves."""

from typing import Any

import pytest
import torch
from torch import nn

from disco import Scion, init_, norm, param_groups
from disco.groups import ParamGroups, clean_name


class Conv1D(nn.Module):
    """Stores its weight in x out, as the Conv1D of GPT-2 does."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d_in, d_out)), nn.Parameter(torch.ones(d_out))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(3, 8, 4))


class GptOssExperts(nn.Module):
    """As in transformers: 3 experts with weights [expert, in, out] and one bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.gate_up_proj_bias = nn.Parameter(torch.ones(3, 4, 8)), nn.Parameter(torch.ones(3, 8))
        self.down_proj, self.down_proj_bias = nn.Parameter(torch.ones(3, 4, 4)), nn.Parameter(torch.ones(3, 4))


class Toy(nn.Module):
    def __init__(self, tied: bool = False, head: str = "unknown") -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = Conv1D(6, 4)
        self.up = nn.Linear(4, 11, bias=False)  # as wide as the vocabulary, but not the output if a name says so
        self.experts = Experts()
        self.add_module(head, nn.Linear(4, 11, bias=False))
        if tied:
            self.get_submodule(head).weight = self.embed.weight


def decided(groups: ParamGroups) -> dict[str, tuple[str, str, str, int]]:
    return {d.name: (d.group, d.norm, d.layout, d.batch_dims) for d in groups.decisions}


def test_decisions_by_module_type() -> None:
    groups = param_groups(Toy(head="lm_head"), lr=0.5, ratios={"hidden": 1 / 8})
    assert decided(groups) == {
        "embed.weight": ("input", "one_to_rms", "in_out", 0),
        "norm.weight": ("vector", "rms", "out_in", 0),
        "norm.bias": ("vector", "rms", "out_in", 0),
        "mix.weight": ("hidden", "rms_to_rms", "in_out", 0),
        "mix.bias": ("vector", "rms", "out_in", 0),
        "up.weight": ("hidden", "rms_to_rms", "out_in", 0),
        "experts.up": ("hidden", "rms_to_rms", "out_in", 1),
        "lm_head.weight": ("output", "rms_to_inf", "out_in", 0),
    }
    assert {g["group"]: g["lr"] for g in groups} == {"input": 0.5, "vector": 0.5, "hidden": 0.0625, "output": 0.5}
    assert groups.layers()["hidden"] == ["mix", "up", "experts.up"]


def test_output_by_shape_when_no_name_tells() -> None:
    assert decided(param_groups(Toy()))["unknown.weight"][0] == "output"
    assert decided(param_groups(Toy()))["up.weight"][0] == "hidden"


def output_of(**modules: nn.Module) -> str | None:
    """Name of the output parameter of a model with these modules."""
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return next((d.name for d in param_groups(model).decisions if d.group == "output"), None)


def test_rows_of_a_positional_embedding_are_no_vocabulary() -> None:
    for name in ("wpe", "embed_positions", "pos_emb", "position_embeddings"):
        tokens, positions, wide = nn.Embedding(100, 4), nn.Embedding(16, 4), nn.Linear(4, 16)
        assert output_of(wte=tokens, **{name: positions}, up=wide) is None
        assert output_of(wte=nn.Embedding(10, 4), **{name: positions}, up=wide, out=nn.Linear(4, 10)) == "out.weight"
    assert output_of(wpe=nn.Embedding(16, 4), up=nn.Linear(4, 8), classes=nn.Linear(8, 10)) == "classes.weight"
    assert output_of(tokens=nn.Embedding(100, 4), types=nn.Embedding(2, 4), gate=nn.Linear(4, 2, bias=False)) is None


def test_a_name_alone_does_not_make_an_output() -> None:
    attn = nn.ModuleDict({"output": nn.Linear(4, 4)})
    assert output_of(wte=nn.Embedding(11, 4), to_tokens=nn.Linear(4, 11), attn=attn) == "to_tokens.weight"
    assert output_of(wte=nn.Embedding(11, 4), attn=attn) is None
    assert output_of(attn=attn, last=nn.Linear(4, 3)) == "last.weight"
    assert output_of(head=nn.Linear(4, 3), attn=attn) == "head.weight"
    assert output_of(wte=nn.Embedding(11, 4), lm_head=nn.Linear(4, 16), attn=attn) == "lm_head.weight"  # padded


def test_experts_of_gpt_oss() -> None:
    model = GptOssExperts()
    assert decided(param_groups(model)) == {
        "gate_up_proj": ("hidden", "rms_to_rms", "in_out", 1),
        "gate_up_proj_bias": ("vector", "rms", "out_in", 1),
        "down_proj": ("hidden", "rms_to_rms", "in_out", 1),
        "down_proj_bias": ("vector", "rms", "out_in", 1),
    }
    init_(model)
    assert model.gate_up_proj_bias.abs().max() == 0
    assert model.down_proj_bias.abs().max() == 0
    values = norm("rms_to_rms", layout="in_out", batch_dims=1).value(model.gate_up_proj.detach(), exact=True)
    torch.testing.assert_close(values, torch.ones(3))


def test_biases_of_an_lstm_start_at_zero() -> None:
    model = init_(nn.LSTM(4, 6))
    assert all((p.abs().max() == 0) == ("bias" in name) for name, p in model.named_parameters())


def test_tied_embedding_belongs_to_the_output_with_a_notice() -> None:
    groups = param_groups(Toy(tied=True, head="lm_head"))
    assert decided(groups)["embed.weight"] == ("output", "rms_to_inf", "out_in", 0)
    assert "lm_head.weight" not in decided(groups)
    assert "tied to the input embedding" in groups.describe()


def test_convolutions_and_a_classifier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(16, 10))
    got = decided(param_groups(model))
    assert got["0.weight"] == ("hidden", "conv", "out_in", 0)
    assert got["1.weight"] == ("hidden", "conv", "in_out", 0)
    assert got["3.weight"] == ("output", "rms_to_inf", "out_in", 0)


def test_overrides_win_and_say_so() -> None:
    groups = param_groups(
        Toy(head="lm_head"),
        lr=1.0,
        overrides={"up.*": {"group": "output", "norm": "one_to_inf", "ratio": 0.25, "momentum": 0.5}},
    )
    up = next(g for g in groups if "up.weight" in g["names"])
    assert (up["group"], up["norm"], up["lr"], up["momentum"]) == ("output", "one_to_inf", 0.25, 0.5)
    line = next(line for line in groups.describe().splitlines() if line.startswith("up.weight"))
    assert line.split()[1:4] == ["output", "one_to_inf", "out_in"]
    assert "override 'up.*'" in line


def test_another_group_brings_its_norm() -> None:
    overrides = {"up.weight": {"group": "output"}, "unknown.*": {"group": "hidden"}, "embed.*": {"group": "input"}}
    got = decided(param_groups(Toy(), overrides=overrides))
    assert got["up.weight"][:2] == ("output", "rms_to_inf")
    assert got["unknown.weight"][:2] == ("hidden", "rms_to_rms")
    assert got["embed.weight"][:2] == ("input", "one_to_rms")
    assert decided(param_groups(Toy(), overrides={"up.*": {"group": "input"}}))["up.weight"][1] == "one_to_rms"
    convolution = param_groups(nn.Conv2d(3, 8, 3), overrides={"weight": {"group": "hidden"}})
    assert decided(convolution)["weight"][:2] == ("hidden", "conv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": {"body": 1.0}}, "unknown layer group 'body'"),
        ({"ratios": {"hidden": -1.0}}, "the ratio of hidden must be 0 or more, got -1.0"),
        ({"lr": float("nan")}, "lr must be 0 or more, got nan"),
        ({"overrides": {"nothing.*": {"norm": "rms"}}}, "'nothing.\\*' matches no parameter"),
        ({"overrides": {"up.weight": {"norm": "rms"}}}, "parameter up.weight: norm rms is for a vector"),
        ({"overrides": {"up.weight": {"group": "middle"}}}, "unknown layer group 'middle'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(Toy(), **arguments)


def test_frozen_parameters_are_left_out_and_an_empty_model_is_an_error() -> None:
    model = nn.Linear(3, 3, bias=False)
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no trainable parameters"):
        param_groups(model)


def test_wrapper_prefixes_are_stripped() -> None:
    assert clean_name("module._orig_mod.layers.0._checkpoint_wrapped_module.wq.weight") == "layers.0.wq.weight"
    assert clean_name("_orig_mod.module.wq.weight") == "wq.weight"
    assert clean_name("my_module.submodule.weight") == "my_module.submodule.weight"
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 3)))
    assert [d.name for d in param_groups(compiled).decisions] == ["0.weight", "0.bias"]


def test_init_gives_norm_one_and_scaled_exceptions() -> None:
    model = Toy(head="lm_head")
    init_(model, {"up.weight": 0.5}, generator=torch.Generator().manual_seed(0))
    for d in param_groups(model).decisions:
        values = norm(d.norm, layout=d.layout, batch_dims=d.batch_dims).value(d.param, exact=True)
        expected = 0.0 if d.name.endswith("bias") else 0.5 if d.name == "up.weight" else 1.0
        torch.testing.assert_close(values, torch.full_like(values, expected), rtol=1e-5, atol=0)
    again = init_(Toy(head="lm_head"), {"up.weight": 0.5}, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"does not have: down\.weight"):
        init_(model, {"down.weight": 0.5})


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.attention = nn.MultiheadAttention(8, 2)
        self.c_attn = Conv1D(24, 8)
        self.cross = nn.Module()
        self.cross.c_attn = Conv1D(18, 9)  # keys and values only
        self.gate_up_proj = nn.Linear(8, 20, bias=False)
        self.qkv_proj = nn.Linear(8, 16, bias=False)


def test_fused_weights_are_split_where_known_and_where_told() -> None:
    groups = param_groups(Fused(), overrides={"qkv_proj.weight": {"split": (8, 4, 4)}})
    split = {name: group.get("split", ()) for group in groups for name in group["names"] if group["group"] == "hidden"}
    assert split == {
        "attention.in_proj_weight": 3,
        "attention.out_proj.weight": (),
        "c_attn.weight": 3,
        "cross.c_attn.weight": (),
        "gate_up_proj.weight": 2,
        "qkv_proj.weight": (8, 4, 4),
    }
    assert "Conv1D, stored in x out; 3 matrices in one" in groups.describe()


def test_each_part_of_a_fused_weight_starts_with_norm_1() -> None:
    model = Fused()
    init_(model, groups=param_groups(model, overrides={"qkv_proj.weight": {"split": (8, 4, 4)}}))
    for part in (*model.qkv_proj.weight.split((8, 4, 4)), *model.attention.in_proj_weight.chunk(3)):
        assert norm("rms_to_rms").value(part).item() == pytest.approx(1.0, rel=1e-5)
    for part in model.c_attn.weight.chunk(3, 1):
        assert norm("rms_to_rms", layout="in_out").value(part).item() == pytest.approx(1.0, rel=1e-5)


def test_a_fused_weight_of_another_norm_is_not_split() -> None:
    groups = param_groups(Fused(), overrides={"c_attn.weight": {"group": "output"}})
    assert [group.get("split") for group in groups if "c_attn.weight" in group["names"]] == [None]


def test_an_attention_block_has_no_output_layer() -> None:
    groups = param_groups(nn.TransformerEncoderLayer(8, 2, 16))
    assert decided(groups)["self_attn.out_proj.weight"][0] == "hidden"
    assert decided(groups)["linear2.weight"][0] == "output"


def test_an_optimizer_refuses_a_model() -> None:
    with pytest.raises(ValueError, match=r"takes parameter groups, got a Toy; pass disco.param_groups\(model\)"):
        Scion(Toy())


def test_a_stage_of_a_pipeline_has_no_output_layer() -> None:
    stage = nn.Module()
    stage.up, stage.lm_head = nn.Linear(4, 4), nn.Linear(4, 11)
    assert decided(param_groups(stage))["lm_head.weight"][0] == "output"
    stage.lm_head = None
    assert decided(param_groups(stage))["up.weight"][0] == "hidden"
