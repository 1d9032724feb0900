"""LMOs that need sums over rows, columns or a whole vector at most: computed where the shards lie.

A shard contributes its part of the sums of squares; where the summed dimension is cut, they are added over the mesh
dimensions that cut it. That is all that moves: one number for each row of an output layer, for instance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from disco.norms import OperatorNorm, sum_of_squares
from disco.polar import EPS

SEPARABLE = ("one_to_rms", "rms_to_inf", "one_to_inf", "rms")


def summed_dim(operator: OperatorNorm, ndim: int) -> int | None:
    """The tensor dimension over which squares are summed; None if there is none."""
    first, second = operator.batch_dims, operator.batch_dims + 1
    out, into = (first, second) if operator.layout == "out_in" else (second, first)
    dims = {"one_to_rms": out, "rms_to_inf": into, "rms": first if ndim > first else None}
    return dims.get(operator.name)


def sums_of_squares(operator: OperatorNorm, local: Tensor) -> Tensor:
    """Of a shard, in at least float32, the summed dimension kept with length 1."""
    dim = summed_dim(operator, local.ndim)
    if dim is None:
        return local.to(torch.promote_types(local.dtype, torch.float32)).square()
    return sum_of_squares(local, (dim,))


def lmo(operator: OperatorNorm, local: Tensor, sums: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The shard of the LMO of a tensor of ``shape``, whose sums of squares are ``sums``."""
    dim = summed_dim(operator, local.ndim)
    if operator.name == "one_to_inf":
        return local.sign() / shape[operator.batch_dims + (operator.layout == "out_in")]
    assert sums is not None
    root = sums.sqrt().clamp_min(EPS)
    length = 1 if dim is None else shape[dim]
    size = 1 / math.sqrt(length) if operator.name == "rms_to_inf" else math.sqrt(length)
    return (local * (size / root)).to(local.dtype)
