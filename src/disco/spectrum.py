"""What else logs tell of a matrix besides its operator norms: size of the entries and shape of the spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from disco.norms import sigma_max
from disco.polar import EPS

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "frobenius": lambda x: torch.linalg.matrix_norm(x),
    "max_abs": lambda x: x.abs().amax(dim=(-2, -1)),
    "stable_rank": lambda x: (torch.linalg.matrix_norm(x) / sigma_max(x).clamp_min(EPS)) ** 2,
}
"""What else optimizers measure of each matrix in [..., m, n]; see ``matrix_statistics``."""


def matrix_statistics(matrix: Tensor) -> dict[str, Tensor]:
    """Statistics of each matrix in [..., m, n], by an SVD in at least float32; s are its singular values.

    Returns:
        Tensors of the batch's shape, which do not depend on how the matrix is stored (out x in or in x out):
        ``frobenius`` ||W||_F; ``rms`` ||W||_F / sqrt(m n); ``max_abs``; ``condition_number`` s_max / s_min;
        ``stable_rank`` ||W||_F^2 / s_max^2; ``effective_rank`` exp of the entropy of s / sum(s) (Roy & Vetterli 2007).

    Raises:
        ValueError: fewer than two dimensions, or an empty matrix.
    """
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"statistics are of matrices with entries, got shape {tuple(matrix.shape)}")
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    s = torch.linalg.svdvals(x)
    frobenius, largest = torch.linalg.matrix_norm(x), s[..., 0]
    share = s / s.sum(dim=-1, keepdim=True).clamp_min(EPS)
    return {
        "frobenius": frobenius,
        "rms": frobenius / math.sqrt(x.shape[-2] * x.shape[-1]),
        "max_abs": x.abs().amax(dim=(-2, -1)),
        "condition_number": largest / (s[..., -1] + EPS),
        "stable_rank": (frobenius / largest.clamp_min(EPS)) ** 2,
        "effective_rank": torch.special.entr(share).sum(dim=-1).exp(),
    }
