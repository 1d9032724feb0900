"""Fast forms of the orthogonalisation against the plain one in float64, and what ``polar_sharp`` promises."""

import numpy as np
import pytest
import torch

from disco import gram, polar

METHODS = [("polar_express", 5), ("polar_sharp", 4), ("newton_schulz", 5)]
SHAPES = [(64, 256), (256, 64), (512, 512), (130, 520), (512, 1024), (65, 66), (8, 40), (600, 599)]


def with_spectrum(m: int, n: int, s: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m + n)
    u, _, vh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64, generator=generator), full_matrices=False)
    return (u * s) @ vh


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "steps"), METHODS)
def test_fast_forms_are_the_exact_polynomial(method, steps, shape):
    x = with_spectrum(*shape, torch.linspace(1, 0.1, min(shape), dtype=torch.float64))
    exact = polar.orthogonalize(x, method, steps)
    assert relative(gram.orthogonalize(x.float(), method, steps), exact) <= 5e-4
    assert relative(gram.orthogonalize(x, method, steps), exact) <= 1e-9


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize(("method", "steps"), METHODS)
def test_gram_form_survives_bad_condition(method, steps, smallest):
    s = torch.logspace(0, np.log10(smallest), 256, dtype=torch.float64)
    found = gram.orthogonalize(with_spectrum(256, 1024, s).float(), method, steps)
    assert torch.linalg.matrix_norm(found, 2) <= polar.accuracy(method, steps).maximum * (1 + 1e-3)
    assert relative(found, polar.orthogonalize(with_spectrum(256, 1024, s), method, steps)) <= 5e-3


def test_zero_tiny_huge_and_broken_matrices():
    x = torch.randn(64, 128)
    for scale in (1e-15, 1e15):
        assert relative(gram.orthogonalize(x * scale), polar.orthogonalize(x.double())) <= 5e-4
    assert torch.equal(gram.orthogonalize(torch.zeros(64, 128)), torch.zeros(64, 128))
    assert gram.orthogonalize(torch.full((64, 128), torch.nan)).isnan().all()


def test_batches_are_taken_one_by_one():
    x = torch.randn(2, 3, 64, 192)
    found = gram.orthogonalize(x)
    for index in np.ndindex(2, 3):
        torch.testing.assert_close(found[index], gram.orthogonalize(x[index]))


@pytest.mark.parametrize("m", [512, 600, 1100])
def test_symmetric_products_are_whole(m):
    a = torch.randn(m, 300)
    torch.testing.assert_close(gram.symmetric(a, a.mT), a @ a.mT, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("side", [1, 31, 32, 33, 100])
def test_packing_a_symmetric_matrix_loses_nothing(side):
    a = torch.randn(side, side)
    flat = gram.pack(a + a.mT)
    assert flat.shape == (gram.packed(side),)
    assert side * (side + 1) // 2 <= gram.packed(side) <= side * (side + gram.BAND) // 2 + side * gram.BAND
    assert torch.equal(gram.unpack(flat, side), a + a.mT)


def test_flops_are_those_of_the_products():
    m, n = 64, 256
    assert gram.flops(m, n, 5, gram=False) == 20 * m * m * n + 10 * m**3
    assert gram.flops(m, n, 5, gram=True) == 4 * m * m * n + 34 * m**3
    assert gram.flops(n, m, 5, gram=True, halved=True) == 3 * m * m * n + 17 * m**3


def test_four_sharp_steps_beat_five_of_polar_express():
    """Distance from U V^T on the spectra of docs/norms.md."""
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(256, 1024, generator=generator, dtype=torch.float64),
        torch.randn(512, 512, generator=generator, dtype=torch.float64),
        with_spectrum(512, 512, torch.logspace(0, -3, 512, dtype=torch.float64)),
    ]
    for x in matrices:
        exact = polar.orthogonalize(x, "svd")
        sharp = relative(polar.orthogonalize(x, "polar_sharp", 4), exact)
        assert sharp < relative(polar.orthogonalize(x, "polar_express", 5), exact)
        assert sharp < relative(polar.orthogonalize(x, "newton_schulz", 5), exact)


def test_schatten_norm_bounds_the_largest_singular_value():
    for shape in ((30, 50), (50, 30), (1, 7), (7, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        s = torch.linalg.svdvals(x)
        assert float(polar.schatten8(x)) == pytest.approx(float((s**8).sum() ** 0.125), rel=1e-10)
        assert polar.schatten8(x) >= s[0] * (1 - 1e-12)
