"""Who orthogonalises what, and what moves for it. Pure: shapes and layouts in, a plan out, the same on every rank.

A ``Job`` is one matrix (or a stack of them) to be orthogonalised by its ``seats``. There are three routes:

* whole: one seat gathers the matrix, computes, and hands out the result: 2 m n (1 - 1/S) elements for S shards;
* gram: nothing but Gram matrices moves. Each shard of a matrix cut along its long side sends the triangle of its own
  X X^T to the seat, gets the triangle of Q back, and applies it: about m^2 (S - 1) elements;
* team: several seats share a matrix that would take one rank longer than all the rest takes everybody; each has a slab.

The cost of a job is its floating-point operations plus ``Cost.element`` for each element sent. Where replicas hold the
same shards, it decides whether each computes for itself or one computes for all. Owners are balanced by work, longest
job first (Graham 1969).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from disco import gram
from disco.distributed.layout import Box, Layout, chunk, overlap, shape_of, volume, whole


@dataclass(frozen=True)
class Cost:
    """What things cost in floating-point operations of one rank, and what fits.

    Attributes:
        element: sending one element to another rank.
        call: starting one collective of a team.
        limit: elements in flight in one bucket.
        halved: whether symmetric products do half of their operations.
        allow_gram: whether the precision permits Gram forms.
    """

    element: float = 250.0
    call: float = 2e7
    limit: int = 2**22
    halved: bool = True
    allow_gram: bool = True


@dataclass(frozen=True)
class Entry:
    """One parameter whose matrices are orthogonalised; ``steps`` is None for an SVD."""

    name: str
    layout: Layout
    out_dim: int = 0
    batch_dims: int = 0
    split: tuple[int, ...] = ()
    steps: int | None = 5


@dataclass(frozen=True)
class Job:
    """Matrices of one entry, who computes them and who takes part.

    Attributes:
        entry: index of the entry.
        box: global indices of the matrices.
        seats: ranks that compute, each with the part of ``box`` that it needs.
        rows: for each seat the ranks that supply it.
        audience: ranks that need the result.
        gram: only Gram matrices move.
        flops: operations of one seat.
        side: the short side of the matrix.
    """

    entry: int
    box: Box
    seats: tuple[tuple[int, Box], ...]
    rows: tuple[tuple[int, ...], ...]
    audience: tuple[int, ...]
    flops: float
    side: int
    gram: bool = False

    @property
    def triangle(self) -> int:
        return gram.packed(self.side)


Transfer = tuple[int, int, Box]
"""(from rank, to rank, global indices)."""


@dataclass(frozen=True)
class Plan:
    """What ``plan`` decided."""

    entries: tuple[Entry, ...]
    ranks: tuple[int, ...]
    in_place: tuple[tuple[Job, ...], ...]
    """Jobs for which nothing moves, in runs that fit in memory."""
    buckets: tuple[tuple[Job, ...], ...]
    """The others, in runs that move together."""
    load: dict[int, float] = field(hash=False)
    """Floating-point operations by rank."""

    def out(self, job: Job) -> Iterator[Transfer]:
        """What seats need from others before they compute."""
        layout = self.entries[job.entry].layout
        for (seat, box), row in zip(job.seats, job.rows, strict=True):
            for source in row:
                for part in _held(layout, source, box):
                    yield source, seat, part

    def back(self, job: Job) -> Iterator[Transfer]:
        """What others need from the seats afterwards."""
        layout = self.entries[job.entry].layout
        for seat, box in job.seats:
            for rank in job.audience:
                for part in _held(layout, rank, box):
                    yield seat, rank, part

    def sent(self, rank: int) -> int:
        """Elements that the rank sends to others in one step, collectives of teams left out."""
        return sum(self._sent(job).get(rank, 0) for bucket in self.buckets for job in bucket)

    def _sent(self, job: Job) -> dict[int, int]:
        result: dict[int, int] = {}
        if job.gram:
            seat = job.seats[0][0]
            for rank in holders(self.entries[job.entry].layout, job.rows[0], job.box):
                result[rank] = result.get(rank, 0) + (job.triangle if rank != seat else 0)
            others = holders(self.entries[job.entry].layout, job.audience, job.box)
            result[seat] = job.triangle * sum(rank != seat for rank in others)
            return result
        for transfers in (self.out(job), self.back(job)):
            for source, target, box in transfers:
                result[source] = result.get(source, 0) + (volume(box) if source != target else 0)
        return result

    @property
    def imbalance(self) -> float:
        """Operations of the busiest rank over the mean."""
        mean = sum(self.load.values()) / len(self.load)
        return max(self.load.values()) / mean if mean else 1.0

    def describe(self) -> str:
        """Who computes what, elements sent, operations and imbalance."""
        ranks = ", ".join(map(str, self.ranks))
        in_place, moving = sum(map(len, self.in_place)), sum(map(len, self.buckets))
        head = (
            f"{len(self.entries)} parameters on ranks {ranks}: {in_place} jobs where the matrices lie, "
            f"{moving} in {len(self.buckets)} buckets; imbalance {self.imbalance:.2f}"
        )
        lines = [head]
        lines += [f"  rank {rank}: {self.load[rank]:.3g} FLOP, sends {self.sent(rank)} elements" for rank in self.ranks]
        runs = [(run, "in place") for run in self.in_place]
        runs += [(bucket, f"bucket {number}") for number, bucket in enumerate(self.buckets)]
        for jobs, where in runs:
            for job in jobs:
                route = "gram" if job.gram else "team" if len(job.seats) > 1 else "whole"
                seats = ", ".join(str(seat) for seat, _ in job.seats)
                shape = "x".join(map(str, shape_of(job.box)))
                lines.append(f"  {self.entries[job.entry].name} {shape}: {route} on rank {seats}, {where}")
        return "\n".join(lines)


def plan(entries: Sequence[Entry], ranks: Sequence[int], cost: Cost) -> Plan:
    """Decides the jobs of ``entries``, all of which lie on ``ranks``, their seats and their buckets."""
    load = dict.fromkeys(ranks, 0.0)
    chosen = [
        job
        for index, entry in enumerate(entries)
        for box in _units(entry)
        for job in _cheapest(index, entry, box, len(ranks), cost)
    ]
    mean = sum(job.flops for job, _ in chosen) / len(ranks)
    placed: list[Job] = []
    for job, seats in sorted(chosen, key=lambda pair: (len(pair[1]) > 1, -pair[0].flops, pair[0].entry, pair[0].box)):
        job = _team(job, entries[job.entry], seats, mean, load, cost) or _owned(
            job, entries[job.entry], seats, load, cost
        )
        placed.append(job)
    in_place, buckets = _pack(placed, tuple(entries), tuple(ranks), cost)
    return Plan(tuple(entries), tuple(ranks), in_place, buckets, load)


def holders(layout: Layout, ranks: Sequence[int], box: Box) -> list[int]:
    """The ranks that hold some of ``box``."""
    return [rank for rank in ranks if any(True for _ in _held(layout, rank, box))]


def _held(layout: Layout, rank: int, box: Box) -> Iterator[Box]:
    for piece in layout.pieces(rank):
        part = overlap(piece.box, box)
        if part is not None:
            yield part


def _units(entry: Entry) -> Iterator[Box]:
    """Boxes of independent matrices: parts of fused weights; of a batch, runs that the same ranks hold."""
    boxes = [whole(entry.layout.shape)]
    if entry.split:
        ends = [sum(entry.split[: i + 1]) for i in range(len(entry.split))]
        boxes = [
            (*boxes[0][: entry.out_dim], (end - size, end), *boxes[0][entry.out_dim + 1 :])
            for end, size in zip(ends, entry.split, strict=True)
        ]
    for box in boxes:
        if volume(box) == 0:
            continue
        if not entry.batch_dims:
            yield box
            continue
        signatures = [
            tuple(tuple(holders(entry.layout, row, ((e, e + 1), *box[1:]))) for row in entry.layout.rows)
            for e in range(box[0][1])
        ]
        start = 0
        for e in range(1, len(signatures) + 1):
            if e == len(signatures) or signatures[e] != signatures[start]:
                run = (start, e)
                alone = all(len(row) == 1 for row in signatures[start])
                if alone and len(entry.layout.rows) == 1:
                    yield (run, *box[1:])
                else:  # in as many parts as there are ranks to share them
                    count = min(len(entry.layout.ranks), e - start)
                    for index in range(count):
                        part = chunk(run, count, index)
                        if part[0] < part[1]:
                            yield (part, *box[1:])
                start = e


def _sides(entry: Entry, box: Box) -> tuple[int, int, int]:
    """(number of matrices, outputs, inputs) of a box."""
    shape = shape_of(box)
    outputs = shape[entry.out_dim]
    count = math.prod(shape[: entry.batch_dims])
    return count, outputs, math.prod(shape[entry.batch_dims :]) // outputs


def _flops(entry: Entry, m: int, n: int, cost: Cost) -> float:
    if entry.steps is None:
        return 20.0 * min(m, n) ** 2 * max(m, n)
    wide = cost.allow_gram and gram.pays(m, n)
    return gram.flops(m, n, entry.steps, gram=wide, halved=cost.halved)


def _cheapest(index: int, entry: Entry, box: Box, world: int, cost: Cost) -> list[tuple[Job, tuple[int, ...]]]:
    """The cheapest jobs for one unit, each with the ranks that may be its seat."""
    count, outputs, inputs = _sides(entry, box)
    side, long = min(outputs, inputs), max(outputs, inputs)
    flops = count * _flops(entry, outputs, inputs, cost)
    rows, everyone = entry.layout.rows, entry.layout.ranks
    size = volume(box)
    by_row = [holders(entry.layout, row, box) for row in rows]
    shards = len(by_row[0])

    def job(row: int, audience: tuple[int, ...], flops: float, gram_route: bool = False) -> Job:
        return Job(index, box, (), (rows[row],), audience, flops, side, gram_route)

    triangle = gram.packed(side)
    q_flops = flops - side * side * long * (1 if cost.halved else 2) - 2 * side * side * long
    options = [
        # each row of ranks for itself
        (len(rows) * (flops + 2 * size * (1 - 1 / shards) * cost.element),
         [(job(row, rows[row], flops), tuple(by_row[row]) if shards == 1 else rows[row]) for row in range(len(rows))]),
    ]  # fmt: skip
    if len(rows) > 1:
        moved = size * (1 - 1 / shards) + size * (len(rows) - 1 / shards)
        options.append((flops + moved * cost.element, [(job(0, everyone, flops), everyone)]))
    if shards > 1 and not entry.batch_dims and _gram_fits(entry, box, rows[0], outputs >= inputs, cost):
        moved = 2 * (shards - 1) * triangle
        options.append(
            (len(rows) * (flops + moved * cost.element),
             [(job(row, rows[row], q_flops, True), tuple(by_row[row])) for row in range(len(rows))])
        )  # fmt: skip
    return min(options, key=lambda option: option[0])[1]


def _gram_fits(entry: Entry, box: Box, row: tuple[int, ...], tall: bool, cost: Cost) -> bool:
    """Whether every shard has the whole short side, and the Gram form is allowed and pays."""
    _, outputs, inputs = _sides(entry, box)
    if entry.steps is None or not cost.allow_gram or not gram.pays(outputs, inputs):
        return False
    out = entry.out_dim
    for rank in row:
        for part in _held(entry.layout, rank, box):
            full = [part[d] == box[d] for d in range(len(box))]
            if not (all(full[:out] + full[out + 1 :]) if tall else full[out]):
                return False
    return True


def _owned(job: Job, entry: Entry, seats: tuple[int, ...], load: dict[int, float], cost: Cost) -> Job:
    """The job on the seat that is free first, what it holds already counted."""
    row_of = {rank: row for row in entry.layout.rows for rank in row}
    held = {rank: sum(map(volume, _held(entry.layout, rank, job.box))) for rank in seats}
    seat = min(seats, key=lambda rank: (load[rank] - (0 if job.gram else held[rank] * cost.element), rank))
    load[seat] += job.flops
    if job.gram:
        for rank in job.audience:
            load[rank] += sum(map(volume, _held(entry.layout, rank, job.box))) * job.side * (3 if cost.halved else 4)
    return replace(job, seats=((seat, job.box),), rows=(row_of[seat],))


def _team(
    job: Job, entry: Entry, seats: tuple[int, ...], mean: float, load: dict[int, float], cost: Cost
) -> Job | None:
    """The job shared by several seats, if that shortens the step; None otherwise."""
    _, outputs, inputs = _sides(entry, job.box)
    steps = entry.steps
    if steps is None or job.gram or entry.batch_dims or not cost.allow_gram or len(seats) < 2 or job.flops <= mean:
        return None
    long_dim = entry.out_dim if outputs >= inputs else 1 - entry.out_dim
    extent = job.box[long_dim]
    symmetric_products = 4 * steps - 3

    def time(size: int) -> float:
        work = gram.flops(outputs, inputs, steps, gram=True) / size
        moved = job.side**2 * (2 + symmetric_products) * (size - 1) / size
        return work + moved * cost.element + (symmetric_products + 1) * cost.call

    sizes = [2**k for k in range(1, len(seats).bit_length()) if 2**k <= min(len(seats), extent[1] - extent[0])]
    best = min(sizes, key=time, default=0)
    if not best or time(best) > 0.9 * job.flops:
        return None
    members = sorted(sorted(seats, key=lambda rank: (load[rank], rank))[:best])
    row_of = {rank: row for row in entry.layout.rows for rank in row}
    slabs = [
        (rank, (*job.box[:long_dim], chunk(extent, best, i), *job.box[long_dim + 1 :]))
        for i, rank in enumerate(members)
    ]
    for rank in members:
        load[rank] += time(best)
    return replace(job, seats=tuple(slabs), rows=tuple(row_of[rank] for rank in members), flops=time(best))


def _pack(
    jobs: list[Job], entries: tuple[Entry, ...], ranks: tuple[int, ...], cost: Cost
) -> tuple[tuple[tuple[Job, ...], ...], tuple[tuple[Job, ...], ...]]:
    """Jobs for which nothing moves, and the others, in runs of at most ``cost.limit`` elements on any rank."""
    fresh = Plan(entries, ranks, (), (), {})
    runs: dict[bool, list[list[Job]]] = {False: [], True: []}
    filled: dict[bool, dict[int, int]] = {False: {}, True: {}}
    for job in jobs:
        use = dict.fromkeys((rank for rank, _ in job.seats), 0)
        moves = False
        if job.gram:
            moves = True
            for rank in job.audience:
                use[rank] = use.get(rank, 0) + 2 * job.triangle
        else:
            for transfers in (fresh.out(job), fresh.back(job)):
                for source, target, box in transfers:
                    if source != target:
                        moves = True
                        for rank in (source, target):
                            use[rank] = use.get(rank, 0) + volume(box)
        moves |= len(job.seats) > 1
        for seat, box in job.seats:
            use[seat] += volume(box)
        if not runs[moves] or any(filled[moves].get(rank, 0) + amount > cost.limit for rank, amount in use.items()):
            runs[moves].append([])
            filled[moves] = {}
        runs[moves][-1].append(job)
        for rank, amount in use.items():
            filled[moves][rank] = filled[moves].get(rank, 0) + amount
    return tuple(map(tuple, runs[False])), tuple(map(tuple, runs[True]))
