"""Norms of shards: the error of the spectral norm on spectra of every kind, and broken input."""

import math

import pytest
import torch
from torch import Tensor

from disco.distributed.placements import plain_layout
from disco.distributed.values import Part, Values
from disco.norms import norm


def part(matrix: Tensor, key: str | None = None) -> Part:
    operator = norm("rms_to_rms")
    return Part(matrix, plain_layout(matrix, 0, None), 0, (None,), operator, (), key)


def with_spectrum(m: int, n: int, s: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(torch.randn(m, n, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    return (u * s) @ vh


def spectra() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(512, 512, generator=generator)
    return {
        "gaussian": gaussian,
        "wide": torch.randn(320, 1280, generator=generator),
        "spiked": gaussian + 60 * with_spectrum(512, 512, torch.tensor([1.0] * 3 + [0.0] * 509)),
        "flat": with_spectrum(384, 384, torch.ones(384)),
        "falling": with_spectrum(384, 384, torch.logspace(0, -3, 384)),
    }


COLD = {"gaussian": 5e-3, "wide": 5e-3, "spiked": 1e-4, "flat": 1e-4, "falling": 1e-3}
"""Stated relative error of the first call."""


@pytest.mark.parametrize("kind", COLD)
def test_subspace_iteration_is_as_exact_as_stated_and_never_above(kind):
    x = spectra()[kind]
    exact = float(norm("rms_to_rms").value(x.double(), exact=True))
    (found,) = Values().measure([part(x)])
    assert -COLD[kind] <= found / exact - 1 <= 1e-5
    (gram,) = Values().measure([part(x)], exact=True)
    assert gram == pytest.approx(exact, rel=1e-5)


def test_warm_starts_follow_a_weight_that_moves():
    x, values = spectra()["gaussian"], Values()
    errors = []
    for step in range(20):
        (found,) = values.measure([part(x, "w")])
        errors.append(found / float(norm("rms_to_rms").value(x.double(), exact=True)) - 1)
        update = torch.randn(512, 512, generator=torch.Generator().manual_seed(step))
        x = x + 0.2 * norm("rms_to_rms").lmo(update)
    assert max(errors) <= 1e-5
    assert min(errors) >= -5e-3


def test_zero_is_zero_and_broken_is_nan():
    for size in (8, 300):
        assert Values().measure([part(torch.zeros(size, size))]) == [0.0]
        broken = torch.randn(size, size)
        broken[0, 0] = torch.inf
        assert math.isnan(Values().measure([part(broken)])[0])
