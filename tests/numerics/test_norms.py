"""Duality of norms and LMOs, for every norm, storage and batch shape, in float64 with exact SVDs as the oracle."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import disco
from disco import norm, polar
from disco.norms import NORMS, sigma_max
from disco.spectrum import matrix_statistics

MATRIX = ("one_to_rms", "rms_to_rms", "rms_to_inf", "one_to_inf")
SHAPES = {name: [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1)] for name in MATRIX}
SHAPES |= {"rms": [(5,), (1,), ()], "conv": [(4, 3, 2), (3, 4, 3, 3), (2, 2, 1, 2, 3)]}
CASES = [
    (name, shape, layout, batch)
    for name, shapes in SHAPES.items()
    for shape in shapes
    for layout in ("out_in", "in_out")
    for batch in ((), (2,), (2, 3))
]

DUAL: dict[str, Callable[[Tensor], Tensor]] = {
    # dual norms of one d_out x d_in matrix, by definition
    "one_to_rms": lambda g: g.norm(dim=0).sum() * math.sqrt(g.shape[0]),
    "rms_to_rms": lambda g: torch.linalg.svdvals(g).sum() * math.sqrt(g.shape[0] / g.shape[1]),
    "rms_to_inf": lambda g: g.norm(dim=1).sum() / math.sqrt(g.shape[1]),
    "one_to_inf": lambda g: g.abs().sum() / g.shape[1],
    "rms": lambda g: g.norm() * math.sqrt(g.numel()),
    "conv": lambda g: (
        torch.linalg.svdvals(g.flatten(1)).sum() * math.sqrt(g.shape[0] / g.shape[1]) / math.prod(g.shape[2:])
    ),
}


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrices(tensor: Tensor, name: str, layout: str, batch_dims: int) -> list[Tensor]:
    """The single matrices of a batch, as d_out x d_in."""
    flat = tensor.flatten(0, batch_dims - 1) if batch_dims else tensor[None]
    return [m.transpose(0, 1) if layout == "in_out" and name != "rms" else m for m in flat]


@pytest.mark.parametrize(("name", "shape", "layout", "batch"), CASES)
def test_lmo_attains_the_dual_norm(name: str, shape: tuple[int, ...], layout: str, batch: tuple[int, ...]) -> None:
    operator = norm(name, layout=layout, batch_dims=len(batch), orthogonalize="svd")
    gradient = random(batch + shape)
    step = operator.lmo(gradient)
    assert step.shape == gradient.shape
    values = operator.value(step, exact=True)
    assert values.shape == batch
    torch.testing.assert_close(values, torch.ones_like(values))
    pairs = zip(matrices(gradient, name, layout, len(batch)), matrices(step, name, layout, len(batch)), strict=True)
    for g, d in pairs:
        torch.testing.assert_close((g * d).sum(), DUAL[name](g))


@pytest.mark.parametrize(("name", "shape", "layout", "batch"), CASES)
def test_no_other_step_of_norm_one_is_steeper(
    name: str, shape: tuple[int, ...], layout: str, batch: tuple[int, ...]
) -> None:
    operator = norm(name, layout=layout, batch_dims=len(batch), orthogonalize="svd")
    gradient, inner = random(batch + shape), tuple(range(len(batch), len(batch + shape)))
    best = (gradient * operator.lmo(gradient)).sum(dim=inner) if inner else gradient * operator.lmo(gradient)
    for seed in range(1, 20):
        other = random(batch + shape, seed)
        value = operator.value(other, exact=True)
        other = other / value.reshape(value.shape + (1,) * len(shape))
        gain = (gradient * other).sum(dim=inner) if inner else gradient * other
        assert (gain <= best + 1e-9).all()


@pytest.mark.parametrize(("name", "shape", "layout", "batch"), CASES)
@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
def test_iterative_backends_stay_below_their_maximum(
    name: str, shape: tuple[int, ...], layout: str, batch: tuple[int, ...], method: polar.Method
) -> None:
    operator = norm(name, layout=layout, batch_dims=len(batch), orthogonalize=method)
    values = operator.value(operator.lmo(random(batch + shape)), exact=True)
    assert (values <= operator.maximum + 1e-9).all()
    assert (values >= 1 - polar.accuracy(method).error - 1e-9).all()


@pytest.mark.parametrize(("name", "shape", "layout", "batch"), CASES)
def test_init_has_norm_one(name: str, shape: tuple[int, ...], layout: str, batch: tuple[int, ...]) -> None:
    operator = norm(name, layout=layout, batch_dims=len(batch))
    weight = torch.empty(batch + shape)
    operator.init_(weight, scale=0.25, generator=torch.Generator().manual_seed(4))
    values = operator.value(weight, exact=True)
    torch.testing.assert_close(values, torch.full_like(values, 0.25), rtol=1e-5, atol=0)


def test_init_is_random_and_reproducible() -> None:
    operator = norm("rms_to_rms")
    a, b, c = (operator.init_(torch.empty(8, 4), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_embedding_is_stored_transposed() -> None:
    stored = torch.zeros(10, 4)  # V x d: token 3 has a row, that is a column of W
    stored[3] = 2.0
    assert float(norm("one_to_rms", layout="in_out").value(stored)) == pytest.approx(2.0)  # RMS of that vector
    assert float(norm("one_to_rms", layout="out_in").value(stored)) == pytest.approx(2.0 / math.sqrt(10))


@pytest.mark.parametrize("shape", [(8, 8), (8, 200), (200, 8), (64, 64), (1, 1)])
@pytest.mark.parametrize("decades", [0, 3, 8])
def test_sigma_max_has_its_stated_error(shape: tuple[int, int], decades: int) -> None:
    rank = min(shape)
    u, _, vh = torch.linalg.svd(random(shape), full_matrices=False)
    matrix = (u * torch.logspace(0, -decades, rank, dtype=torch.float64)) @ vh
    for factor in (1e-15, 1.0, 1e15):
        exact = float(torch.linalg.svdvals(matrix * factor)[0])
        assert float(sigma_max((matrix * factor).float())) == pytest.approx(exact, rel=1e-5)


def test_sigma_max_of_odd_input() -> None:
    assert float(sigma_max(torch.zeros(3, 5))) == 0.0
    assert sigma_max(torch.zeros(2, 0, 5)).tolist() == [0.0, 0.0]
    batch = torch.stack([torch.eye(3), torch.full((3, 3), math.nan), 2 * torch.eye(3)])
    batch[1, 0, 0] = math.inf
    for exact in (False, True):
        torch.testing.assert_close(sigma_max(batch, exact=exact), torch.tensor([1, math.nan, 2]), equal_nan=True)


@pytest.mark.parametrize("name", NORMS)
def test_zero_gradient_gives_no_step(name: str) -> None:
    shape = {"rms": (4,), "conv": (2, 3, 3)}.get(name, (3, 4))
    for method in ("svd", "polar_express", "newton_schulz"):
        assert norm(name, orthogonalize=method).lmo(torch.zeros(shape)).abs().max() == 0


def test_half_precision_is_measured_in_single() -> None:
    weight = random((16, 300), dtype=torch.float32).bfloat16()
    for name in MATRIX:
        value = norm(name).value(weight)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, norm(name).value(weight.double()).float(), rtol=1e-5, atol=0)
        assert norm(name).lmo(weight).dtype == torch.bfloat16


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown norm 'rms_to_l1'"):
        norm("rms_to_l1")
    with pytest.raises(ValueError, match="got 'io'"):
        norm("rms", layout="io")
    with pytest.raises(ValueError, match=r"a vector or a scalar.*\(2, 3\)"):
        norm("rms").value(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"a matrix after 0 batch dimensions.*\(2, 3, 4\)"):
        norm("rms_to_rms").lmo(torch.ones(2, 3, 4))


def test_statistics_of_a_batch_with_known_spectra() -> None:
    u = torch.linalg.qr(random((4, 4)))[0]
    v = torch.linalg.qr(random((6, 4), seed=1))[0]
    spectra = torch.tensor([[1.0, 1, 1, 1], [8.0, 4, 2, 1]], dtype=torch.float64)
    batch = torch.stack([u @ torch.diag(s) @ v.T for s in spectra])
    got = matrix_statistics(batch)
    torch.testing.assert_close(got["stable_rank"], torch.tensor([4.0, 85 / 64], dtype=torch.float64))
    torch.testing.assert_close(got["condition_number"], torch.tensor([1.0, 8.0], dtype=torch.float64))
    share = spectra[1] / 15
    effective = torch.stack([torch.tensor(4.0, dtype=torch.float64), torch.exp(-(share * share.log()).sum())])
    torch.testing.assert_close(got["effective_rank"], effective)
    torch.testing.assert_close(got["rms"], batch.square().mean(dim=(1, 2)).sqrt())
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        matrix_statistics(torch.ones(3))


def test_transposed_convolutions_are_measured_as_the_matrix_that_their_norm_is_of() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # in, out, kernel
    s = torch.linalg.svdvals(weight.transpose(0, 1).flatten(1))
    groups = [{"params": [torch.nn.Parameter(weight)], "names": ["w"], "norm": "conv", "layout": "in_out"}]
    expected = float((s**2).sum() / s[0] ** 2)
    for optimizer in (disco.Scion(groups), disco.Disco(groups)):
        assert optimizer.norms("stable_rank")["w"] == pytest.approx(expected, rel=1e-5)
