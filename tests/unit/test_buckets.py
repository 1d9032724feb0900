"""Layouts and plans: pure functions, whose promises hold for any shapes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disco.distributed.buckets import Cost, Entry, plan
from disco.distributed.layout import Cut, Layout, overlap, volume, whole


@st.composite
def layouts(draw, mesh=None):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    mesh = mesh or draw(st.sampled_from([(1,), (3,), (4,), (2, 2), (2, 3)]))
    cuts = tuple(
        draw(st.one_of(st.none(), st.builds(Cut, st.integers(0, len(shape) - 1), st.sampled_from([1, 2]))))
        for _ in mesh
    )
    count = 1
    for size in mesh:
        count *= size
    return Layout(shape, tuple(range(count)), mesh, cuts)


@given(layouts())
def test_every_row_of_ranks_holds_every_index_once(layout):
    assert sorted(rank for row in layout.rows for rank in row) == list(layout.ranks)
    for row in layout.rows:
        pieces = [piece for rank in row for piece in layout.pieces(rank)]
        assert sum(volume(piece.box) for piece in pieces) == volume(whole(layout.shape))
        assert all(overlap(a.box, b.box) is None for a, b in itertools.combinations(pieces, 2))
    for rank in layout.ranks:
        size = 1
        for length in layout.local_shape(rank):
            size *= length
        assert size == sum(volume(piece.box) for piece in layout.pieces(rank))


def test_fsdp_over_tensor_parallel_is_contiguous():
    layout = Layout((10, 4), (0, 1, 2, 3), (2, 2), (Cut(0, strides=2), Cut(0)))
    boxes = [layout.pieces(rank)[0].box[0] for rank in range(4)]
    assert boxes == [(0, 3), (5, 8), (3, 5), (8, 10)]


entries_on_one_mesh = st.sampled_from([(4,), (2, 2), (3,)]).flatmap(
    lambda mesh: st.lists(
        layouts(mesh=mesh).map(lambda layout: Entry("p", layout, len(layout.shape) - 2, len(layout.shape) - 2)),
        min_size=1,
        max_size=5,
    )
)
costs = st.builds(
    Cost,
    element=st.sampled_from([0.0, 500.0, 1e6]),
    call=st.sampled_from([0.0, 1e9]),
    limit=st.sampled_from([1, 50, 10**6]),
)


@settings(max_examples=150, deadline=None)
@given(entries_on_one_mesh, costs)
def test_plan_computes_everything_and_serves_everybody(entries, cost):
    ranks = entries[0].layout.ranks
    decided = plan(entries, ranks, cost)
    jobs = [*itertools.chain(*decided.in_place, *decided.buckets)]
    for rank in ranks:
        received = dict.fromkeys(range(len(entries)), 0)
        for job in jobs:
            if job.gram:
                continue
            assert sum(volume(box) for _, box in job.seats) == volume(job.box)
            for seat, box in job.seats:  # a seat gets all it needs, once
                assert sum(volume(part) for _, target, part in decided.out(job) if target == seat) == volume(box)
            received[job.entry] += sum(volume(part) for _, target, part in decided.back(job) if target == rank)
        for index, entry in enumerate(entries):
            held = sum(volume(piece.box) for piece in entry.layout.pieces(rank))
            assert received[index] == held  # each rank gets the direction of what it holds, once
    assert plan(entries, ranks, cost) == decided
    for job in itertools.chain(*decided.in_place):
        assert all(source == target for source, target, _ in [*decided.out(job), *decided.back(job)])


FIRST_DIM = Cut(0)


def sharded(shape, cut=FIRST_DIM):
    return Layout(shape, (0, 1, 2, 3), (4,), (cut,))


def test_owners_are_balanced_by_work():
    big = [Entry(f"big{i}", sharded((1024, 1024))) for i in range(4)]
    small = [Entry(f"small{i}", sharded((256, 256))) for i in range(8)]
    decided = plan([*small, *big], range(4), Cost())
    assert decided.imbalance < 1.01
    assert all(len(job.seats) == 1 for bucket in decided.buckets for job in bucket)


def test_elements_sent_are_those_of_owner_computes():
    decided = plan([Entry(f"w{i}", sharded((1024, 1024))) for i in range(8)], range(4), Cost())
    for rank in range(4):  # 2 K m n (W - 1) / W^2
        assert decided.sent(rank) == 2 * 8 * 1024 * 1024 * 3 // 16


def test_a_lone_large_matrix_gets_a_team():
    decided = plan([Entry("w", sharded((4096, 4096)))], range(4), Cost())
    (job,) = decided.buckets[0]
    assert len(job.seats) == 4
    assert decided.imbalance == pytest.approx(1.0)
    assert decided.sent(0) == 0  # the slabs are the shards


def test_replicas_share_where_that_is_cheaper():
    large = [Entry(f"w{i}", sharded((1024, 1024), cut=None)) for i in range(4)]
    assert all(len(job.audience) == 4 for bucket in plan(large, range(4), Cost()).buckets for job in bucket)
    small = [Entry(f"w{i}", sharded((8, 8), cut=None)) for i in range(4)]
    assert not plan(small, range(4), Cost()).buckets


def test_buckets_hold_no_more_than_the_limit():
    entries = [Entry(f"w{i}", sharded((64, 64))) for i in range(16)]
    decided = plan(entries, range(4), Cost(limit=20_000))
    assert len(decided.buckets) > 2
    for bucket in decided.buckets:
        for rank in range(4):
            transfers = [t for job in bucket for t in [*decided.out(job), *decided.back(job)]]
            moving = [t for t in transfers if t[0] != t[1] and rank in t[:2]]
            seats = sum(volume(box) for job in bucket for seat, box in job.seats if seat == rank)
            assert sum(volume(box) for _, _, box in moving) + seats <= 20_000


def test_describe_tells_who_does_what():
    text = plan([Entry("attention.wq", sharded((64, 64)))], range(4), Cost(call=1e12)).describe()
    assert "attention.wq 64x64: whole on rank 0, bucket 0" in text
    assert "rank 3: 0 FLOP, sends 1024 elements" in text
