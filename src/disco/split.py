"""Fused weights: parameters that hold several matrices one after the other along the output dimension.

A group's ``split`` names the sizes of the parts (fused queries, keys and values: ``(4096, 1024, 1024)``), or how many
equal parts there are (gate and up: 2; per head: the number of heads). Each part has an LMO, a norm and a scale of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disco.norms import OperatorNorm
from disco.spectrum import MEASURES

Split = int | Sequence[int]


def out_dim(operator: OperatorNorm) -> int:
    """The tensor dimension of a matrix's outputs."""
    return operator.batch_dims + (operator.layout == "in_out")


def sizes(split: Split, tensor: Tensor, operator: OperatorNorm) -> tuple[int, ...]:
    """Sizes of the parts along the output dimension; () if there is only one.

    Raises:
        ValueError: parts that do not add up to the dimension, or a norm other than rms_to_rms.
    """
    if not split or split == 1:
        return ()
    if operator.name != "rms_to_rms":
        raise ValueError(f"only matrices of the norm rms_to_rms can be split, not {operator.name}")
    length = tensor.shape[out_dim(operator)]
    result = (length // split,) * split if isinstance(split, int) else tuple(split)
    if sum(result) != length or min(result) < 1:
        raise ValueError(f"split {split} does not divide the output dimension of {length}")
    return result


def parts(tensor: Tensor, split: Split, operator: OperatorNorm) -> Sequence[Tensor]:
    """Views of the parts; the tensor itself if there is only one."""
    into = sizes(split, tensor, operator)
    return tensor.split(into, out_dim(operator)) if into else (tensor,)


def shapes(tensor: Tensor, split: Split, operator: OperatorNorm) -> list[torch.Size]:
    """Shapes of the parts; of a DTensor, nothing moves."""
    into, dim = sizes(split, tensor, operator), out_dim(operator)
    if not into:
        return [tensor.shape]
    return [torch.Size((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])) for size in into]


def values(tensor: Tensor, operator: OperatorNorm, into: tuple[int, ...], which: str | None = None) -> Tensor:
    """The largest norm of the parts of sizes ``into``, for each matrix: shape ``tensor.shape[:batch_dims]``.

    ``which`` names one of ``MEASURES`` instead of the norm.
    """
    views = tensor.split(into, out_dim(operator)) if into else (tensor,)
    if which in MEASURES:
        norms = [MEASURES[which](operator.as_matrix(view)) for view in views]
    else:
        norms = [operator.value(view) for view in views]
    return norms[0] if len(norms) == 1 else torch.stack(norms).amax(0)


def value(tensor: Tensor, operator: OperatorNorm, into: tuple[int, ...], which: str | None = None) -> float:
    """The largest of ``values``."""
    return float(values(tensor, operator, into, which).max())
