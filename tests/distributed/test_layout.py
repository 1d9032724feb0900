"""``Layout`` cuts as ``torch.chunk`` does, on any mesh. Pure: ``test_placements`` holds it to DTensor and FSDP2."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disco.distributed import layout as layouts
from disco.distributed.layout import Cut, Layout

MESHES = [(1,), (2,), (4,), (2, 2), (3, 2), (2, 1, 3)]


@st.composite
def some_layout(draw: Any) -> Layout:
    mesh = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    cut = st.builds(Cut, st.integers(0, len(shape) - 1), st.sampled_from([1, 1, 2, 3]))
    cuts = tuple(draw(st.none() | cut) for _ in mesh)
    ranks = draw(st.permutations(range(10, 10 + math.prod(mesh))))
    order = draw(st.just(()) | st.permutations(range(len(mesh))).map(tuple))
    return Layout(shape, tuple(ranks), mesh, cuts, order)


def slices(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*interval) for interval in box)


def chunked(tensor: Tensor, layout: Layout, index: int) -> Tensor:
    """What the rank at ``index`` of the mesh holds, cut with ``torch.chunk``."""
    coordinates = np.unravel_index(index, layout.mesh)
    for i in layout.order or range(len(layout.mesh)):
        cut = layout.cuts[i]
        if cut is not None and tensor.shape[cut.dim]:  # chunks of nothing are as many as asked for, all empty
            stretches = tensor.chunk(cut.strides, cut.dim)
            mine = [
                stretch.chunk(layout.mesh[i], cut.dim)[coordinates[i] : coordinates[i] + 1] for stretch in stretches
            ]
            nothing = tensor.narrow(cut.dim, 0, 0)
            tensor = torch.cat([nothing, *itertools.chain(*mine)], cut.dim)
    return tensor


@given(some_layout())
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_pieces_are_the_chunks_of_torch(layout: Layout) -> None:
    indices = torch.arange(math.prod(layout.shape)).reshape(layout.shape)
    for position, rank in enumerate(layout.ranks):
        local = chunked(indices, layout, position)
        assert layout.local_shape(rank) == tuple(local.shape)
        filled = torch.zeros(local.shape, dtype=torch.int64)
        for piece in layout.pieces(rank):
            assert layouts.volume(piece.box) > 0
            at = piece.within(piece.box)
            assert torch.equal(local[at], indices[slices(piece.box)])
            filled[at] += 1
        assert (filled == 1).all()


@given(some_layout())
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_every_row_holds_every_index_once(layout: Layout) -> None:
    replicas = math.prod(size for size, cut in zip(layout.mesh, layout.cuts, strict=True) if cut is None)
    assert len(layout.rows) == replicas
    assert sorted(itertools.chain(*layout.rows)) == sorted(layout.ranks)
    for row in layout.rows:
        held = torch.zeros(layout.shape, dtype=torch.int64)
        for piece in itertools.chain(*(layout.pieces(rank) for rank in row)):
            held[slices(piece.box)] += 1
        assert (held == 1).all()


@given(some_layout(), st.data())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_box_is_found_in_the_local_tensor(layout: Layout, data: Any) -> None:
    box = tuple(tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in layout.shape)
    indices = torch.arange(math.prod(layout.shape)).reshape(layout.shape)
    found = 0
    for rank in layout.rows[0]:
        local = chunked(indices, layout, layout.ranks.index(rank))
        for piece in layout.pieces(rank):
            shared = layouts.overlap(piece.box, box)
            if shared is not None:
                assert torch.equal(local[piece.within(shared)], indices[slices(shared)])
                found += layouts.volume(shared)
    assert found == layouts.volume(box)


def test_strided_shards_by_hand() -> None:
    """Nine rows over a 2 x 2 mesh of data and tensor ranks: tensor ranks own 0-4 and 5-8, data ranks their chunks."""
    layout = Layout((9,), (0, 1, 2, 3), (2, 2), (Cut(0, 2), Cut(0)))
    boxes = {rank: [piece.box for piece in layout.pieces(rank)] for rank in range(4)}
    assert boxes == {0: [((0, 3),)], 1: [((5, 7),)], 2: [((3, 5),)], 3: [((7, 9),)]}
    alone = Layout((9,), (0, 1), (2,), (Cut(0, 2),))
    assert [(piece.box, piece.start) for piece in alone.pieces(1)] == [(((3, 5),), (0,)), (((7, 9),), (2,))]


@pytest.mark.parametrize(("mesh", "length"), [((4, 2), 9), ((8, 2), 50257), ((2, 2), 9)])
def test_mesh_dimensions_cut_in_any_order(mesh, length):
    """Tensor ranks cut first and data ranks what each of these has: ``torch.chunk`` of ``torch.chunk``."""
    data, parallel = mesh
    layout = Layout((length,), tuple(range(data * parallel)), mesh, (Cut(0), Cut(0)), order=(1, 0))
    whole, held = torch.arange(length), []
    for column, part in enumerate(whole.chunk(parallel)):
        chunks = part.chunk(data)
        for row in range(data):
            boxes = [piece.box for piece in layout.pieces(row * parallel + column)]
            wanted = chunks[row] if row < len(chunks) else whole[:0]
            assert [whole[slices(box)].tolist() for box in boxes] == ([wanted.tolist()] if len(wanted) else [])
            held += wanted.tolist()
    assert sorted(held) == whole.tolist()


@pytest.mark.parametrize("cuts", [(None, None), (Cut(0), Cut(1)), (Cut(1), None)])
def test_tensors_without_entries_have_no_pieces(cuts):
    layout = Layout((0, 4), tuple(range(4)), (2, 2), cuts)
    assert all(layout.pieces(rank) == () for rank in range(4))
    columns = 4 if Cut(1) not in cuts else 2
    assert {layout.local_shape(rank) for rank in range(4)} == {(0, columns)}


def test_sums_are_taken_over_the_mesh_dimensions_that_cut() -> None:
    layout = Layout((8, 8), tuple(range(8)), (2, 1, 2, 2), (Cut(0), Cut(0), None, Cut(1)))
    assert layout.mesh_dims_cutting((0,)) == (0,)
    assert layout.mesh_dims_cutting((1,)) == (3,)
    assert layout.mesh_dims_cutting((0, 1)) == (0, 3)
    assert layout.mesh_dims_cutting(()) == ()
