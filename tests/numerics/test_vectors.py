"""The published numeric vectors: norms, LMOs, Newton-Schulz, optimizer trajectories, inits.

Their ``momentum`` is the weight of the NEW gradient; ours is that of the old buffer.
"""

from typing import Any

import numpy as np
import pytest
import torch

from disco import norm, polar
from disco.norms import sigma_max
from disco.scion import Scion, constrained
from disco.spectrum import matrix_statistics

Vectors = dict[str, dict[str, Any]]
NORM_OF = {"spectral": "rms_to_rms", "embed_sqrt": "one_to_rms", "unembed_sqrt": "rms_to_inf", "bias_rms": "rms"}


def tensor(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("name", ["norms_w2x3", "norms_w3x2", "norms_embedding_transposed"])
def test_norm_values(vectors: Vectors, name: str) -> None:
    vector = vectors[name]
    stored, layout = next(iter(vector["input"].values())), "in_out" if "E" in vector["input"] else "out_in"
    weight, expected = tensor(stored), vector["expected"]
    d_in = weight.shape[-1 if layout == "out_in" else -2]
    for ours, theirs in {"rms_to_rms": "rms_to_rms", "one_to_rms": "l1_to_rms", "rms_to_inf": "rms_to_inf"}.items():
        for exact in (False, True):
            value = norm(ours, layout=layout).value(weight, exact=exact)
            assert float(value) == pytest.approx(expected[theirs], rel=1e-5)
    assert float(norm("one_to_inf", layout=layout).value(weight)) == pytest.approx(d_in * expected["supremum"])
    statistics = matrix_statistics(weight)
    named = {"max_abs": "supremum", "frobenius": "frobenius_norm", "rms": "average_entry_size"}
    for ours in statistics:
        assert float(statistics[ours]) == pytest.approx(expected[named.get(ours, ours)], rel=1e-5), ours


def test_issue_unit_case() -> None:
    weight = tensor([[3.0, 4.0], [0.0, 0.0]])
    assert float(norm("rms_to_inf").value(weight)) == pytest.approx(7.0711, abs=1e-4)
    assert float(norm("one_to_rms").value(weight)) == pytest.approx(2.8284, abs=1e-4)
    assert float(norm("rms_to_rms").value(weight)) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("name", ["lmo_spectral_svd_2x3", "lmo_spectral_svd_3x2"])
def test_spectral_lmo(vectors: Vectors, name: str) -> None:
    vector, operator = vectors[name], norm("rms_to_rms", orthogonalize="svd")
    step = operator.lmo(tensor(vector["input"]["G"]))
    torch.testing.assert_close(step, tensor(vector["expected"]["lmo"]), atol=2e-6, rtol=0)
    assert float(operator.value(step)) == pytest.approx(1.0, rel=1e-5)


def test_experts(vectors: Vectors) -> None:
    vector = vectors["lmo_experts_3d"]
    shape = vector["input"]["shape"]
    gradient = torch.cos(1 + torch.arange(np.prod(shape), dtype=torch.float32)).reshape(shape)
    for layout, key in {"out_in": "G_Dout_Din", "in_out": "G_Din_Dout_transpose"}.items():
        step = norm("rms_to_rms", layout=layout, batch_dims=1, orthogonalize="svd").lmo(gradient)
        torch.testing.assert_close(step, tensor(vector["expected"][key]), atol=2e-6, rtol=0)


def test_scalar_maps(vectors: Vectors) -> None:
    vector = vectors["ns_scalar_maps"]
    s, polar_table = np.array(vector["input"]["s"]), vector["input"]["polar_coeffs_after_safety"]
    for key, triples in {
        "keller5": polar.coefficients("newton_schulz", 5),
        "dion5": vector["input"]["dion5_coeffs"],
        "polar5": polar_table[:5],
        "polar8": polar_table,
    }.items():
        np.testing.assert_allclose(polar.polynomial(s, triples), vector["expected"][key], rtol=1e-8)
    ours = polar.shrunk(polar.coefficients("polar_express", 8), 1.01)
    np.testing.assert_allclose(ours[:7], polar_table[:7], rtol=1e-9)  # our Remez reproduces the published table


def test_newton_schulz_matrix(vectors: Vectors) -> None:
    vector = vectors["ns5_matrix_2x3"]
    gradient = tensor(vector["input"]["G"])
    exact = polar.orthogonalize(gradient.double(), "newton_schulz")
    torch.testing.assert_close(exact, tensor(vector["expected"]["ns5_float64"], torch.float64), atol=1e-7, rtol=0)
    half = polar.orthogonalize(gradient, "newton_schulz", dtype=torch.bfloat16)
    torch.testing.assert_close(half, tensor(vector["expected"]["ns5_bf16_reference"]), atol=6e-2, rtol=0)
    lmo = norm("rms_to_rms", orthogonalize="newton_schulz", dtype=torch.bfloat16).lmo(gradient)
    expected = tensor(vector["expected"]["lmo_spectral_ns5_bf16_reference"])
    torch.testing.assert_close(lmo, expected, atol=6e-2, rtol=0)
    table = tuple(map(tuple, vectors["ns_scalar_maps"]["input"]["polar_coeffs_after_safety"][:5]))
    start = gradient.double() / (1.01 * gradient.double().norm())
    polar5 = tensor(vector["expected"]["polar5_float64"], torch.float64)
    torch.testing.assert_close(polar.iterate(start, table), polar5, atol=1e-7, rtol=0)


def trajectory(shape: list[int], make: Any) -> torch.Tensor:
    """Parameter after each of 4 steps from the vectors' start and gradients."""
    index = torch.arange(int(np.prod(shape)), dtype=torch.float32)
    param = torch.nn.Parameter(torch.cos(1 + index).reshape(shape))
    optimizer, states = make(param), []
    for t in range(4):
        optimizer.zero_grad()
        (param * torch.sin((1 + index) * (1 + 0.37 * t)).reshape(shape)).sum().backward()
        optimizer.step()
        states.append(param.detach().clone())
    return torch.stack(states)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "disco_steps_hidden_spectral_svd",
        "disco_steps_hidden_spectral_svd_wd",
        "disco_steps_hidden_momentum1",
        "disco_steps_embed_sqrt",
        "disco_steps_bias_rms",
    ],
)
def test_paper_trajectories(vectors: Vectors, name: str, light: bool) -> None:
    given = vectors[name]["input"]
    expected = tensor(vectors[name]["expected"]["p_after_each_step"])
    layout = "in_out" if given["norm_factor"] == "embed_sqrt" else "out_in"

    def make(param: torch.nn.Parameter) -> Scion:
        return Scion(
            [{"params": [param], "norm": NORM_OF[given["norm_factor"]], "layout": layout}],
            lr=given["lr"],
            momentum=1 - given["momentum"],
            nesterov=given["nesterov"],
            weight_decay=given["weight_decay"],
            orthogonalize="svd",
            light=light,
        )

    torch.testing.assert_close(trajectory(list(expected.shape[1:]), make), expected, atol=5e-6, rtol=0)


def test_lions_lmos(vectors: Vectors) -> None:
    vector = vectors["lions_lmo"]
    gradient, expected = tensor(vector["input"]["G"]), vector["expected"]
    d_in = gradient.shape[1]
    for key, value in {
        "ColNorm{'normalized': True}": norm("one_to_rms").lmo(gradient) / d_in,
        "ColNorm{}": norm("one_to_rms").lmo(gradient),
        "ColNorm{'transpose': True}": norm("one_to_rms", layout="in_out").lmo(gradient),
        "RowNorm{}": norm("rms_to_inf").lmo(gradient),
        "RowNorm{'normalized': False}": norm("rms_to_inf").lmo(gradient) * d_in**0.5,
        "RowNorm{'normalized': False, 'transpose': True}": norm("rms_to_inf", layout="in_out").lmo(gradient) * 2**0.5,
        "Sign{}": norm("one_to_inf").lmo(gradient),
        "Sign{'normalized': False}": norm("one_to_inf").lmo(gradient) * d_in,
        "BiasRMS(1d [3,-0.5,2])": norm("rms").lmo(tensor([3, -0.5, 2])),
    }.items():
        torch.testing.assert_close(value, tensor(expected[key]), atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


LIONS = {
    "lions_steps_Scion_Sign_uncon": ("one_to_inf", "out_in", False),
    "lions_steps_Scion_RowNorm_con": ("rms_to_inf", "out_in", False),
    "lions_steps_ScionLight_ColNorm_con": ("one_to_rms", "in_out", True),
}


@pytest.mark.parametrize("name", LIONS)
def test_lions_trajectories(vectors: Vectors, name: str) -> None:
    given, expected = vectors[name]["input"], tensor(vectors[name]["expected"]["p_after_each_step"])
    kind, layout, light = LIONS[name]
    unconstrained = {"lr": given["lr"] * given["scale"]}
    settings = unconstrained if given["unconstrained"] else constrained(given["lr"], given["scale"])

    def make(param: torch.nn.Parameter) -> Scion:
        group = {"params": [param], "norm": kind, "layout": layout, **settings}
        return Scion([group], momentum=1 - given["momentum"], light=light)

    torch.testing.assert_close(trajectory(list(expected.shape[1:]), make), expected, atol=5e-6, rtol=0)


def test_constrained_form(vectors: Vectors) -> None:
    given, expected = vectors["disco_equals_constrained_scion"]["input"], vectors["disco_equals_constrained_scion"]
    group = constrained(given["gamma"], given["rho"])
    assert group == pytest.approx({"lr": given["gamma"] * given["rho"], "weight_decay": 1 / given["rho"]})
    steps = trajectory(
        given["shape"],
        lambda p: Scion([{"params": [p], "norm": "rms_to_inf", **group}], momentum=1 - given["momentum"]),
    )
    for key in ("disco_p", "lions_p"):
        torch.testing.assert_close(steps, tensor(expected["expected"][key]), atol=5e-6, rtol=0)


def test_inits(vectors: Vectors) -> None:
    expected = vectors["init_invariants"]["expected"]
    hidden = norm("rms_to_rms").init_(torch.empty(24, 40))
    assert float(norm("rms_to_rms").value(hidden, exact=True)) == pytest.approx(expected["rms_to_rms"], rel=1e-5)
    assert float(sigma_max(hidden)) == pytest.approx((24 / 40) ** 0.5, rel=1e-5)
    embedding = norm("one_to_rms", layout="in_out").init_(torch.empty(50, 16))
    torch.testing.assert_close(embedding.norm(dim=1), torch.full((50,), 4.0 * expected["l1_to_rms_embed"]))
    output = norm("rms_to_inf").init_(torch.empty(50, 16))
    torch.testing.assert_close(output.norm(dim=1), torch.full((50,), expected["rms_to_inf_output"] / 4))
