"""Model and schedule against published numbers (../shared/data/vectors-dev.json; sources in each vector)."""

from typing import Any

import pytest
import torch

from disco.train.config import ModelConfig
from disco.train.model import Llama, rotations
from disco.train.schedule import factor

Vectors = dict[str, dict[str, Any]]


def test_norm_everywhere_llama(vectors: Vectors) -> None:
    given, expected = (vectors["model_norm_everywhere_identity"][key] for key in ("input", "expected"))
    config = ModelConfig(
        width=given["dim"],
        depth=given["n_layers"],
        head_size=given["dim"] // given["n_heads"],
        kv_heads=given["n_kv_heads"],
        ffn_width=48,
        context=8,
        residual=given["residual_scale"],
    )
    model = Llama(config, given["vocab"])
    weights = {}
    for i, (name, shape) in enumerate(given["param_order_and_shapes"]):
        index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        weights[name] = (0.5 * torch.sin(0.7 * index + i)).float().view(shape)
    model.load_state_dict(weights)

    tokens, labels = torch.tensor(given["tokens"]), torch.tensor(given["labels"])
    torch.testing.assert_close(model(tokens)[0], torch.tensor(expected["logits"]), atol=2e-4, rtol=0)
    loss = model.loss(tokens, labels)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    loss.backward()
    gradients = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert gradients == pytest.approx(expected["grad_l2"], rel=1e-3)


def test_rope_angles(vectors: Vectors) -> None:
    angle = torch.tensor(vectors["rope"]["expected"]["angle"])
    positions, pairs = angle.shape
    expected = torch.stack((angle.cos(), angle.sin()), -1)
    torch.testing.assert_close(rotations(positions, 2 * pairs, 1e4), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("warm2_decay.4_linear", {"warmup": 2, "decay": 4}),
        ("warm2_decay.4_sqrt_min.1", {"warmup": 2, "decay": 4, "shape": "sqrt", "minimum": 0.1}),
        ("warm2_none_cosine", {"warmup": 2, "decay": 8, "shape": "cosine"}),
        ("warm0_decay.25_linear", {"decay": 2}),
    ],
)
def test_learning_rate_factors(vectors: Vectors, name: str, settings: dict[str, Any]) -> None:
    vector = vectors["lr_schedule"]
    steps = vector["input"]["T"]
    factors = [factor(step, steps=steps, **settings) for step in range(steps)]
    assert factors == pytest.approx(vector["expected"][name], abs=1e-6)
