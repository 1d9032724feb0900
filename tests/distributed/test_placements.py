"""``layout_of`` finds where the parts of DTensors lie: any placements, FSDP2, large meshes (a fake process group)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from meshes import mesh_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from disco.distributed import layout as layouts
from disco.distributed.layout import Layout
from disco.distributed.placements import layout_of, local, plain_layout


def slices(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*interval) for interval in box)


def values(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)


Held = tuple[Layout, np.ndarray, np.ndarray | None]
"""What a rank sends back to be compared here."""


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
    device_mesh = mesh_of(*mesh)
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
    device_mesh = mesh_of(*mesh, names=names)
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


def fewer_columns_than_ranks(rank: int, size: int) -> dict[str, tuple[Held, tuple[int, ...]]]:
    mesh = mesh_of(2, 2, names=("shard", "tensor"))
    model = Layers(4, 1)
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    params = dict(model.named_parameters())
    return {
        name: ((layout_of(p), local(p.detach()).numpy(), None), tuple(p.to_local().shape)) for name, p in params.items()
    }


def test_fully_shard_over_fewer_columns_than_tensor_ranks(world):
    """Torch 2.13 makes an empty shard (0, 0) where its placements say (2, 0)."""
    model, results = Layers(4, 1), world(4).run(fewer_columns_than_ranks)
    for name, param in model.named_parameters():
        assert_described(param.detach(), [by_name[name][0] for by_name in results])
    assert [by_name["down.weight"][1] for by_name in results] == [(2, 1), (0, 0), (2, 1), (0, 0)]
    assert [by_name["down.weight"][0][1].shape for by_name in results] == [(2, 1), (2, 0), (2, 1), (2, 0)]


@pytest.fixture
def fake_world() -> Iterator[Any]:
    """Makes this process rank r of n that are not there: collectives do nothing."""

    def join(rank: int, size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield join
    dist.destroy_process_group()


def in_large_world(join: Any, mesh: dict[str, int], inner: tuple[str, ...], wanted: Tensor) -> list[Held]:
    """``fully_shard`` of what the mesh dimensions ``inner`` have cut along dimension 0, from left to right; by rank."""
    names, sizes = tuple(mesh), tuple(mesh.values())
    by_rank = []
    for rank in range(math.prod(sizes)):
        join(rank, math.prod(sizes))
        device_mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        cut = distribute_tensor(wanted, device_mesh[inner], [Shard(0)] * len(inner), src_data_rank=None)
        model = nn.ParameterDict({"w": cut})
        fully_shard(model, mesh=device_mesh[tuple(name for name in names if name not in inner)])
        assert "_StridedShard" in str(model["w"].placements)
        by_rank.append(held(model["w"], full=False))
    return by_rank


@pytest.mark.parametrize("mesh", [(4, 2), (8, 2), (2, 4), (3, 3), (4, 1, 2)])
@pytest.mark.parametrize("length", [1, 4, 9, 10, 21])
def test_fully_shard_over_tensor_ranks_of_large_meshes(fake_world, mesh, length):
    """Torch 2.13 describes uneven ones wrongly: of 9 rows over 4 x 2 ranks it says that rank 6 has the last, not 7."""
    sizes = dict(zip(("replicate", "shard", "tensor")[-len(mesh) :], mesh, strict=True))
    assert_described(values((length, 2)), in_large_world(fake_world, sizes, ("tensor",), values((length, 2))))


def test_a_vocabulary_over_8_x_2_ranks(fake_world):
    wanted = values((50257, 1))
    by_rank = in_large_world(fake_world, {"shard": 8, "tensor": 2}, ("tensor",), wanted)
    assert_described(wanted, by_rank)
    halves = [[len(chunk) for chunk in half.chunk(8)] for half in wanted.chunk(2)]
    assert [part.shape[0] for _, part, _ in by_rank] == [n for pair in zip(*halves, strict=True) for n in pair]


@pytest.mark.parametrize("length", [1, 4, 7, 8, 9, 10, 12, 25])
def test_fully_shard_over_experts_and_tensor_ranks(fake_world, length):
    """Two mesh dimensions cut before FSDP2 does, from left to right."""
    wanted, mesh = values((length, 2)), {"shard": 3, "expert": 2, "tensor": 2}
    assert_described(wanted, in_large_world(fake_world, mesh, ("expert", "tensor"), wanted))


@pytest.mark.parametrize(
    ("mesh", "hidden", "dim"),
    [((2, 2), 8, 1), ((4, 1), 9, 0), ((1, 2, 2), 7, 0), ((2, 1, 2), 7, 0), ((2, 2, 1), 5, 0)],
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
        mesh = mesh_of(2, size // 2, names=("replicate", "shard"))
    elif kind == "context":
        mesh = mesh_of(2, size // 2, names=("data", "context"))._flatten("both")
    else:
        mesh = mesh_of(size)
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
    mesh = mesh_of(2, 2, names=("outer", "inner"))
    tensors = [distribute_tensor(values((5, 3)), mesh[name], [Shard(0)]) for name in ("outer", "inner")]
    return [list(layout_of(tensor).ranks) for tensor in tensors]


def test_ranks_of_sub_meshes_are_global(world):
    assert world(4).run(sub_meshes) == [[[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]]]


def refused(rank: int, size: int) -> list[str]:
    mesh = mesh_of(size)
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
