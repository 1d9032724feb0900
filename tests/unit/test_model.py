"""The model against a second, naive writing of it, and what must hold whatever the weights."""

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disco.train import kernels
from disco.train.config import ModelConfig, Placement
from disco.train.model import Llama, RMSNorm, norm_sites, rotate, rotations

SMALL: dict[str, Any] = {"width": 16, "depth": 2, "head_size": 4, "context": 8}
VOCAB = 11
PLACEMENTS = get_args(Placement)
RESIDUALS = ("identity", "depth-normalised", "completep")


def build(seed: int = 0, vocab: int = VOCAB, **changes: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(ModelConfig(**(SMALL | changes)), vocab)


def draw(*shape: int, seed: int = 1, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def naive(model: Llama, tokens: Tensor) -> Tensor:
    """Logits of one sequence, head by head and position by position, from the description in arXiv:2510.03871."""
    config, weights = model.config, model.state_dict()
    placement = config.placement
    inner = placement in ("everywhere", "all-but-output")

    def norm(x: Tensor, wanted: bool) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=config.norm_eps) if wanted else x

    def turn(x: Tensor, position: int) -> Tensor:
        y = torch.empty_like(x)
        for i in range(0, len(x), 2):
            angle = position / config.rope_theta ** (i / len(x))
            y[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
            y[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
        return y

    def attention(x: Tensor, layer: str) -> Tensor:
        queries, keys, values = (
            (x @ weights[f"{layer}.attention.{name}.weight"].T).unflatten(1, (-1, config.head_size))
            for name in ("wq", "wk", "wv")
        )
        repeat = queries.shape[1] // keys.shape[1]
        qk = inner or placement in ("residual+output+qk", "qk")
        rows = []
        for t in range(len(x)):
            heads = []
            for h in range(config.heads):
                query = turn(norm(queries[t, h], qk), t)
                scores = torch.stack([query @ turn(norm(keys[s, h // repeat], qk), s) for s in range(t + 1)])
                share = (scores / math.sqrt(config.head_size)).softmax(0)
                heads.append(sum(share[s] * norm(values[s, h // repeat], inner) for s in range(t + 1)))
            rows.append(torch.cat(heads))
        return norm(torch.stack(rows), inner) @ weights[f"{layer}.attention.wo.weight"].T

    def feed_forward(x: Tensor, layer: str) -> Tensor:
        w1, w2, w3 = (weights[f"{layer}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        return norm(F.silu(x @ w1.T) * (x @ w3.T), inner) @ w2.T

    double = 2 * config.depth
    a, b = {
        "identity": (1, 1),
        "depth-normalised": ((double - 1) / double, 1 / double),
        "completep": (1, 1 / double),
    }[config.residual]
    x = weights["tok_embeddings.weight"][tokens]
    for index in range(config.depth):
        for block in (attention, feed_forward):
            x = a * x + b * block(norm(x, inner or placement.startswith("residual")), f"layers.{index}")
    at_output = placement in ("everywhere", "residual+output+qk", "residual+output", "output")
    return norm(x, at_output) @ weights["output.weight"].T


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_logits_equal_the_naive_model(placement: Placement, residual: str, kv_heads: int | None) -> None:
    model = build(placement=placement, residual=residual, kv_heads=kv_heads)
    tokens = draw(2, 5)
    expected = torch.stack([naive(model, row) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, atol=2e-5, rtol=1e-4)


def test_placements_and_their_sites() -> None:
    everything = {"residual", "qk", "inner", "output"}
    assert {placement: set(norm_sites(placement)) for placement in PLACEMENTS} == {
        "everywhere": everything,
        "all-but-output": everything - {"output"},
        "residual+output+qk": {"residual", "output", "qk"},
        "residual+output": {"residual", "output"},
        "residual": {"residual"},
        "qk": {"qk"},
        "output": {"output"},
        "none": set(),
    }


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_names_shapes_and_count(kv_heads: int | None) -> None:
    model = build(kv_heads=kv_heads)
    kv = 4 * (kv_heads or 4)
    layer = {
        "attention.wq": (16, 16), "attention.wk": (kv, 16), "attention.wv": (kv, 16), "attention.wo": (16, 16),
        "feed_forward.w1": (48, 16), "feed_forward.w2": (16, 48), "feed_forward.w3": (48, 16),
    }  # fmt: skip
    expected = {"tok_embeddings.weight": (VOCAB, 16), "output.weight": (VOCAB, 16)}
    expected |= {f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert sum(p.numel() for p in model.parameters()) == model.config.parameters(VOCAB)
    assert set(model.state_dict()) == set(expected)


def test_loss_is_mean_cross_entropy_in_fp32() -> None:
    model, tokens, targets = build(), draw(2, 8), draw(2, 8, seed=2)
    probabilities = model(tokens).double().softmax(-1)
    expected = -probabilities.gather(-1, targets[..., None]).log().mean()
    assert model.loss(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.bfloat16().loss(tokens, targets).dtype == torch.float32


def test_no_position_sees_later_ones() -> None:
    model, tokens = build(), draw(1, 8)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % VOCAB
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert torch.all(difference[:5] == 0)
    assert torch.all(difference[5:] > 0)


def test_shorter_sequences_fit_and_longer_do_not() -> None:
    model, tokens = build(), draw(2, 8)
    torch.testing.assert_close(model(tokens[:, :3]), model(tokens)[:, :3])
    with pytest.raises(ValueError, match="9 positions do not fit the model's context of 8"):
        model(draw(1, 9))


def test_rotation_keeps_norms_and_depends_on_distance_only() -> None:
    rotation = rotations(64, 8, 1e4)
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turned = [rotate(x.expand(1, 64, 1, 8), rotation)[0, :, 0] for x in (query, key)]
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm().expand(64))
    scores = turned[0] @ turned[1].T
    for distance in (0, 1, 20):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rms_norm_equals_torch(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(5, 16, generator=generator)).requires_grad_()
    upstream = torch.randn(5, 16, generator=generator)
    ours, theirs = RMSNorm(1e-20)(x), F.rms_norm(x, (16,), eps=1e-20)
    torch.testing.assert_close(ours, theirs)
    (grad_ours,) = torch.autograd.grad(ours, x, upstream)
    (grad_theirs,) = torch.autograd.grad(theirs, x, upstream)
    torch.testing.assert_close(grad_ours, grad_theirs, atol=1e-5 / scale, rtol=1e-4)


def test_rms_norm_of_zero_is_zero_with_a_finite_derivative() -> None:
    x = torch.zeros(2, 16, requires_grad=True)
    y = RMSNorm(1e-20)(x)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    assert torch.all(y == 0)
    assert torch.all(derivative.isfinite())


def test_init_scales() -> None:
    last = ("attention.wo", "feed_forward.w2")
    assert build(depth_init="identity", depth=3).init_scales() == {}
    total = build(depth_init="total", depth=3).init_scales()
    assert total == {f"layers.{i}.{name}.weight": pytest.approx(6**-0.5) for i in range(3) for name in last}
    relative = build(depth_init="relative", depth=3).init_scales()
    assert relative == {
        f"layers.{i}.{name}.weight": pytest.approx((2 * i + 2) ** -0.5) for i in range(3) for name in last
    }
    assert set(total) < {name for name, _ in build(depth=3).named_parameters()}


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_stacked_models_equal_separate_ones(kv_heads: int | None) -> None:
    models = [build(seed, kv_heads=kv_heads) for seed in range(3)]
    together = build(kv_heads=kv_heads)
    for name, _ in models[0].named_parameters():
        path, _, last = name.rpartition(".")
        stacked = nn.Parameter(torch.stack([model.get_parameter(name).detach() for model in models]))
        setattr(together.get_submodule(path), last, stacked)
    tokens, targets = draw(3, 2, 8), draw(3, 2, 8, seed=2)
    torch.testing.assert_close(together(tokens), torch.stack([m(t) for m, t in zip(models, tokens, strict=True)]))
    losses = together.loss(tokens, targets)
    (losses * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    for index, model in enumerate(models):
        loss = model.loss(tokens[index], targets[index])
        torch.testing.assert_close(losses[index], loss)
        loss.backward()
        for name, parameter in together.named_parameters():
            own = model.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad[index] / (index + 1), own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_written_derivatives_are_those_of_autograd(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(lambda x: kernels.rms_norm(x, 1e-3), (leaf(),))
    assert torch.autograd.gradcheck(kernels.swiglu, (leaf(), leaf()))
    logits, targets = leaf(), draw(*shape[:-1], vocab=12)
    ours = kernels.cross_entropy(logits.float(), targets)
    assert ours.shape == shape[:-2]
    theirs = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(shape[:-1]).mean(-1)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    weights = torch.arange(1.0, 1 + ours.numel()).reshape(ours.shape)
    (mine,) = torch.autograd.grad((ours * weights).sum(), logits)
    (true,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-7)
