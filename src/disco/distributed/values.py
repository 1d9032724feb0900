"""Norms of sharded matrices without gathering them.

Every rank adds what its shards contribute to a few numbers (sums of squares of rows or columns, a Gram matrix, products
with a block of vectors), and small all-reduces do the rest. Of replicas only the first contributes.

The spectral norm is the root of the largest eigenvalue of the Gram matrix of the short side where that is short
(``GRAM``) and no shard cuts it, with the error of ``norms.sigma_max``; otherwise an estimate by subspace iteration
(Halko et al., arXiv:0909.4061, algorithm 4.4) that starts from the vectors of the last call: it never exceeds the true
value by more than rounding, and docs/distributed.md has its measured error.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed.layout import Box, Layout, overlap, whole
from disco.distributed.reduce import MAX, SUM, all_reduce
from disco.norms import OperatorNorm, Spectral
from disco.spectrum import MEASURES

GRAM = 256
"""Short sides up to this length take the Gram matrix."""

VECTORS = 8
COLD, WARM = 20, 2
"""Iterations from random vectors, and from those of the last call."""


@dataclass(frozen=True)
class Part:
    """One parameter, its momentum or its update, as this rank holds it.

    Attributes:
        local: this rank's local tensor.
        layout: of the global tensor.
        rank: this global rank.
        groups: of each mesh dimension; None where its size is 1.
        operator: the norm to measure.
        split: sizes of fused parts along the output dimension; () if there is one.
        key: identifies the matrix between calls.
    """

    local: Tensor
    layout: Layout
    rank: int
    groups: tuple[ProcessGroup | None, ...]
    operator: OperatorNorm
    split: tuple[int, ...] = ()
    key: Hashable = None


@dataclass
class _Unit:
    """A batch of matrices [batch, out, in] of one part, and this rank's shards of them."""

    part: Part
    index: int
    position: int
    """Which of the fused parts it is."""
    sizes: tuple[int, int, int]
    shards: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(indices in the batch, in the outputs, in the inputs, entries)."""
    cut: set[str] = field(default_factory=set)
    """Which of "out" and "in" are cut on some rank."""

    @property
    def over(self) -> list[ProcessGroup]:
        return [group for group in self.part.groups if group is not None]

    def empty(self, *shape: int) -> Tensor:
        dtype = torch.promote_types(self.part.local.dtype, torch.float32)
        return torch.zeros(shape, dtype=dtype, device=self.part.local.device)

    def squares(self, of: str) -> Tensor:
        """Sums of squares of rows ("out"), of columns ("in") or of everything ("all"), of this rank's shards."""
        batch, outs, ins = self.sizes
        length = {"out": outs, "in": ins, "all": 1}[of]
        result = self.empty(batch, length)
        for at, out, into, x in self.shards:
            dim = {"out": (2,), "in": (1,), "all": (1, 2)}[of]
            target = {"out": out, "in": into, "all": torch.zeros(1, dtype=torch.long, device=x.device)}[of]
            result[at.unsqueeze(1), target.unsqueeze(0)] += x.square().sum(dim).reshape(len(at), -1)
        return result

    def largest(self) -> Tensor:
        result = self.empty(1)
        for _, _, _, x in self.shards:
            result = torch.maximum(result, x.abs().max())
        return result

    def gram(self) -> Tensor:
        """X X^T or X^T X, whichever is smaller, of this rank's shards."""
        batch, outs, ins = self.sizes
        result = self.empty(batch, min(outs, ins), min(outs, ins))
        for at, _, _, x in self.shards:
            result[at] += x @ x.mT if outs <= ins else x.mT @ x
        return result

    def times(self, vectors: Tensor, transposed: bool) -> Tensor:
        """X V, or X^T V, of this rank's shards."""
        batch, outs, ins = self.sizes
        result = self.empty(batch, ins if transposed else outs, vectors.shape[-1])
        for at, out, into, x in self.shards:
            rows, columns = (into, out) if transposed else (out, into)
            product = (x.mT if transposed else x) @ vectors[at.unsqueeze(1), columns.unsqueeze(0)]
            result[at.unsqueeze(1), rows.unsqueeze(0)] += product
        return result


class Values:
    """Measures norms, and remembers the vectors of its iterations between calls."""

    def __init__(self) -> None:
        self._vectors: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def measure(self, parts: Sequence[Part], which: str | None = None, *, exact: bool = False) -> list[float]:
        """The largest norm over the batch and the fused parts of each part.

        Args:
            parts: the same on all ranks that share them, in the same order; all of these ranks must call this.
            which: "frobenius", "max_abs" or "stable_rank"; otherwise the operators tell.
            exact: take the Gram matrix of every matrix whose short side is not cut.
        """
        if not parts:
            return []
        units = [unit for index, part in enumerate(parts) for unit in _units(part, index)]
        kinds = [which if which in MEASURES else unit.part.operator.name for unit in units]
        sums, maxima = {}, {}
        wanted = {"one_to_rms": "in", "rms_to_inf": "out", "rms": "all", "frobenius": "all", "stable_rank": "all"}
        for i, (unit, kind) in enumerate(zip(units, kinds, strict=True)):
            if kind in ("one_to_inf", "max_abs"):
                maxima[i] = unit.largest()
            elif kind in wanted:
                sums[i] = unit.squares(wanted[kind])
        all_reduce([(tensor, units[i].over) for i, tensor in sums.items()], SUM)
        all_reduce([(tensor, units[i].over) for i, tensor in maxima.items()], MAX)
        spectral = [i for i, kind in enumerate(kinds) if kind in ("rms_to_rms", "conv", "stable_rank")]
        sigma = dict(zip(spectral, self._sigma_max([units[i] for i in spectral], exact), strict=True))
        values = []
        for i, (unit, kind) in enumerate(zip(units, kinds, strict=True)):
            _, outs, ins = unit.sizes
            if kind in ("rms_to_rms", "conv"):
                shape = unit.part.layout.shape
                size = math.sqrt(ins / outs)
                if kind == "conv" and isinstance(unit.part.operator, Spectral):
                    size = unit.part.operator.size(shape)
                values.append(sigma[i].max() * size)
            elif kind == "stable_rank":
                values.append((sums[i][:, 0] / sigma[i].square().clamp_min(1e-38)).max())
            elif kind == "frobenius":
                values.append(sums[i].max().sqrt())
            elif kind in ("one_to_inf", "max_abs"):
                values.append(maxima[i][0] * (ins if kind == "one_to_inf" else 1))
            else:
                factor = {"one_to_rms": 1 / math.sqrt(outs), "rms_to_inf": math.sqrt(ins), "rms": 1 / math.sqrt(ins)}
                values.append(sums[i].max().sqrt() * factor[kind])
        result = [-math.inf] * len(parts)
        for unit, value in zip(units, torch.stack([v.double() for v in values]).tolist(), strict=True):
            known = result[unit.index]
            result[unit.index] = value if math.isnan(value) or value > known else known
        return result

    def _sigma_max(self, units: list[_Unit], exact: bool) -> list[Tensor]:
        """Largest singular values, [batch] for each unit."""
        result: dict[int, Tensor] = {}
        short = {i for i, u in enumerate(units) if min(u.sizes[1:]) <= GRAM or exact}
        by_gram = {i for i in short if ("out" if units[i].sizes[1] <= units[i].sizes[2] else "in") not in units[i].cut}
        grams = {i: units[i].gram() for i in sorted(by_gram)}
        all_reduce([(gram, units[i].over) for i, gram in grams.items()])
        for i, gram in grams.items():
            scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
            finite = scale.isfinite() & gram.flatten(1).isfinite().all(1)
            safe = torch.where(finite, scale, 1.0).clamp_min(1e-38)[:, None, None]
            largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], gram / safe, 0.0))[:, -1].clamp_min(0)
            result[i] = torch.where(finite, (largest * safe[:, 0, 0]).sqrt(), torch.nan)
        iterated = [i for i in range(len(units)) if i not in by_gram]
        result |= dict(zip(iterated, self._iterate([units[i] for i in iterated]), strict=True))
        return [result[i] for i in range(len(units))]

    def _iterate(self, units: list[_Unit]) -> list[Tensor]:
        vectors, rounds = [], 0
        for unit in units:
            known = self._vectors.get((unit.part.key, unit.position)) if unit.part.key is not None else None
            rounds = max(rounds, WARM if known is not None else COLD)
            vectors.append(known if known is not None else _start(unit))
        largest = [unit.empty(unit.sizes[0]) for unit in units]
        for _ in range(rounds if units else 0):
            images = [unit.times(v, False) for unit, v in zip(units, vectors, strict=True)]
            all_reduce([(y, unit.over) for unit, y in zip(units, images, strict=True)])
            bases = [_orthonormal(y) for y in images]
            back = [unit.times(q, True) for unit, q in zip(units, bases, strict=True)]
            all_reduce([(z, unit.over) for unit, z in zip(units, back, strict=True)])
            largest = [_largest(z) for z in back]
            vectors = [_orthonormal(z) for z in back]
        for unit, v in zip(units, vectors, strict=True):
            if unit.part.key is not None and v.isfinite().all():
                self._vectors[(unit.part.key, unit.position)] = v
        return largest


def _start(unit: _Unit) -> Tensor:
    batch, outs, ins = unit.sizes
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(batch, ins, min(VECTORS, outs, ins), generator=generator)
    return start.to(unit.empty(1))


def _orthonormal(y: Tensor) -> Tensor:
    return torch.linalg.qr(y / y.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-38))[0]


def _largest(z: Tensor) -> Tensor:
    gram = z.mT @ z
    finite = gram.isfinite().all(-1).all(-1)
    largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], gram, 0.0))[:, -1].clamp_min(0).sqrt()
    return torch.where(finite, largest, torch.nan)


def _units(part: Part, index: int) -> list[_Unit]:
    """The matrices of a part; a vector is one row."""
    operator, shape = part.operator, part.layout.shape
    batch_dims, dims = operator.batch_dims, len(shape) - operator.batch_dims
    out_dim = batch_dims + (operator.layout == "in_out") if dims >= 2 else None
    boxes: list[Box] = [whole(shape)]
    if part.split and out_dim is not None:
        ends = [sum(part.split[: i + 1]) for i in range(len(part.split))]
        boxes = [
            (*boxes[0][:out_dim], (end - size, end), *boxes[0][out_dim + 1 :])
            for end, size in zip(ends, part.split, strict=True)
        ]
    return [_unit(part, index, position, box, out_dim) for position, box in enumerate(boxes)]


def _unit(part: Part, index: int, position: int, box: Box, out_dim: int | None) -> _Unit:
    batch_dims = part.operator.batch_dims
    lengths = [stop - start for start, stop in box]
    batch = math.prod(lengths[:batch_dims])
    outs = 1 if out_dim is None else lengths[out_dim]
    ins_dims = [d for d in range(batch_dims, len(box)) if d != out_dim]
    ins = math.prod(lengths[d] for d in ins_dims)
    unit = _Unit(part, index, position, (batch, outs, ins))
    for rank in part.layout.rows[0]:
        for piece in part.layout.pieces(rank):
            held = overlap(piece.box, box)
            if held is None:
                continue
            if out_dim is not None and held[out_dim] != box[out_dim]:
                unit.cut.add("out")
            if any(held[d] != box[d] for d in ins_dims):
                unit.cut.add("in")
            if rank == part.rank:
                x = part.local[piece.within(held)]
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                if out_dim is not None:
                    x = x.movedim(out_dim, batch_dims)
                at = [slice(a - low, b - low) for (a, b), (low, _) in zip(held, box, strict=True)]
                rows = torch.arange(outs)[at[out_dim]] if out_dim is not None else torch.arange(1)
                unit.shards.append(
                    (
                        _flat(lengths[:batch_dims], at[:batch_dims]).to(x.device),
                        rows.to(x.device),
                        _flat([lengths[d] for d in ins_dims], [at[d] for d in ins_dims]).to(x.device),
                        x.reshape(math.prod(x.shape[:batch_dims]), len(rows), -1),
                    )
                )
    return unit


def _flat(lengths: Sequence[int], at: Sequence[slice]) -> Tensor:
    """Positions of a box among the flattened indices of dimensions of these lengths."""
    return torch.arange(math.prod(lengths)).view(*lengths)[tuple(at)].flatten() if lengths else torch.arange(1)
