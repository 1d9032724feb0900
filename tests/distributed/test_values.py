"""Norms of shards against norms of the whole, in float64: every kind of norm, every way to cut, and broken input."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshes import mesh_of
from torch import Tensor
from torch.distributed import ProcessGroup

from disco.distributed.layout import Cut, Layout
from disco.distributed.placements import plain_layout
from disco.distributed.spectral import BLOCK, COLD, WARM
from disco.distributed.values import Part, Values
from disco.norms import NORMS, OperatorNorm, Spectral, norm
from disco.spectrum import MEASURES
from disco.split import out_dim

ERROR = 1e-3
"""Stated relative error of spectral norms."""

PARAMETERS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "square": ((150, 150), {"name": "rms_to_rms"}, ()),
    "wide": ((90, 200), {"name": "rms_to_rms"}, ()),
    "tall": ((201, 97), {"name": "rms_to_rms"}, ()),
    "in_out": ((100, 180), {"name": "rms_to_rms", "layout": "in_out"}, ()),
    "small": ((7, 5), {"name": "rms_to_rms"}, ()),
    "some_ranks_empty": ((2, 80), {"name": "rms_to_rms"}, ()),
    "row": ((1, 9), {"name": "rms_to_rms"}, ()),
    "column": ((9, 1), {"name": "rms_to_rms", "layout": "in_out"}, ()),
    "experts": ((6, 10, 12), {"name": "rms_to_rms", "batch_dims": 1}, ()),
    "experts_in_out": ((3, 80, 100), {"name": "rms_to_rms", "batch_dims": 1, "layout": "in_out"}, ()),
    "two_batch_dims": ((2, 3, 9, 8), {"name": "rms_to_rms", "batch_dims": 2}, ()),
    "conv": ((8, 6, 3, 3), {"name": "conv"}, ()),
    "large_conv": ((80, 12, 3, 3), {"name": "conv"}, ()),
    "transposed_conv": ((36, 80, 3), {"name": "conv", "layout": "in_out"}, ()),
    "heads": ((48, 16), {"name": "rms_to_rms"}, (32, 8, 8)),
    "qkv": ((240, 100), {"name": "rms_to_rms"}, (120, 70, 50)),
    "gate_up": ((100, 160), {"name": "rms_to_rms", "layout": "in_out"}, (80, 80)),
    "embedding": ((51, 16), {"name": "one_to_rms", "layout": "in_out"}, ()),
    "output": ((51, 16), {"name": "rms_to_inf"}, ()),
    "sign": ((10, 6), {"name": "one_to_inf"}, ()),
    "gain": ((13,), {"name": "rms"}, ()),
    "bias": ((3,), {"name": "rms"}, ()),
    "temperature": ((), {"name": "rms"}, ()),
    "biases_of_experts": ((4, 5), {"name": "rms", "batch_dims": 1}, ()),
}
"""Name -> shape, operator, sizes of fused parts."""

KINDS = (None, *MEASURES, "rms_to_rms", "one_to_rms", "rms_to_inf", "one_to_inf", "rms", "conv")

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Cut | None, ...]]] = {
    "single": ((1,), (None,)),
    "single_shard": ((1,), (Cut(0),)),
    "replicated": ((2,), (None,)),
    "first": ((2,), (Cut(0),)),
    "second": ((2,), (Cut(1),)),
    "last": ((2,), (Cut(3),)),
    "four": ((4,), (Cut(0),)),
    "hsdp": ((2, 2), (None, Cut(0))),
    "replicas_inside": ((2, 2), (Cut(1), None)),
    "both": ((2, 2), (Cut(0), Cut(1))),
    "both_swapped": ((2, 2), (Cut(1), Cut(0))),
    "later_dims": ((2, 2), (Cut(1), Cut(2))),
    "first_and_last": ((2, 2), (Cut(0), Cut(3))),
    "twice": ((2, 2), (Cut(1), Cut(1))),
    "strided": ((2, 2), (Cut(0, 2), Cut(0))),
}
"""Mesh, and how its dimensions cut; later dimensions than a tensor has are its last."""


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _, _) in PARAMETERS.items()}


def groups_of(mesh: tuple[int, ...]) -> tuple[ProcessGroup | None, ...]:
    found = mesh_of(*mesh)
    return tuple(found.get_group(i) if size > 1 else None for i, size in enumerate(mesh))


def part(
    whole: Tensor,
    rank: int,
    mesh: tuple[int, ...],
    cuts: tuple[Cut | None, ...],
    groups: tuple[ProcessGroup | None, ...],
    operator: OperatorNorm,
    split: tuple[int, ...] = (),
    key: str | None = None,
) -> Part:
    """The shard of a rank."""
    fitting = tuple(
        replace(cut, dim=min(cut.dim, whole.ndim - 1)) if cut is not None and whole.ndim else None for cut in cuts
    )
    layout = Layout(tuple(whole.shape), tuple(range(math.prod(mesh))), mesh, fitting)
    local = torch.full(layout.local_shape(rank), math.nan, dtype=whole.dtype)
    for piece in layout.pieces(rank):
        local[piece.within(piece.box)] = whole[tuple(slice(*interval) for interval in piece.box)]
    return Part(local, layout, rank, groups, operator, split, key)


def oracle(whole: Tensor, operator: OperatorNorm, split: tuple[int, ...], which: str | None) -> float:
    """The largest norm of the fused parts and the batch, by SVD in float64."""
    views = whole.double().split(split, out_dim(operator)) if split else (whole.double(),)
    if which == "stable_rank":
        matrix = operator.matrix if isinstance(operator, Spectral) else operator.as_matrix
        s = [torch.linalg.svdvals(matrix(view)) for view in views]
        return max(float((x.square().sum(-1) / x[..., 0].square()).max()) for x in s)
    if which in MEASURES:
        return max(float(MEASURES[which](operator.as_matrix(view)).max()) for view in views)
    return max(float(operator.value(view, exact=True).max()) for view in views)


def asked_for(name: str, which: str | None) -> OperatorNorm | None:
    """The operator that ``which`` stands for, if it fits."""
    shape, settings, _ = PARAMETERS[name]
    operator = norm(**settings)
    if which in NORMS:
        operator = norm(**{**settings, "name": which})
    return operator if operator.fits(torch.empty(shape)) else None


def measure_all(rank: int, size: int, mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> dict[Any, list[float]]:
    groups, result = groups_of(mesh), {}
    for which, exact in ((None, True), *((which, False) for which in KINDS)):
        names = [name for name in PARAMETERS if asked_for(name, which)]
        parts = [
            part(tensors()[name], rank, mesh, cuts, groups, norm(**PARAMETERS[name][1]), PARAMETERS[name][2])
            for name in names
        ]
        values = Values().measure(parts, which, exact=exact)
        result |= {(name, which, exact): value for name, value in zip(names, values, strict=True)}
    return result


@pytest.fixture(scope="module")
def expected() -> dict[Any, float]:
    return {
        (name, which): oracle(whole, operator, PARAMETERS[name][2], which)
        for which in KINDS
        for name, whole in tensors().items()
        if (operator := asked_for(name, which))
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_have_the_norms_of_the_whole(world, layout, expected):
    mesh, cuts = LAYOUTS[layout]
    results = world(math.prod(mesh)).run(measure_all, mesh, cuts)
    assert all(result == results[0] for result in results), "ranks differ"
    assert {key[:2] for key in results[0]} == set(expected)
    for (name, which, exact), value in results[0].items():
        relative = value / expected[name, which] - 1
        kind = which or PARAMETERS[name][1]["name"]
        if exact or kind not in ("rms_to_rms", "conv", "stable_rank"):
            assert abs(relative) <= 1e-5, (name, which, exact, relative)
        elif kind == "stable_rank":
            assert -1e-5 <= relative <= 2 * ERROR, (name, which, relative)
        else:
            assert -ERROR <= relative <= 1e-5, (name, which, relative)


def measure_mixed(rank: int, size: int) -> list[float]:
    meshes = {mesh: groups_of(mesh) for mesh in ((4,), (2, 2))}
    layouts = [layout for layout in LAYOUTS.values() if math.prod(layout[0]) == size]
    parts = [
        part(whole, rank, mesh, cuts, meshes[mesh], norm(**PARAMETERS[name][1]), PARAMETERS[name][2])
        for (name, whole), (mesh, cuts) in zip(tensors().items(), itertools.cycle(layouts), strict=False)
    ]
    alone = Part(torch.full((3 + rank, 2), float(rank)), plain_layout(torch.empty(3 + rank, 2), rank, None), rank,
                 (None,), norm("rms_to_inf"))  # fmt: skip
    return Values().measure([*parts, alone])


def test_layouts_and_parameters_of_one_rank_mix_in_one_call(world, expected):
    results = world(4).run(measure_mixed)
    for rank, values in enumerate(results):
        assert values[:-1] == results[0][:-1]
        assert values[-1] == pytest.approx(2 * rank)
        for name, value in zip(PARAMETERS, values, strict=False):
            assert value == pytest.approx(expected[name, None], rel=ERROR), name


def count(rank: int, size: int, matrices: int, mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> list[list[int]]:
    """Elements of every all-reduce of a first and a second call; no other collective may take place."""
    groups, sent = groups_of(mesh), []
    real, others = dist.all_reduce, ("all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast")
    kept = {name: getattr(dist, name) for name in others}

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[-1].append(tensor.numel())
        return real(tensor, *args, **kwargs)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective other than all_reduce")

    x, values = spectra()["spiked"][:200, :120], Values()
    shapes = [x, x[:120], x.mT.contiguous()]
    parts = [
        part(shapes[i % min(3, matrices)], rank, mesh, cuts, groups, norm("rms_to_rms"), key=str(i))
        for i in range(matrices)
    ]
    try:
        dist.all_reduce = counted
        for name in others:
            setattr(dist, name, refused)
        for _ in range(2):
            sent.append([])
            values.measure(parts)
    finally:
        dist.all_reduce = real
        for name in others:
            setattr(dist, name, kept[name])
    return sent


def test_all_parameters_share_the_collectives_of_one(world):
    one = world(2).run(count, 1, (2,), (Cut(0),))[0]
    # one sum for each product, a maximum to agree on the scale and one to tell the values
    assert [len(call) for call in one] == [COLD + 2, WARM + 2]
    assert [sum(call) for call in one] == [blocks * BLOCK * 120 + 1 + 2 for blocks in (COLD, WARM)]
    many = world(2).run(count, 12, (2,), (Cut(0),))[0]
    assert [len(call) for call in many] == [len(call) for call in one]
    assert [sum(call) for call in many] == [
        blocks * BLOCK * 4 * (120 + 120 + 200) + 12 * (1 + 2) for blocks in (COLD, WARM)
    ]


def test_replicas_send_nothing_but_values(world):
    assert [call[-1:] for call in world(2).run(count, 3, (2,), (None,))[0]] == [[6], [6]]
    assert [sum(call) for call in world(2).run(count, 3, (2,), (None,))[0]] == [6, 6]


def measure_broken(rank: int, size: int, mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> dict[str, Any]:
    groups, result = groups_of(mesh), {}
    for which in (None, *MEASURES):
        for value in (math.nan, math.inf, 0.0):
            whole = tensors()
            parts = []
            for name, (_, settings, split) in PARAMETERS.items():
                if value == 0:
                    whole[name].zero_()
                else:
                    whole[name].view(-1)[-1] = value
                parts.append(part(whole[name], rank, mesh, cuts, groups, norm(**settings), split, name))
            healthy = part(tensors()["square"], rank, mesh, cuts, groups, norm("rms_to_rms"))
            values = Values()
            result[f"{which} {value}"] = values.measure([*parts, healthy], which)
            again = [replace(one, local=one.local.nan_to_num(0.0, 0.0)) for one in parts]
            result[f"{which} {value} mended"] = values.measure(again, which)
    return result


@pytest.mark.parametrize("layout", ["single", "first", "both", "later_dims"])
def test_broken_is_nan_zero_is_zero_and_both_heal(world, layout):
    mesh, cuts = LAYOUTS[layout]
    for result in world(math.prod(mesh)).run(measure_broken, mesh, cuts):
        for case, values in result.items():
            if "mended" in case:
                assert all(math.isfinite(value) for value in values), case
            elif case.endswith("0.0"):
                assert values[:-1] == [0.0] * len(PARAMETERS), case
                assert values[-1] > 0
            else:
                assert all(math.isnan(value) for value in values[:-1]), case
                assert math.isfinite(values[-1])


# The error of spectral norms


def single(matrix: Tensor, key: str | None = None) -> Part:
    return Part(matrix, plain_layout(matrix, 0, None), 0, (None,), norm("rms_to_rms"), (), key)


def orthogonal(m: int, n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(max(m, n), min(m, n), generator=torch.Generator().manual_seed(m)))[0].reshape(
        m, n
    )


def spectra() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(400, 400, generator=generator) / 40
    u, v = orthogonal(400, 4), orthogonal(401, 4)[:400]
    return {
        "gaussian": gaussian,
        "wide": torch.randn(300, 1200, generator=generator),
        "tall": torch.randn(1200, 300, generator=generator),
        "spiked": gaussian + (u * torch.tensor([1.3, 1.2, 0.9, 0.5])) @ v.mT,
        "flat": orthogonal(400, 400),
        "flat_tall": orthogonal(800, 200),
        "falling": (orthogonal(400, 400) * torch.logspace(0, -3, 400)) @ orthogonal(400, 400),
        "rank_one": u[:, :1] @ v[:, :1].mT,
        "one_entry": torch.zeros(400, 300).index_put((torch.tensor(7), torch.tensor(9)), torch.tensor(3.0)),
    }


def relative_error(found: float, matrix: Tensor) -> float:
    return found / oracle(matrix, norm("rms_to_rms"), (), None) - 1


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
@pytest.mark.parametrize("kind", spectra())
def test_spectral_norm_is_as_right_as_stated_from_the_first_call_on(kind, scale):
    x, values = spectra()[kind] * scale, Values()
    for _ in range(3):
        assert -ERROR <= relative_error(values.measure([single(x, "w")])[0], x) <= 1e-5
    assert abs(relative_error(Values().measure([single(x)], exact=True)[0], x)) <= 1e-5


@pytest.mark.parametrize("rate", [2**-9, 2**-7, 2**-5, 0.5])
@pytest.mark.parametrize("kind", ["gaussian", "spiked", "flat", "flat_tall"])
def test_warm_starts_follow_weights_that_move(kind, rate):
    x, values = spectra()[kind], Values()
    for step in range(8):
        assert -ERROR <= relative_error(values.measure([single(x, "w")])[0], x) <= 1e-5
        update = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        x = x - rate * norm("rms_to_rms", orthogonalize="svd").lmo(update)


@pytest.mark.parametrize(("jump", "calls"), [(1.5, 1), (1.2, 2), (1.05, 3)])
def test_warm_start_finds_a_direction_that_is_new(jump, calls):
    x, values = spectra()["gaussian"].clone(), Values()
    x[200:], x[:, 200:] = 0, 0
    values.measure([single(x, "w")])
    x[300, 300] = jump * torch.linalg.matrix_norm(x, 2)  # no product with what is known leads there
    found = [values.measure([single(x, "w")])[0] for _ in range(calls)]
    assert -ERROR <= relative_error(found[-1], x) <= 1e-5


def test_warm_start_never_loses_a_direction_that_grows():
    x, values = spectra()["gaussian"].clone(), Values()
    x[200:], x[:, 200:] = 0, 0
    largest = torch.linalg.matrix_norm(x, 2)
    for share in torch.arange(0.8, 1.2, 0.02):
        x[300, 300] = share * largest
        assert -ERROR <= relative_error(values.measure([single(x, "w")])[0], x) <= 1e-5


def follow(rank: int, size: int, mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> list[float]:
    groups, values, errors = groups_of(mesh), Values(), []
    x = {"flat": orthogonal(300, 300), "gaussian": spectra()["gaussian"], "tall": orthogonal(390, 130)}
    for step in range(4):
        parts = [part(w, rank, mesh, cuts, groups, norm("rms_to_rms"), key=name) for name, w in x.items()]
        errors += [relative_error(found, w) for found, w in zip(values.measure(parts), x.values(), strict=True)]
        for name, w in x.items():
            update = torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
            x[name] = w - 2**-6 * norm("rms_to_rms", orthogonalize="svd").lmo(update)
    return errors


@pytest.mark.parametrize("layout", ["first", "second", "both", "strided", "hsdp"])
def test_warm_starts_follow_shards_that_move(world, layout):
    mesh, cuts = LAYOUTS[layout]
    results = world(math.prod(mesh)).run(follow, mesh, cuts)
    assert all(result == results[0] for result in results)
    assert min(results[0]) >= -ERROR
    assert max(results[0]) <= 1e-5


def test_bounded_memory_changes_no_value():
    parts = [single(x, kind) for kind, x in spectra().items()]
    assert Values(limit=1).measure(parts) == pytest.approx(Values().measure(parts), rel=1e-5)


def test_half_precision_is_measured_in_float32():
    x = spectra()["gaussian"].bfloat16()
    assert -ERROR <= relative_error(Values().measure([single(x)])[0], x) <= 1e-5
    assert Values().measure([single(x)], "frobenius")[0] == pytest.approx(float(x.double().norm()), rel=1e-5)


@pytest.mark.parametrize("which", ["nuclear", "rms", "conv"])
def test_norms_that_do_not_exist_or_do_not_fit_are_refused(which):
    with pytest.raises(ValueError, match=which):
        Values().measure([single(torch.eye(3))], which)
