"""Carries out a plan on one rank: exchange, orthogonalise, exchange back, while the next bucket is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from disco import gram
from disco.distributed import exchange
from disco.distributed.buckets import Job, Plan, Transfer, holders
from disco.distributed.exchange import Pending
from disco.distributed.failure import listed
from disco.distributed.layout import Box, overlap, shape_of
from disco.distributed.reduce import all_gather, all_reduce
from disco.norms import OperatorNorm, Spectral

Apply = Callable[[int, list[tuple[tuple[slice, ...], Tensor]]], None]
"""(entry, [(slices of the local tensor, direction)]): what the pipeline hands out."""


class Pipeline:
    """A plan, with the means to carry it out.

    Args:
        plan: what to do; the same on all ranks of ``group``.
        operators: the norm of each entry.
        rank: this global rank.
        group: of ``plan.ranks``; None if nothing moves.
        team: global ranks -> their process group.
    """

    def __init__(
        self,
        plan: Plan,
        operators: Sequence[OperatorNorm],
        rank: int,
        group: ProcessGroup | None,
        team: Callable[[tuple[int, ...]], ProcessGroup],
    ) -> None:
        self.plan = plan
        self._operators = [cast(Spectral, operator) for operator in operators]
        self._rank = rank
        self._group = group
        self._team = team

    def run(self, tensors: Sequence[Tensor], apply: Apply) -> None:
        """Calls ``apply`` with the LMO of ``tensors``, the local tensors of the entries, as the parts become known."""
        buckets = self.plan.buckets
        there = [self._send(buckets[0], tensors)] if buckets else []
        for run in self.plan.in_place:
            self._apply(tensors, self._compute(run, tensors, None), apply)
        pending: list[tuple[Sequence[Job], Pending | None, list[tuple[Job, Box, Tensor]]]] = []
        for number, bucket in enumerate(buckets):
            if number + 1 < len(buckets):
                there.append(self._send(buckets[number + 1], tensors))
            results = self._compute(bucket, tensors, there.pop(0))
            pending.append((bucket, self._return(bucket, results, tensors), results))
            if number:
                self._receive(*pending.pop(0), tensors, apply)
        for last in pending:
            self._receive(*last, tensors, apply)

    # Local tensors and boxes of global indices

    def _slices(self, entry: int, box: Box) -> tuple[slice, ...]:
        for piece in self.plan.entries[entry].layout.pieces(self._rank):
            if overlap(piece.box, box) == box:
                return piece.within(box)
        raise AssertionError("a box that this rank does not hold")

    def _mine(self, job: Job, ranks: Sequence[int]) -> list[tuple[slice, ...]]:
        """Local slices of what this rank holds of a job, if it is one of ``ranks``."""
        if self._rank not in ranks:
            return []
        pieces = self.plan.entries[job.entry].layout.pieces(self._rank)
        parts = [(piece, overlap(piece.box, job.box)) for piece in pieces]
        return [piece.within(box) for piece, box in parts if box is not None]

    def _moving(self, transfers: Iterator[Transfer]) -> list[Transfer]:
        return [t for t in transfers if t[0] != t[1] and self._rank in t[:2]]

    def _start(
        self,
        verb: str,
        bucket: Sequence[Job],
        sends: list[tuple[int, Tensor]],
        receives: list[tuple[int, int]],
        tensors: Sequence[Tensor],
    ) -> Pending:
        names = listed(list(dict.fromkeys(self.plan.entries[job.entry].name for job in bucket)))
        like, what = tensors[bucket[0].entry], f"the {verb} of {names}"
        return exchange.start(cast(ProcessGroup, self._group), sends, receives, like, what)

    # There

    def _send(self, bucket: Sequence[Job], tensors: Sequence[Tensor]) -> Pending | None:
        if not any(job.gram or any(s != t for s, t, _ in self.plan.out(job)) for job in bucket):
            return None
        sends: list[tuple[int, Tensor]] = []
        receives: list[tuple[int, int]] = []
        for job in bucket:
            tensor = tensors[job.entry]
            if job.gram:
                seat = job.seats[0][0]
                if self._rank == seat:
                    receives += [(rank, job.triangle) for rank in self._others(job, job.rows[0])]
                elif self._mine(job, job.rows[0]):
                    sends.append((seat, gram.pack(self._partial(job, tensor))))
                continue
            for source, target, box in self._moving(self.plan.out(job)):
                if source == self._rank:
                    sends.append((target, tensor[self._slices(job.entry, box)]))
                else:
                    receives.append((source, _volume(box)))
        return self._start("gathering", bucket, sends, receives, tensors)

    def _others(self, job: Job, ranks: Sequence[int]) -> list[int]:
        """The ranks other than the seat of a job of the route gram that hold a shard."""
        layout = self.plan.entries[job.entry].layout
        return [rank for rank in holders(layout, ranks, job.box) if rank != job.seats[0][0]]

    def _partial(self, job: Job, tensor: Tensor) -> Tensor:
        """X X^T of this rank's shard."""
        operator = self._operators[job.entry]
        wide = [_wide(operator, tensor[s], _tall(operator, job)) for s in self._mine(job, (self._rank,))]
        result = gram.symmetric(wide[0], wide[0].mT)
        for x in wide[1:]:
            result += x @ x.mT
        return result

    # At the seats

    def _compute(
        self, bucket: Sequence[Job], tensors: Sequence[Tensor], there: Pending | None
    ) -> list[tuple[Job, Box, Tensor]]:
        """(job, box, LMO) of the jobs at which this rank has a seat; of the route gram Q instead of the LMO."""
        received = iter(there.wait() if there is not None else ())
        results: list[tuple[Job, Box, Tensor]] = []
        alone: dict[Spectral, list[tuple[Job, Tensor]]] = {}
        for job in bucket:
            box = dict(job.seats).get(self._rank)
            if box is None:
                continue
            operator, tensor = self._operators[job.entry], tensors[job.entry]
            if job.gram:
                total = self._partial(job, tensor) if self._mine(job, job.rows[0]) else None
                for _ in self._others(job, job.rows[0]):
                    part = gram.unpack(next(received), job.side)
                    total = part if total is None else total.add_(part)
                assert total is not None
                factor = gram.compiled(gram.factor) if operator.compiled else gram.factor
                results.append((job, box, factor(total, operator.orthogonalize, operator.steps)))
                continue
            block = self._assemble(job, box, tensor, received)
            if len(job.seats) == 1:
                alone.setdefault(operator, []).append((job, block))
            else:
                results.append((job, box, self._shared(job, block)))
        for operator, jobs in alone.items():
            lmos = operator.lmo_each([block for _, block in jobs])
            results += [(job, job.box, lmo) for (job, _), lmo in zip(jobs, lmos, strict=True)]
        return results

    def _assemble(self, job: Job, box: Box, tensor: Tensor, received: Iterator[Tensor]) -> Tensor:
        """What a seat needs, from what this rank holds and what it received."""
        transfers = [t for t in self.plan.out(job) if t[1] == self._rank]
        if len(transfers) == 1 and transfers[0][0] == self._rank:
            return tensor[self._slices(job.entry, box)]
        block = tensor.new_empty(shape_of(box))
        for source, _, part in transfers:
            at = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(part, box, strict=True))
            if source == self._rank:
                block[at] = tensor[self._slices(job.entry, part)]
            else:
                block[at] = next(received).view(shape_of(part))
        return block

    def _shared(self, job: Job, block: Tensor) -> Tensor:
        """The LMO of one slab of a matrix that a team shares: its Gram matrix summed, products shared by rows."""
        operator = self._operators[job.entry]
        group = self._team(tuple(seat for seat, _ in job.seats))
        tall = _tall(operator, job)
        x = _wide(operator, block, tall)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = x @ x.mT
        all_reduce([(total, [group])], what="the sum of a team's Gram matrices")
        size, index = dist.get_world_size(group), dist.get_group_rank(group, self._rank)
        height = -(-job.side // size)

        def product(a: Tensor, b: Tensor) -> Tensor:
            rows = a.new_zeros(height, job.side)
            mine = a[height * index : height * (index + 1)]
            torch.mm(mine, b, out=rows[: len(mine)])
            return all_gather(rows, group, "a product that a team shares").flatten(0, 1)[: job.side]

        q = gram.factor(total, operator.orthogonalize, operator.steps, product)
        return _narrow(operator, q @ x, block, tall) / operator.size(shape_of(job.box))

    # Back

    def _return(
        self, bucket: Sequence[Job], results: list[tuple[Job, Box, Tensor]], tensors: Sequence[Tensor]
    ) -> Pending | None:
        if not any(job.gram or any(s != t for s, t, _ in self.plan.back(job)) for job in bucket):
            return None
        by_job = {id(job): (box, result) for job, box, result in results}
        sends: list[tuple[int, Tensor]] = []
        receives: list[tuple[int, int]] = []
        for job in bucket:
            if job.gram:
                if id(job) in by_job:
                    packed = gram.pack(by_job[id(job)][1])
                    sends += [(rank, packed) for rank in self._others(job, job.audience)]
                elif self._mine(job, job.audience):
                    receives.append((job.seats[0][0], job.triangle))
                continue
            for seat, target, box in self._moving(self.plan.back(job)):
                if seat == self._rank:
                    whole, result = by_job[id(job)]
                    at = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(box, whole, strict=True))
                    sends.append((target, result[at]))
                else:
                    receives.append((seat, _volume(box)))
        return self._start("return", bucket, sends, receives, tensors)

    def _receive(
        self,
        bucket: Sequence[Job],
        pending: Pending | None,
        results: list[tuple[Job, Box, Tensor]],
        tensors: Sequence[Tensor],
        apply: Apply,
    ) -> None:
        received = iter(pending.wait() if pending is not None else ())
        mine = {id(job) for job, _, _ in results}
        for job in bucket:
            if job.gram:
                if id(job) not in mine and self._mine(job, job.audience):
                    self._apply(tensors, [(job, job.box, gram.unpack(next(received), job.side))], apply)
                continue
            parts = [
                (self._slices(job.entry, box), next(received).view(shape_of(box)))
                for _, _, box in (t for t in self._moving(self.plan.back(job)) if t[1] == self._rank)
            ]
            if parts:
                apply(job.entry, parts)
        self._apply(tensors, results, apply)

    def _apply(self, tensors: Sequence[Tensor], results: list[tuple[Job, Box, Tensor]], apply: Apply) -> None:
        """Hands out what this rank computed for itself."""
        for job, whole, result in results:
            operator, parts = self._operators[job.entry], []
            if job.gram:
                tall = _tall(operator, job)
                size = operator.size(shape_of(job.box))
                for slices in self._mine(job, job.audience):
                    shard = tensors[job.entry][slices]
                    parts.append(
                        (slices, _narrow(operator, (result / size) @ _wide(operator, shard, tall), shard, tall))
                    )
            else:
                for seat, rank, box in self.plan.back(job):
                    if seat == rank == self._rank:
                        at = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(box, whole, strict=True))
                        parts.append((self._slices(job.entry, box), result[at]))
            if parts:
                apply(job.entry, parts)


def _volume(box: Box) -> int:
    size = 1
    for start, stop in box:
        size *= stop - start
    return size


def _tall(operator: Spectral, job: Job) -> bool:
    shape = shape_of(job.box)
    outputs = shape[1 if operator.layout == "in_out" else 0]
    return outputs >= _volume(job.box) // outputs


def _wide(operator: Spectral, shard: Tensor, tall: bool) -> Tensor:
    """A shard as a matrix of the short side x its part of the long side."""
    x = operator.matrix(shard)
    return x.mT if tall else x


def _narrow(operator: Spectral, x: Tensor, shard: Tensor, tall: bool) -> Tensor:
    """The inverse of ``_wide``."""
    return operator.unmatrix(x.mT if tall else x, shard.shape)
