"""Operator norms: one object with three verbs, used by optimizer, logger, initialisation and fits.

    value(W)   how large is this layer
    lmo(G)     the steepest step of norm 1: the D that maximises <G, D> over value(D) <= 1
    init_(W)   fills W with weights of norm 1

In the maths W is d_out x d_in and acts as y = W x; ||v||_RMS = ||v||_2 / sqrt(len v). How a layer stores W is its
``layout``: "out_in" (Linear) or "in_out" (Embedding, and Conv1D of GPT-2). Leading batch dimensions, independent
matrices such as the experts of a mixture or the runs of a cohort, are counted by ``batch_dims``, never guessed.

| name       | for                  | value                                   | lmo                                  |
|------------|----------------------|-----------------------------------------|--------------------------------------|
| one_to_rms | input embedding      | max_j ||col_j||_2 / sqrt(d_out)         | col_j sqrt(d_out) / ||col_j||_2      |
| rms_to_rms | hidden matrix        | sqrt(d_in / d_out) sigma_max            | sqrt(d_out / d_in) U V^T             |
| rms_to_inf | output to vocabulary | sqrt(d_in) max_i ||row_i||_2            | row_i / (sqrt(d_in) ||row_i||_2)     |
| one_to_inf | sign descent         | d_in max |w|                            | sign(G) / d_in                       |
| rms        | bias, gain           | ||v||_RMS                               | v / ||v||_RMS                        |
| conv       | convolution          | sqrt(c_in / c_out) prod(k) sigma_max    | sqrt(c_out / c_in) / prod(k) U V^T   |

Sources: Pethick et al., arXiv:2502.07529 (Scion); Bernstein & Newhouse, arXiv:2410.21265; Filatov et al.,
arXiv:2510.03871. LMO: linear minimisation oracle; ours returns minus the minimiser, to be subtracted like a gradient.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, final, get_args

import torch
from torch import Generator, Tensor

from disco import gram, polar
from disco.polar import EPS

Layout = Literal["out_in", "in_out"]

LARGE = 2**16
"""Elements of a matrix from which a CPU gains nothing from computing several as one batch."""


@dataclass(frozen=True, kw_only=True)
class OperatorNorm(abc.ABC):
    """A norm of weight tensors together with its duality map. Subclasses see the d_out x d_in form only."""

    layout: Layout = "out_in"
    batch_dims: int = 0
    orthogonalize: polar.Method = "polar_express"
    steps: int = 5
    dtype: torch.dtype | None = None
    """Precision of the orthogonalisation; None: float32 on a CPU, bfloat16 elsewhere, float64 for float64."""
    fast: bool = False
    """Orthogonalise by ``gram.orthogonalize``: the same to rounding, with fewer operations."""
    compiled: bool = False
    """That, compiled."""

    name: ClassVar[str]
    matrix_dims: ClassVar[str] = "a matrix"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {self.layout!r}")
        if self.batch_dims < 0:
            raise ValueError(f"batch_dims must be 0 or more, got {self.batch_dims}")
        polar.check(self.orthogonalize, self.steps)

    def value(self, weight: Tensor, *, exact: bool = False) -> Tensor:
        """The norm, in at least float32, shape ``weight.shape[:batch_dims]``.

        ``exact`` asks for an SVD where the fast way is not exact (``rms_to_rms`` and ``conv``: see ``sigma_max``).

        Raises:
            ValueError: the tensor does not have the dimensions that this norm is for.
        """
        return self._value(_at_least_float32(self._oriented(weight)), exact)

    def lmo(self, gradient: Tensor) -> Tensor:
        """The steepest step: same shape, layout and dtype as ``gradient``; zero where the gradient is zero.

        With exact orthogonalisation <G, lmo(G)> is the dual norm and value(lmo(G)) = 1; otherwise the value lies
        near 1 and never above ``maximum``.

        Raises:
            ValueError: the tensor does not have the dimensions that this norm is for.
        """
        return self._stored(self._lmo(self._oriented(gradient))).to(gradient.dtype)

    def lmo_each(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """``lmo`` of each gradient, those of one shape and dtype as one batch: fewer, larger operations."""
        batches: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for index, gradient in enumerate(gradients):
            batches.setdefault((gradient.shape, gradient.dtype), []).append(index)
        result = list(gradients)
        for (shape, _), indices in batches.items():
            large = shape[self.batch_dims :].numel() > LARGE
            if len(indices) == 1 or (large and gradients[0].device.type == "cpu"):
                for index in indices:
                    result[index] = self.lmo(gradients[index])
                continue
            stacked = torch.stack([gradients[index] for index in indices])
            steps = replace(self, batch_dims=self.batch_dims + 1).lmo(stacked)
            for index, step in zip(indices, steps.unbind(), strict=True):
                result[index] = step
        return result

    def init_(self, weight: Tensor, *, scale: float = 1.0, generator: Generator | None = None) -> Tensor:
        """Fills ``weight`` in place with random weights of norm ``scale`` and returns it."""
        oriented = self._oriented(weight)
        with torch.no_grad():
            fresh = torch.empty(oriented.shape, dtype=torch.float32, device=weight.device)
            return weight.copy_(self._stored(self._init(fresh, generator) * scale))

    @property
    def maximum(self) -> float:
        """The largest value(lmo(G)) in exact arithmetic."""
        return 1.0

    @abc.abstractmethod
    def _value(self, weight: Tensor, exact: bool) -> Tensor: ...

    @abc.abstractmethod
    def _lmo(self, gradient: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _init(self, fresh: Tensor, generator: Generator | None) -> Tensor: ...

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor has the dimensions that this norm is for."""
        return self._fits(tensor.ndim - self.batch_dims)

    def _fits(self, dims: int) -> bool:
        return dims == 2

    def check(self, tensor: Tensor) -> None:
        """Raises ValueError if the tensor does not have the dimensions that this norm is for."""
        if not self.fits(tensor):
            raise ValueError(
                f"norm {self.name} is for {self.matrix_dims} after {self.batch_dims} batch dimensions, "
                f"got shape {tuple(tensor.shape)}; choose another norm or set batch_dims"
            )

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor as [batch..., d_out, d_in], kernels flattened into d_in; a vector is a row."""
        if tensor.ndim - self.batch_dims < 2:
            return tensor.reshape(*tensor.shape[: self.batch_dims], 1, -1)
        return self._stored(tensor).flatten(self.batch_dims + 1)

    def _oriented(self, tensor: Tensor) -> Tensor:
        """View of ``tensor`` as [batch..., out, in, ...]."""
        self.check(tensor)
        return self._stored(tensor)

    def _stored(self, tensor: Tensor) -> Tensor:
        """Swaps the out and in dimensions when they are stored the other way round (its own inverse)."""
        return tensor.transpose(self.batch_dims, self.batch_dims + 1) if self.layout == "in_out" else tensor


@final
class OneToRms(OperatorNorm):
    """One-hot input to RMS output: the largest column."""

    name = "one_to_rms"

    def _value(self, weight: Tensor, exact: bool) -> Tensor:
        return _columns(weight).amax(dim=(-2, -1)) / math.sqrt(weight.shape[-2])

    def _lmo(self, gradient: Tensor) -> Tensor:
        return gradient * (math.sqrt(gradient.shape[-2]) / _columns(gradient).clamp_min(EPS))

    def _init(self, fresh: Tensor, generator: Generator | None) -> Tensor:
        return self._lmo(fresh.normal_(generator=generator))


@final
class RmsToInf(OperatorNorm):
    """RMS input to the largest output: the largest row."""

    name = "rms_to_inf"

    def _value(self, weight: Tensor, exact: bool) -> Tensor:
        return _rows(weight).amax(dim=(-2, -1)) * math.sqrt(weight.shape[-1])

    def _lmo(self, gradient: Tensor) -> Tensor:
        return gradient / (_rows(gradient).clamp_min(EPS) * math.sqrt(gradient.shape[-1]))

    def _init(self, fresh: Tensor, generator: Generator | None) -> Tensor:
        return self._lmo(fresh.normal_(generator=generator))


@final
class OneToInf(OperatorNorm):
    """One-hot input to the largest output, times d_in: the largest entry."""

    name = "one_to_inf"

    def _value(self, weight: Tensor, exact: bool) -> Tensor:
        return weight.abs().amax(dim=(-2, -1)) * weight.shape[-1]

    def _lmo(self, gradient: Tensor) -> Tensor:
        return gradient.sign() / gradient.shape[-1]

    def _init(self, fresh: Tensor, generator: Generator | None) -> Tensor:
        return self._lmo(fresh.normal_(generator=generator))


@final
class Rms(OperatorNorm):
    """RMS of a vector or a scalar; has no layout. Initialised as a gain, to ones."""

    name = "rms"
    matrix_dims = "a vector or a scalar"

    def _fits(self, dims: int) -> bool:
        return dims in (0, 1)

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor

    def _rms(self, vector: Tensor) -> Tensor:
        flat = vector.unsqueeze(-1) if vector.ndim == self.batch_dims else vector
        norm = torch.linalg.vector_norm(_at_least_float32(flat), dim=-1) / math.sqrt(max(flat.shape[-1], 1))
        return norm if vector.ndim == self.batch_dims else norm.unsqueeze(-1)

    def _value(self, weight: Tensor, exact: bool) -> Tensor:
        rms = self._rms(weight)
        return rms if weight.ndim == self.batch_dims else rms.squeeze(-1)

    def _lmo(self, gradient: Tensor) -> Tensor:
        return gradient / self._rms(gradient).clamp_min(EPS)

    def _init(self, fresh: Tensor, generator: Generator | None) -> Tensor:
        return fresh.fill_(1.0)


@dataclass(frozen=True, kw_only=True)
class Spectral(OperatorNorm):
    """What matrices and convolutions share: a size factor times the polar factor."""

    @property
    def maximum(self) -> float:
        return polar.accuracy(self.orthogonalize, self.steps).maximum

    def size(self, shape: Sequence[int]) -> float:
        """value(D) of a D of this shape with all singular values 1; the LMO divides by it."""
        at = self.batch_dims
        out, into, *kernel = shape[at:] if self.layout == "out_in" else (shape[at + 1], shape[at], *shape[at + 2 :])
        return math.sqrt(into / out) * math.prod(kernel)

    def matrix(self, tensor: Tensor) -> Tensor:
        """View of a stored tensor as [batch..., d_out, d_in], kernels flattened into d_in."""
        return self._matrix(self._stored(tensor))

    def unmatrix(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``matrix`` for a tensor of the stored ``shape``."""
        at = self.batch_dims
        stored = shape if self.layout == "out_in" else (*shape[:at], shape[at + 1], shape[at], *shape[at + 2 :])
        return self._stored(matrix.reshape(stored))

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor

    def _oriented_size(self, weight: Tensor) -> float:
        return self.size(self._stored(weight).shape)

    def _value(self, weight: Tensor, exact: bool) -> Tensor:
        return sigma_max(self._matrix(weight), exact=exact) * self._oriented_size(weight)

    def _lmo(self, gradient: Tensor) -> Tensor:
        matrix = self._matrix(gradient)
        orthogonalize = polar.orthogonalize
        if self.fast:
            orthogonalize = gram.compiled(gram.orthogonalize) if self.compiled else gram.orthogonalize
        factor = orthogonalize(matrix, self.orthogonalize, self.steps, dtype=self.dtype)
        return factor.reshape(gradient.shape) / self._oriented_size(gradient)

    def _init(self, fresh: Tensor, generator: Generator | None) -> Tensor:
        matrix = self._matrix(fresh.normal_(generator=generator))
        tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
        q, r = torch.linalg.qr(tall)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # makes the distribution uniform (Haar)
        q = q if tall is matrix else q.mT
        return q.reshape(fresh.shape) / self._oriented_size(fresh)


@final
class RmsToRms(Spectral):
    """RMS input to RMS output: the spectral norm scaled by the shape."""

    name = "rms_to_rms"


@final
class Conv(Spectral):
    """A convolution [out, in, kernel...] bounded by the spectral norm of its out x (in * kernel) matrix."""

    name = "conv"
    matrix_dims = "a convolution (out, in, kernel...)"

    def _fits(self, dims: int) -> bool:
        return dims >= 3

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.batch_dims + 1)


NORMS: dict[str, type[OperatorNorm]] = {kind.name: kind for kind in (OneToRms, RmsToRms, RmsToInf, OneToInf, Rms, Conv)}


def norm(
    name: str,
    *,
    layout: str = "out_in",
    batch_dims: int = 0,
    orthogonalize: str = "polar_express",
    steps: int = 5,
    dtype: torch.dtype | None = None,
) -> OperatorNorm:
    """The operator norm called ``name`` (see the module's table).

    Raises:
        ValueError: unknown name, layout or orthogonalisation.
    """
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; known: {', '.join(NORMS)}")
    return NORMS[name](
        layout=cast(Layout, layout),
        batch_dims=batch_dims,
        orthogonalize=cast(polar.Method, orthogonalize),
        steps=steps,
        dtype=dtype,
    )


def sigma_max(matrix: Tensor, *, exact: bool = False) -> Tensor:
    """Largest singular value of each matrix in [..., m, n].

    By default the square root of the largest eigenvalue of the smaller Gram matrix, formed in float32 after scaling by
    the largest entry: relative error below 1e-5 (about 1e-6 seen), for the top of the spectrum does not suffer from
    squaring. ``exact`` takes an SVD. A matrix with infinite or NaN entries gives NaN.
    """
    x = _at_least_float32(matrix)
    if x.numel() == 0:
        return x.new_zeros(x.shape[:-2])
    finite = x.isfinite().all(dim=-1).all(dim=-1)
    x = torch.where(finite[..., None, None], x, 0.0)  # LAPACK refuses what it cannot order
    if exact:
        return torch.where(finite, torch.linalg.svdvals(x)[..., 0], torch.nan)
    scale = x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(EPS)
    x = x / scale
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    return torch.where(finite, torch.linalg.eigvalsh(gram)[..., -1].sqrt() * scale[..., 0, 0], torch.nan)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _columns(matrix: Tensor) -> Tensor:
    return sum_of_squares(matrix, (-2,)).sqrt()


def _rows(matrix: Tensor) -> Tensor:
    return sum_of_squares(matrix, (-1,)).sqrt()


def sum_of_squares(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Over dimensions that are kept with length 1, in at least float32."""
    x = _at_least_float32(tensor)
    if len(dims) == 1 and x.stride(dims[0]) != 1:  # vector_norm is some 20 times slower across a CPU's cache lines
        return x.square().sum(dims, keepdim=True)
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True).square()
