"""``Disco`` on FSDP2 over tensor parallelism that cuts unevenly, or into more parts than there are rows or columns."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from meshes import mesh_of
from pool import World
from problems import full_rank
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import disco

Place = Callable[[dict[str, Tensor]], nn.Module]


def layers(weights: dict[str, Tensor]) -> nn.Module:
    hidden = len(weights["up.bias"])
    linear = {"up": nn.Linear(6, hidden), "down": nn.Linear(hidden, 6), "lm_head": nn.Linear(6, hidden)}
    model = nn.Sequential(OrderedDict(linear))
    model.load_state_dict(weights)
    return model


def sharded(mesh_shape: tuple[int, int]) -> Place:
    """Lays weights out as tensor parallelism and then ``fully_shard`` do."""
    mesh = mesh_of(*mesh_shape, names=("shard", "tensor"))

    def place(weights: dict[str, Tensor]) -> nn.Module:
        model = layers(weights)
        styles = {"up": ColwiseParallel(), "down": RowwiseParallel(), "lm_head": ColwiseParallel()}
        parallelize_module(model, mesh["tensor"], styles)
        fully_shard(model, mesh=mesh["shard"])
        return model

    return place


def some(hidden: int, seed: int) -> dict[str, Tensor]:
    shapes = {f"{name}.weight": (hidden, 6) for name in ("up", "lm_head")} | {"down.weight": (6, hidden)}
    shapes |= {"up.bias": (hidden,), "down.bias": (6,), "lm_head.bias": (hidden,)}
    return {name: full_rank(shape, 0, seed + i) for i, (name, shape) in enumerate(shapes.items())}


def updated(optimizer_class: Any, place: Place, hidden: int) -> tuple[nn.Module, dict[str, float]]:
    """The model after 3 steps, and its norms."""
    model = place(some(hidden, 0))
    overrides = {"lm_head.weight": {"norm": "rms_to_rms"}, "lm_head.bias": {"rule": "adamw"}}
    groups = disco.param_groups(model, overrides=overrides)
    optimizer = optimizer_class(groups, lr=0.1, momentum=0.9, weight_decay=0.1, orthogonalize="svd")
    for step in range(1, 4):
        gradients = place(some(hidden, 100 * step))
        for param, gradient in zip(model.parameters(), gradients.parameters(), strict=True):
            param.grad = gradient.detach()
        optimizer.step()
    return model, optimizer.norms()


def errors(rank: int, size: int, mesh: tuple[int, int], hidden: int) -> tuple[float, float]:
    """Largest errors of what this rank holds, and of norms, against ``Scion`` on one process."""
    place = sharded(mesh)
    wanted, norms = updated(disco.Scion, layers, hidden)
    model, found = updated(disco.Disco, place, hidden)
    parts = place({name: param.detach() for name, param in wanted.named_parameters()})
    error = 0.0
    for param, part in zip(model.parameters(), parts.parameters(), strict=True):
        assert isinstance(param, DTensor)
        assert isinstance(part, DTensor)
        difference = param.to_local() - part.to_local()
        error = max(error, float(difference.abs().max()) if difference.numel() else 0.0)
    assert found.keys() == norms.keys()
    return error, max(abs(found[name] / norms[name] - 1) for name in norms)


def assert_small(by_rank: list[tuple[float, float]]) -> None:
    for error, of_norms in by_rank:
        assert error <= 1e-5
        assert of_norms <= 1e-3


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("hidden", [1, 3, 5, 9])
def test_uneven_and_empty_shards_are_updated_as_on_one_process(world, mesh, hidden):
    """With ``hidden`` 1 or 3 tensor ranks hold no columns of ``down``, in a local tensor of the wrong shape."""
    assert_small(world(4).run(errors, mesh, hidden))


@pytest.mark.full
@pytest.mark.parametrize("hidden", [9, 25])
def test_placements_that_torch_describes_wrongly(hidden):
    """4 x 2 ranks: the last rows are not where the placements say (``test_placements``)."""
    large = World(8)
    try:
        assert_small(large.run(errors, (4, 2), hidden, timeout=300))
    finally:
        large.stop()
