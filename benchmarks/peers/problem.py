"""What is optimized: the shapes of a model, gradients, and spectra whose polar factor is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from peers import Weight, World

STEPS = 5
"""Of Newton-Schulz, in every optimizer."""


def model_shapes(layers: int, width: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, role, shape) of a decoder: attention width x width, FFN 4 width, two embeddings of 8 width rows, gains."""
    shapes: list[tuple[str, str, tuple[int, ...]]] = [("tok_embeddings.weight", "input", (8 * width, width))]
    for layer in range(layers):
        prefix = f"layers.{layer}"
        shapes += [(f"{prefix}.attention.w{part}.weight", "matrix", (width, width)) for part in "qkvo"]
        shapes += [(f"{prefix}.feed_forward.up.weight", "matrix", (4 * width, width))]
        shapes += [(f"{prefix}.feed_forward.down.weight", "matrix", (width, 4 * width))]
        shapes += [(f"{prefix}.{norm}.weight", "vector", (width,)) for norm in ("attention_norm", "ffn_norm")]
    return [*shapes, ("norm.weight", "vector", (width,)), ("output.weight", "output", (8 * width, width))]


def spectra(small: bool = False) -> dict[str, Tensor]:
    """Gradients in float64 by name: Gaussian wide and square, and square with singular values from 1 to 1e-3."""
    size = 128 if small else 512
    generator = torch.Generator().manual_seed(20)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = (torch.linalg.qr(gaussian(size, size))[0] for _ in range(2))
    falling = left * torch.logspace(0, -3, size, dtype=torch.float64) @ right
    return {"wide": gaussian(size // 2, 2 * size), "square": gaussian(size, size), "falling": falling}


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of U S V^T, in float64."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


def place(shapes: Sequence[tuple[str, str, tuple[int, ...]]], world: World) -> list[Weight]:
    """Zero weights with zero gradients: plain tensors, or DTensors in Shard(0) as FSDP2 keeps them."""
    weights = []
    for name, role, shape in shapes:
        zeros = torch.zeros(shape)
        if world.layout == "fsdp":
            zeros = distribute_tensor(zeros, world.mesh, [Shard(0)], src_data_rank=None)
        param = nn.Parameter(zeros)
        param.grad = torch.zeros_like(param)
        weights.append(Weight(name, role, param))
    return weights


def set_gradients(weights: Sequence[Weight], seed: int) -> None:
    """Standard normal gradients, a function of (seed, position) only; every optimizer sees the same."""
    for index, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        copy_(weight.grad, torch.randn(weight.param.shape, generator=generator))


def copy_(target: Tensor, full: Tensor) -> None:
    """Copies this rank's part of ``full``."""
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None).to_local()
    local(target).copy_(full)


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def floor(shapes: Sequence[tuple[int, int]], steps: int = STEPS) -> Callable[[], None]:
    """The matrix products of the standard quintic alone, as a function to call.

    For an m x n matrix with m <= n (else transposed), in each of ``steps``: X X^T (2 m^2 n FLOP), A A (2 m^3), B X
    (2 m^2 n), each one ``torch.mm`` into a preallocated result. No normalisation, no sums, no memory traffic of an
    optimizer. Buffers are shared by matrices of one shape; the numbers in X stay fixed, so that none overflows.
    """
    sizes, buffers = _buffers(shapes)

    def products() -> None:
        for size in sizes:
            x, gram, inner, result = buffers[size]
            for _ in range(steps):
                torch.mm(x, x.mT, out=gram)
                torch.mm(gram, gram, out=inner)
                torch.mm(inner, x, out=result)

    return products


def own_floor(shapes: Sequence[tuple[int, int]], steps: int = STEPS) -> Callable[[], None]:
    """The matrix products alone of the forms that ``disco.gram`` takes: the Gram form of wide matrices, half of a
    symmetric product where that pays. As ``floor`` otherwise; no mirroring of the halves either."""
    from disco import gram

    sizes, buffers = _buffers(shapes)

    def symmetric(a: Tensor, b: Tensor, out: Tensor) -> None:
        rows = gram.panel(len(a)) if gram.halves(a, len(a)) else len(a)
        for start in range(0, len(a), rows):
            stop = min(start + rows, len(a))
            torch.mm(a[start:stop], b[:, :stop], out=out[start:stop, :stop])

    def products() -> None:
        for m, n in sizes:
            x, first, second, result = buffers[m, n]
            if gram.uses_gram(m, n, x.dtype):
                symmetric(x, x.mT, first)
                for _ in range(4 * steps - 3):
                    symmetric(first, first, second)
                torch.mm(second, x, out=result)
                continue
            for _ in range(steps):
                symmetric(x, x.mT, first)
                symmetric(first, first, second)
                torch.mm(second, x, out=result)

    return products


def _buffers(
    shapes: Sequence[tuple[int, int]],
) -> tuple[list[tuple[int, int]], dict[tuple[int, int], tuple[Tensor, ...]]]:
    """(m, n) of each shape with m <= n; and for each of them X and room for two m x m products and one m x n."""
    sizes = [(min(shape), max(shape)) for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    buffers = {}
    for m, n in set(sizes):
        x = torch.randn(m, n, generator=generator) / n**0.5
        buffers[m, n] = (x, torch.empty(m, m), torch.empty(m, m), torch.empty(m, n))
    return sizes, buffers


def share(shapes: Sequence[tuple[int, int]], rank: int, size: int) -> list[tuple[int, int]]:
    """The matrices of one of ``size`` ranks when each goes, the most work first, to the one with the least so far."""

    def work(shape: tuple[int, int]) -> int:
        m, n = min(shape), max(shape)
        return 2 * m * m * n + m**3

    loads, mine = [0] * size, []
    for shape in sorted(shapes, key=work, reverse=True):
        owner = loads.index(min(loads))
        loads[owner] += work(shape)
        if owner == rank:
            mine.append(shape)
    return mine


def barrier() -> None:
    """Waits for all ranks."""
    dist.barrier()
