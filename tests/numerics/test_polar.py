"""Orthogonalisation against the exact SVD, and the stated accuracies against measured ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disco import polar

METHODS = ("newton_schulz", "polar_express")


def with_spectrum(s: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """m x n matrix with singular values s (float64)."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=generator))[0]
    return u @ torch.diag(s) @ v.T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [3, 5, 8])
def test_singular_values_follow_the_polynomial(method: polar.Method, steps: int) -> None:
    s = torch.logspace(-3, 0, 24, dtype=torch.float64)
    out = polar.orthogonalize(with_spectrum(s, 24, 60), method, steps)
    expected = polar.polynomial((s / s.norm()).numpy(), polar.coefficients(method, steps))
    np.testing.assert_allclose(np.sort(torch.linalg.svdvals(out)), np.sort(expected), rtol=1e-9)


def test_stated_accuracy() -> None:
    assert polar.accuracy("newton_schulz").maximum == pytest.approx(1.202, abs=1e-3)  # as published for Muon's triple
    assert polar.accuracy("polar_express").maximum == pytest.approx(1.124, abs=1e-3)
    assert polar.accuracy("polar_express", 8).error < 1e-12
    assert polar.accuracy("svd") == polar.Accuracy(maximum=1.0, error=0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (16, 200), (200, 16), (1, 9), (9, 1)])
def test_maximum_holds_in_working_precision(method: polar.Method, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrices = torch.randn(20, *shape, generator=torch.Generator().manual_seed(1))
    s = torch.linalg.svdvals(polar.orthogonalize(matrices, method, dtype=dtype).double())
    slack = 1e-5 if dtype == torch.float32 else 2e-2
    assert s.max() <= polar.accuracy(method).maximum + slack


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (2, 3, 4, 6)])
def test_svd_is_the_polar_factor(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    factor = polar.orthogonalize(matrix, "svd")
    wide = factor if shape[-2] <= shape[-1] else factor.mT
    torch.testing.assert_close(wide @ wide.mT, torch.eye(wide.shape[-2], dtype=torch.float64).expand_as(wide @ wide.mT))
    symmetric = matrix.mT @ factor  # G^T (U V^T) = V S V^T: symmetric, positive semi-definite
    torch.testing.assert_close(symmetric, symmetric.mT)
    assert torch.linalg.eigvalsh(symmetric).min() > -1e-9


def test_svd_keeps_the_null_space_at_zero() -> None:
    rank_one = torch.outer(torch.arange(1.0, 5), torch.arange(2.0, 5))
    s = torch.linalg.svdvals(polar.orthogonalize(rank_one, "svd"))
    torch.testing.assert_close(s, torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [*METHODS, "svd"])
def test_zero_gives_zero_and_scale_does_not_matter(method: polar.Method) -> None:
    assert polar.orthogonalize(torch.zeros(3, 4), method).abs().max() == 0
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    for factor in (1e-12, 1e12):
        scaled = polar.orthogonalize(matrix * factor, method)
        torch.testing.assert_close(scaled, polar.orthogonalize(matrix, method), atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_batch_equals_one_by_one(m: int, n: int, batch: int, seed: int) -> None:
    matrices = torch.randn(batch, 2, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for method in (*METHODS, "svd"):
        together = polar.orthogonalize(matrices, method)
        apart = torch.stack([torch.stack([polar.orthogonalize(x, method) for x in pair]) for pair in matrices])
        torch.testing.assert_close(together, apart, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("method", [*METHODS, "svd"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others_alone(method: polar.Method, bad: float) -> None:
    good = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(4))
    mixed = good.clone()
    mixed[1, 2, 3] = bad
    out, expected = polar.orthogonalize(mixed, method), polar.orthogonalize(good, method)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_svd_in_half_precision_computes_in_single(dtype: torch.dtype) -> None:
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(polar.orthogonalize(matrix, "svd", dtype=dtype), polar.orthogonalize(matrix, "svd"))
    assert polar.orthogonalize(matrix.to(dtype), "svd").dtype == dtype


def test_default_working_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert polar.working_dtype(torch.empty(2, 2, dtype=dtype)) == torch.float32
        assert polar.working_dtype(torch.empty(2, 2, dtype=dtype, device="meta")) == torch.bfloat16  # as on a GPU
    assert polar.working_dtype(torch.empty(2, 2, dtype=torch.float64, device="meta")) == torch.float64


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="got 'newton'"):
        polar.orthogonalize(torch.eye(2), "newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps=0"):
        polar.orthogonalize(torch.eye(2), steps=0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        polar.orthogonalize(torch.ones(3))
