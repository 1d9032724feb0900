"""``Layout`` holds what DTensor holds: against ``torch.chunk`` on any mesh, and against DTensor and FSDP2."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from disco.distributed import layout as layouts
from disco.distributed.layout import Cut, Layout
from disco.distributed.placements import layout_of, plain_layout

MESHES = [(1,), (2,), (4,), (2, 2), (3, 2), (2, 1, 3)]


# Pure: any mesh, against torch.chunk


@st.composite
def some_layout(draw: Any) -> Layout:
    mesh = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cut = st.builds(Cut, st.integers(0, len(shape) - 1), st.sampled_from([1, 1, 2, 3]))
    cuts = tuple(draw(st.none() | cut) for _ in mesh)
    ranks = draw(st.permutations(range(10, 10 + math.prod(mesh))))
    return Layout(shape, tuple(ranks), mesh, cuts)


def chunked(tensor: Tensor, layout: Layout, index: int) -> Tensor:
    """What the rank at ``index`` of the mesh holds, cut with ``torch.chunk``."""
    coordinates = np.unravel_index(index, layout.mesh)
    for cut, parts, coordinate in zip(layout.cuts, layout.mesh, coordinates, strict=True):
        if cut is not None:
            stretches = tensor.chunk(cut.strides, cut.dim)
            mine = [stretch.chunk(parts, cut.dim)[coordinate : coordinate + 1] for stretch in stretches]
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


def test_sums_are_taken_over_the_mesh_dimensions_that_cut() -> None:
    layout = Layout((8, 8), tuple(range(8)), (2, 1, 2, 2), (Cut(0), Cut(0), None, Cut(1)))
    assert layout.mesh_dims_cutting((0,)) == (0,)
    assert layout.mesh_dims_cutting((1,)) == (3,)
    assert layout.mesh_dims_cutting((0, 1)) == (0, 3)
    assert layout.mesh_dims_cutting(()) == ()


# Against DTensor: each test sends (layout, local values) of every rank back, and compares here


def slices(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*interval) for interval in box)


def values(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)


Held = tuple[Layout, np.ndarray, np.ndarray | None]


def held(tensor: DTensor, *, full: bool = True) -> Held:
    """Its layout, what this rank holds, and the whole as torch gathers it.

    Not ``full`` where torch 2.13 cannot: it fails, and on other ranks waits for ever, for strided shards of which the
    last ranks have none.
    """
    whole = tensor.detach().full_tensor().numpy() if full else None
    return layout_of(tensor), tensor.detach().to_local().numpy(), whole


def assert_described(wanted: Tensor, by_rank: list[Held]) -> None:
    """Pieces, filled from what the ranks hold, make the tensor, once per row, as ``full_tensor`` does."""
    layout = by_rank[0][0]
    assert all(other == layout for other, _, _ in by_rank)
    for row in layout.rows:
        filled = torch.full(wanted.shape, torch.nan)
        for rank in row:
            _, local, whole = by_rank[rank]
            assert layout.local_shape(rank) == local.shape
            assert sum(layouts.volume(piece.box) for piece in layout.pieces(rank)) == local.size
            for piece in layout.pieces(rank):
                filled[slices(piece.box)] = torch.from_numpy(local)[piece.within(piece.box)]
            if whole is not None:
                assert torch.equal(torch.from_numpy(whole), wanted)
        assert torch.equal(filled, wanted)


SHARDED = {
    (1,): [[Shard(0)], [Replicate()]],
    (2,): [[Shard(0)], [Shard(1)], [Shard(2)], [Shard(-1)], [Replicate()], [_StridedShard(0, split_factor=2)]],
    (4,): [[Shard(0)], [Shard(1)], [Shard(2)], [Replicate()]],
    (2, 2): [
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Shard(0), Shard(0)],
        [Shard(-1), Shard(2)],
        [Replicate(), Replicate()],
        [_StridedShard(0, split_factor=2), Shard(0)],
        [_StridedShard(1, split_factor=2), Shard(1)],
        [Replicate(), _StridedShard(0, split_factor=3)],
    ],
}
SHAPES = [(8, 4, 4), (7, 5, 3), (2, 8, 1), (1, 1, 9), (9, 3, 6)]


def distributed(rank: int, size: int, mesh: tuple[int, ...], placements: list[Any], shapes: list[Any]) -> list[Held]:
    device_mesh = init_device_mesh("cpu", mesh)
    strided = any(isinstance(placement, _StridedShard) for placement in placements)
    # without a source rank each cuts for itself; scattering strided shards, torch 2.13 insists on even ones
    tensors = [distribute_tensor(values(shape), device_mesh, placements, src_data_rank=None) for shape in shapes]
    return [held(tensor, full=not strided) for tensor in tensors]


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [pytest.param(m, p, id=f"{m}-{p}") for m, kinds in SHARDED.items() for p in kinds],
)
def test_distributed_tensors(world, mesh, placements):
    results = world(math.prod(mesh)).run(distributed, mesh, placements, SHAPES)
    for shape, by_rank in zip(SHAPES, zip(*results, strict=True), strict=True):
        assert_described(values(shape), list(by_rank))


class Layers(nn.Module):
    """A column-wise and a row-wise Linear whose weights count up."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(values(tuple(param.shape)))


def parallel(rank: int, size: int, mesh: tuple[int, ...], hidden: int, dim: int) -> dict[str, tuple[str, Held]]:
    """Tensor parallelism over the last mesh dimension, ``fully_shard`` over the ones before it."""
    names = ("replicate", "shard", "tensor")[-len(mesh) :]
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    model = Layers(4, hidden)
    parallelize_module(model, device_mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(
        model,
        mesh=device_mesh[names[:-1]],
        shard_placement_fn=lambda param: Shard(min(dim, param.ndim - 1)) if param.shape[-1] % 4 == 0 else Shard(0),
    )
    params = model.named_parameters()
    return {name: (str(param.placements), held(param, full=hidden > 2)) for name, param in params}


@pytest.mark.parametrize("hidden", [2, 3, 5, 6, 7, 8, 9, 13])
def test_fully_shard_over_tensor_parallel_layers(world, hidden):
    """Torch 2.13: tensor parallelism cuts first, FSDP2 then cuts what each tensor rank has, and calls it strided."""
    model, results = Layers(4, hidden), world(4).run(parallel, (2, 2), hidden, 0)
    expected = {
        "up.weight": "(_StridedShard(dim=0, sf=2), Shard(dim=0))",
        "up.bias": "(_StridedShard(dim=0, sf=2), Shard(dim=0))",
        "down.weight": "(Shard(dim=0), Shard(dim=1))",
        "down.bias": "(Shard(dim=0), Replicate())",
    }
    assert {name: placements for name, (placements, _) in results[0].items()} == expected
    for name, param in model.named_parameters():
        assert_described(param.detach(), [by_name[name][1] for by_name in results])
    up = {rank: by_name["up.weight"][1][1].shape[0] for rank, by_name in enumerate(results)}
    halves = [-(-hidden // 2), hidden // 2]  # of the tensor ranks; rank = 2 data + tensor
    assert up == {0: -(-halves[0] // 2), 1: -(-halves[1] // 2), 2: halves[0] // 2, 3: halves[1] // 2}


def fewer_columns_than_ranks(rank: int, size: int) -> tuple[Layout, tuple[int, ...], str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = Layers(4, 1)
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    try:
        layout_of(model.down.weight)
        message = ""
    except ValueError as error:
        message = str(error)
    return layout_of(model.up.weight), tuple(model.down.weight.to_local().shape), message


def test_fully_shard_over_fewer_columns_than_tensor_ranks(world):
    """Torch 2.13 makes an empty shard (0, 0) where its placements say (2, 0)."""
    for rank, (up, down, message) in enumerate(world(4).run(fewer_columns_than_ranks)):
        assert [piece.box for piece in up.pieces(rank)] == ([((0, 1), (0, 4))] if rank == 0 else [])
        assert down == ((2, 1) if rank % 2 == 0 else (0, 0))
        assert (f"should be (2, 0) on rank {rank}, but is (0, 0)" in message) == (rank % 2 == 1)


@pytest.fixture
def fake_world() -> Iterator[Any]:
    """Makes this process rank r of n that are not there: collectives do nothing."""

    def join(rank: int, size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize(("mesh", "length"), [((4, 2), 9), ((8, 2), 50257)])
def test_strided_shards_that_are_not_what_they_say_are_refused_on_all_ranks(fake_world, mesh, length):
    """Fully sharded over tensor parallel in reality: torch.chunk of torch.chunk. Its placements say otherwise."""
    size, shapes = math.prod(mesh), []
    for rank in range(size):
        fake_world(rank, size)
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("shard", "tensor"))
        model = nn.Linear(1, length, bias=False)
        parallelize_module(model, device_mesh["tensor"], ColwiseParallel(), src_data_rank=None)
        fully_shard(model, mesh=device_mesh["shard"])
        assert str(model.weight.placements) == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
        shapes.append(model.weight.to_local().shape[0])
        with pytest.raises(ValueError, match=f"dimension 0 of length {length} .* pad it to a multiple of 2"):
            layout_of(model.weight)
    tensor = Layout((length,), (0, 1), (2,), (Cut(0),))
    wanted = [
        Layout(tensor.local_shape(rank % 2), tuple(range(mesh[0])), (mesh[0],), (Cut(0),)).local_shape(rank // 2)[0]
        for rank in range(size)
    ]
    assert shapes == wanted
    described = Layout((length,), tuple(range(size)), mesh, (Cut(0, 2), Cut(0)))
    assert shapes != [described.local_shape(rank)[0] for rank in range(size)]


@pytest.mark.parametrize(("mesh", "length"), [((4, 2), 10), ((8, 2), 50258), ((2, 4), 9)])
def test_strided_shards_of_large_meshes(fake_world, mesh, length):
    size = math.prod(mesh)
    for rank in range(size):
        fake_world(rank, size)
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("shard", "tensor"))
        model = nn.Linear(1, length, bias=False)
        with torch.no_grad():
            model.weight.copy_(values((length, 1)))
        parallelize_module(model, device_mesh["tensor"], ColwiseParallel(), src_data_rank=None)
        fully_shard(model, mesh=device_mesh["shard"])
        layout, local = layout_of(model.weight), model.weight.detach().to_local()
        for piece in layout.pieces(rank):
            assert torch.equal(local[piece.within(piece.box)], values((length, 1))[slices(piece.box)])
        assert sum(layouts.volume(piece.box) for piece in layout.pieces(rank)) == local.numel()


@pytest.mark.parametrize(("length", "refused"), [(7, False), (8, False), (9, True), (12, False)])
def test_strided_shards_over_experts_and_tensor_ranks(fake_world, length, refused):
    """Two mesh dimensions cut before FSDP2 does, from left to right."""
    for rank in range(12):
        fake_world(rank, 12)
        mesh = init_device_mesh("cpu", (3, 2, 2), mesh_dim_names=("shard", "expert", "tensor"))
        inner = mesh["expert", "tensor"]
        whole = values((length, 1))
        model = nn.ParameterDict({"w": distribute_tensor(whole, inner, [Shard(0), Shard(0)], src_data_rank=None)})
        fully_shard(model, mesh=mesh["shard"])
        if refused:
            with pytest.raises(ValueError, match="pad it to a multiple of 4"):
                layout_of(model["w"])
            continue
        layout, local = layout_of(model["w"]), model["w"].detach().to_local()
        for piece in layout.pieces(rank):
            assert torch.equal(local[piece.within(piece.box)], whole[slices(piece.box)])
        assert sum(layouts.volume(piece.box) for piece in layout.pieces(rank)) == local.numel()


@pytest.mark.parametrize(
    ("mesh", "hidden", "dim"), [((2, 2), 8, 1), ((1, 2, 2), 7, 0), ((2, 1, 2), 7, 0), ((2, 2, 1), 5, 0)]
)
def test_other_dimensions_and_hybrid_sharding_over_tensor_parallel_layers(world, mesh, hidden, dim):
    model, results = Layers(4, hidden), world(4).run(parallel, mesh, hidden, dim)
    for name, param in model.named_parameters():
        assert_described(param.detach(), [by_name[name][1] for by_name in results])
    if dim == 1:
        assert results[0]["down.weight"][0] == "(_StridedShard(dim=1, sf=2), Shard(dim=1))"


def sharded(rank: int, size: int, kind: str) -> dict[str, Held]:
    """``fully_shard`` of a model with uneven and empty shards."""
    model = nn.ParameterDict({"uneven": values((7, 5)), "empty": values((2, 8)), "one": values((1,))})
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    elif kind == "context":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "context"))._flatten("both")
    else:
        mesh = init_device_mesh("cpu", (size,))
    fully_shard(model, mesh=mesh)
    return {name: held(param) for name, param in model.items()}


@pytest.mark.parametrize(("size", "kind"), [(1, "fsdp"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "context")])
def test_fully_shard_with_uneven_and_empty_shards(world, size, kind):
    results = world(size).run(sharded, kind)
    for name, shape in {"uneven": (7, 5), "empty": (2, 8), "one": (1,)}.items():
        assert_described(values(shape), [by_name[name] for by_name in results])
    if (size, kind) == (4, "fsdp"):
        assert [by_name["empty"][1].shape for by_name in results] == [(1, 8), (1, 8), (0, 8), (0, 8)]


def sub_meshes(rank: int, size: int) -> list[list[int]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    tensors = [distribute_tensor(values((5, 3)), mesh[name], [Shard(0)]) for name in ("outer", "inner")]
    return [list(layout_of(tensor).ranks) for tensor in tensors]


def test_ranks_of_sub_meshes_are_global(world):
    assert world(4).run(sub_meshes) == [[[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]]]


def refused(rank: int, size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (size,))
    partial = DTensor.from_local(values((3, 4)), mesh, [Partial()])
    wrong = DTensor.from_local(values((3, 4)), mesh, [Shard(0)], shape=torch.Size((8, 4)), stride=(4, 1))
    messages = []
    for tensor in (partial, wrong):
        with pytest.raises(ValueError, match="placement") as caught:
            layout_of(tensor)
        messages.append(str(caught.value))
    return messages


def test_refuses_sums_and_shapes_that_do_not_fit(world):
    for rank, (partial, wrong) in enumerate(world(2).run(refused)):
        assert "Partial" in partial or "P(sum)" in partial
        assert f"should be (4, 4) on rank {rank}, but is (3, 4)" in wrong


def plain(rank: int, size: int) -> tuple[Layout, Layout]:
    return plain_layout(values((3, 4)), rank, None), plain_layout(values((3, 4)), rank, dist.group.WORLD)


def test_plain_tensors_are_alone_or_replicas(world):
    for rank, (alone, shared) in enumerate(world(2).run(plain)):
        assert alone == Layout((3, 4), (rank,), (1,), (None,))
        assert shared == Layout((3, 4), (0, 1), (2,), (None,))
        assert shared.rows == ((0,), (1,))
        assert shared.local_shape(rank) == (3, 4)
