"""A run on many processes leaves the record of one process, whatever the layout, and goes on under another one.

Tolerances. One step differs by the rounding of sums taken in another order: 1e-5, relatively, in the first steps. That
difference then grows as that of initial weights does, so later losses are held to the spread of runs of one process
whose initial weights differ by 1e-7. Norms of matrices are measured to 1e-3 (docs/distributed.md).
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from disco.errors import UserError
from disco.runs.schema import CHECKPOINTS, METRICS, SUMMARY, Outcome, deterministic
from disco.train import checkpoint
from disco.train.cohort import Program, build_optimizer
from disco.train.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig, from_dict, to_dict
from disco.train.data import prepare
from disco.train.loop import train
from disco.train.team import Team, TrainingStoppedError
from disturbed import Disturbed

BATCH = 256


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(folder: Path, steps: int, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(width=32, depth=2, head_size=8, context=32),
        "optimizer": OptimizerConfig(lr=2**-5, momentum=0.9),
        "data": DataConfig(valid_tokens=1024 + 32),
        "batch": BATCH,
        "horizon": steps * BATCH,
    }
    made = TrainConfig(**(settings | changes))
    return replace(made, data=prepare(made.data, folder / "data"))


def share(folder: Path, other: Path) -> None:
    """Lets another folder of runs have the same tokens."""
    other.mkdir(exist_ok=True)
    (other / "data").symlink_to(folder / "data")


def laid_out(chosen: TrainConfig, **parallel: Any) -> TrainConfig:
    return replace(chosen, parallel=ParallelConfig(**parallel))


@functools.cache
def mesh(replicate: int, shard: int, tensor: int) -> Any:
    from disco.train.parallel import mesh_of

    return mesh_of(ParallelConfig(replicate=replicate, shard=shard, tensor=tensor), torch.device("cpu"))


class StoppedError(Exception):
    pass


def stop_at(last: int | None) -> Any:
    def progress(step: int, tokens: int) -> None:
        if step == last:
            raise StoppedError

    return progress


def team_of(chosen: TrainConfig) -> Any:
    from disco.train.launch import Ranks

    sizes = chosen.parallel
    return Ranks(chosen, mesh(sizes.replicate, sizes.shard, sizes.tensor))


def trained(rank: int, size: int, content: dict[str, Any], folder: str, last: int | None = None) -> str:
    """Trains to the end, or is stopped after a step; the outcome."""
    chosen = from_dict(TrainConfig, content)
    try:
        return str(train(chosen, Path(folder), stop_at(last), team_of(chosen)))
    except StoppedError:
        return "stopped"


def on_many(world: Any, chosen: TrainConfig, folder: Path, last: int | None = None) -> TrainConfig:
    size = chosen.parallel.data_ranks * chosen.parallel.tensor
    outcomes = world(size).run(trained, to_dict(chosen), str(folder), last, timeout=900)
    assert set(outcomes) == {"stopped" if last else "finished"}
    return chosen


def lines(folder: Path, chosen: TrainConfig) -> list[dict[str, Any]]:
    text = (folder / chosen.id / METRICS).read_text()
    return [deterministic(json.loads(line)) for line in text.splitlines()]


_alone: dict[tuple[str, int, int], list[list[dict[str, Any]]]] = {}


def alone(folder: Path, chosen: TrainConfig, count: int) -> list[list[dict[str, Any]]]:
    """The records of the run on one process, and of ``count`` whose initial weights differ by 1e-7."""
    key = (chosen.id, chosen.horizon, count)
    if key not in _alone:
        plain = replace(chosen, parallel=ParallelConfig())
        teams = [Team(), *(Disturbed(noise) for noise in range(1, count + 1))]
        _alone[key] = []
        for index, team in enumerate(teams):
            own = folder / f"alone-{chosen.id}-{chosen.horizon}-{index}"
            share(folder, own)
            assert train(plain, own, team=team) == Outcome.FINISHED
            _alone[key].append(lines(own, plain))
    return _alone[key]


def assert_alike(found: list[dict[str, Any]], singles: list[list[dict[str, Any]]], *, exact: int = 4) -> None:
    """The same keys; losses equal to 1e-5 in the first steps, later within the spread; norms to 1e-3 and the spread."""
    assert [line.keys() for line in found] == [line.keys() for line in singles[0]]
    widths: dict[str, float] = {}  # runs only move apart
    for index, line in enumerate(found):
        for key, value in line.items():
            several = [single[index][key] for single in singles]
            low, high = min(several), max(several)
            widths[key] = slack = max(
                high - low, widths.get(key, 0.0)
            )  # one more run may lie outside: two of eleven do
            scale = 1e-3 if key.startswith("norm/") else 1e-5
            if key.startswith(("loss/", "norm/")) and line["step"] > exact:
                assert low - slack - scale * abs(low) <= value <= high + slack + scale * abs(high), (key, line["step"])
            else:
                assert value == pytest.approx(several[0], rel=scale), (key, line["step"])


LAYOUTS = {
    "ddp-2": {"replicate": 2},
    "fsdp-2": {"shard": 2},
    "tp-2": {"tensor": 2},
    "hsdp-4": {"replicate": 2, "shard": 2},
    "fsdp_tp-4": {"shard": 2, "tensor": 2},
    "hsdp_tp-4": {"replicate": 2, "tensor": 2},
    "ddp-4": {"replicate": 4},
    "fsdp-4": {"shard": 4},
    "tp-4": {"tensor": 4},
}
QUICK = ("ddp-2", "fsdp_tp-4")


def every_layout() -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]


def scale_of(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Steps, and disturbed runs."""
    return (200, 10) if request.config.getoption("--full") else (18, 3)


@pytest.mark.parametrize("layout", every_layout())
def test_many_processes_leave_the_record_of_one(world, runs, tmp_path, request, layout):
    steps, count = scale_of(request)
    chosen = config(runs, steps)
    singles = alone(runs, chosen, count)
    share(runs, tmp_path)
    many = on_many(world, laid_out(chosen, **LAYOUTS[layout]), tmp_path)
    assert many.id == chosen.id
    assert_alike(lines(tmp_path, many), singles)


@pytest.mark.parametrize("layout", ["tp-2", pytest.param("fsdp_tp-4", marks=pytest.mark.full)])
def test_sizes_of_gradients_where_there_is_no_momentum(world, runs, tmp_path, layout):
    """A gradient may be cut in another way than its parameter."""
    chosen = config(runs, 4, optimizer=OptimizerConfig(lr=2**-5))
    share(runs, tmp_path)
    found, (single,) = (
        lines(tmp_path, on_many(world, laid_out(chosen, **LAYOUTS[layout]), tmp_path)),
        alone(runs, chosen, 0),
    )
    sizes = [key for key in found[1] if key.startswith("norm/momentum/frobenius/")]
    assert len(sizes) == 2 + 2 * 7
    for line, own in zip(found[1:], single[1:], strict=True):
        assert {key: line[key] for key in sizes} == pytest.approx({key: own[key] for key in sizes}, rel=1e-3)
    assert not any(key in found[0] for key in sizes), "before the first step there is none"


@pytest.mark.full
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("layout", ["ddp-2", "fsdp_tp-4"])
def test_other_optimizers(world, runs, tmp_path, name, layout):
    momentum = 0.9 if name == "muon" else 0.0
    chosen = config(runs, 40, optimizer=OptimizerConfig(name=name, lr=2**-7, momentum=momentum))
    share(runs, tmp_path)
    assert_alike(
        lines(tmp_path, on_many(world, laid_out(chosen, **LAYOUTS[layout]), tmp_path)), alone(runs, chosen, 10)
    )


@pytest.mark.parametrize(
    "parallel",
    [
        {"micro_batch": 64},
        pytest.param({"micro_batch": 32, "recompute": True}, marks=pytest.mark.full),
        {"replicate": 2, "micro_batch": 64, "recompute": True},
        pytest.param({"shard": 2, "tensor": 2, "micro_batch": 64, "recompute": True}, marks=pytest.mark.full),
    ],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(world, runs, tmp_path, request, parallel):
    steps, count = scale_of(request)
    chosen = config(runs, steps)
    share(runs, tmp_path)
    split = laid_out(chosen, **parallel)
    if len({"replicate", "shard", "tensor"} & set(parallel)):
        on_many(world, split, tmp_path)
    else:
        train(split, tmp_path)
    assert_alike(lines(tmp_path, split), alone(runs, chosen, count))


def test_activation_checkpointing_changes_no_bit(runs, tmp_path):
    chosen = config(runs, 12)
    again = laid_out(chosen, recompute=True)
    for name, one in (("kept", chosen), ("again", again)):
        share(runs, tmp_path / name)
        train(one, tmp_path / name)
    assert lines(tmp_path / "kept", chosen) == lines(tmp_path / "again", again)


@pytest.mark.parametrize("layout", [{}, pytest.param(LAYOUTS["fsdp_tp-4"], marks=pytest.mark.full)])
def test_bf16_learns_nearly_as_well(world, runs, tmp_path, layout):
    chosen = config(runs, 40)
    half = laid_out(replace(chosen, precision="bf16"), device="cpu", **layout)
    assert half.id != chosen.id
    share(runs, tmp_path)
    if layout:
        on_many(world, half, tmp_path)
    else:
        train(half, tmp_path)
    found, exact = lines(tmp_path, half), alone(runs, chosen, 0)[0]
    assert found[-1]["loss/valid"] != exact[-1]["loss/valid"]
    assert found[-1]["loss/valid"] == pytest.approx(exact[-1]["loss/valid"], rel=0.02)
    assert found[-1]["loss/valid"] < found[0]["loss/valid"] - 1


@pytest.mark.full
@pytest.mark.parametrize("layout", ["ddp-2", "fsdp-2"])
def test_compiled_blocks_train_alike(world, runs, tmp_path, layout):
    chosen = config(runs, 12, compile=True)
    share(runs, tmp_path)
    on_many(world, laid_out(chosen, **LAYOUTS[layout]), tmp_path)
    plain = alone(runs, config(runs, 12), 10)
    assert_alike(lines(tmp_path, chosen), plain)


# Checkpoints


def whole(tensor: Tensor) -> np.ndarray:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.numpy().copy()


def held(rank: int, size: int, content: dict[str, Any], path: str) -> dict[str, np.ndarray]:
    """What a checkpoint fills a program with."""
    chosen = from_dict(TrainConfig, content)
    program = team_of(chosen).program([chosen], False)
    program.load(0, Path(path))
    return {name: whole(tensor) for name, tensor in checkpoint.tensors(program.optimizer).items()}


def held_alone(chosen: TrainConfig, path: Path) -> dict[str, np.ndarray]:
    program = Program([chosen])
    program.load(0, path)
    optimizer = build_optimizer(program._one, chosen.optimizer)
    optimizer.load_state_dict(program.state(0)["optimizer"])
    return {name: whole(tensor) for name, tensor in checkpoint.tensors(optimizer).items()}


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["scion", pytest.param("muon", marks=pytest.mark.full)])
def test_checkpoints_are_read_by_any_number_of_processes(world, runs, tmp_path, name):
    chosen = config(runs, 40, optimizer=OptimizerConfig(name=name, lr=2**-6, momentum=0.9))
    for form in ("many", "one"):
        share(runs, tmp_path / form)
    many = on_many(world, laid_out(chosen, shard=2), tmp_path / "many", last=3)
    path = checkpoint.path_of_latest(tmp_path / "many" / chosen.id / CHECKPOINTS, 3 * BATCH)
    with pytest.raises(StoppedError):
        train(chosen, tmp_path / "one", stop_at(3))
    file = tmp_path / "one" / chosen.id / CHECKPOINTS / checkpoint.LATEST
    for saved in (path, file):
        wanted = held_alone(chosen, saved)
        assert any(key.endswith("momentum") and value.any() for key, value in wanted.items())
        for sizes in ({"shard": 2}, {"shard": 2, "tensor": 2}, {"replicate": 4}):
            other = laid_out(chosen, **sizes)
            world_size = other.parallel.data_ranks * other.parallel.tensor
            for found in world(world_size).run(held, to_dict(other), str(saved)):
                assert_equal(found, wanted)
    header = checkpoint.read_header(path)
    assert header is not None
    assert header["state"]["step"] == 3
    assert many.id == chosen.id


def test_goes_on_with_2_then_4_then_1(world, runs, tmp_path, request):
    steps, count = scale_of(request)
    chosen = config(runs, steps, checkpoint_seconds=0.05)
    share(runs, tmp_path)
    on_many(world, laid_out(chosen, shard=2), tmp_path, last=steps // 3)
    on_many(world, laid_out(chosen, shard=2, tensor=2), tmp_path, last=2 * steps // 3)
    folder = tmp_path / chosen.id / CHECKPOINTS
    assert checkpoint.sharded(folder)[0].name == f"latest-{2 * steps // 3 * BATCH}.dcp"
    assert len(checkpoint.sharded(folder)) == 2
    assert train(chosen, tmp_path) == Outcome.FINISHED
    assert_alike(lines(tmp_path, chosen), alone(runs, chosen, count))
    assert (folder / checkpoint.LATEST).exists()


def test_stopped_and_continued_the_record_is_the_same(world, runs, tmp_path):
    chosen = laid_out(config(runs, 12), replicate=2)
    for name in ("cut", "whole"):
        share(runs, tmp_path / name)
    on_many(world, chosen, tmp_path / "whole")
    for last in (1, 5, 11):
        on_many(world, chosen, tmp_path / "cut", last=last)
    on_many(world, chosen, tmp_path / "cut")
    assert lines(tmp_path / "cut", chosen) == lines(tmp_path / "whole", chosen)


def damage(path: Path) -> None:
    """One wrong byte in the middle of the tensors."""
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_and_said(world, runs, tmp_path):
    chosen = laid_out(config(runs, 12), shard=2)
    for name in ("cut", "whole"):
        share(runs, tmp_path / name)
    on_many(world, chosen, tmp_path / "whole")
    for last in (4, 8):
        on_many(world, chosen, tmp_path / "cut", last=last)
    latest = checkpoint.sharded(tmp_path / "cut" / chosen.id / CHECKPOINTS)[0]
    damage(latest)
    on_many(world, chosen, tmp_path / "cut")
    assert lines(tmp_path / "cut", chosen) == lines(tmp_path / "whole", chosen)
    summary = json.loads((tmp_path / "cut" / chosen.id / SUMMARY).read_text())
    (note,) = summary["notes"]
    assert f"{latest} is damaged (ValueError), now {latest.name}.damaged: went on from the one before" in note
    longer = replace(chosen, horizon=2 * chosen.horizon)
    for path in checkpoint.sharded(tmp_path / "cut" / chosen.id / CHECKPOINTS):
        damage(path)
    for message in world(2).run(refused, to_dict(longer), str(tmp_path / "cut")):
        assert "is damaged (ValueError); delete it to start the run over" in message


def refused(rank: int, size: int, content: dict[str, Any], folder: str) -> str:
    chosen = from_dict(TrainConfig, content)
    with pytest.raises(UserError) as caught:
        train(chosen, Path(folder), team=team_of(chosen))
    return str(caught.value)


def test_what_a_killed_save_left_is_removed(world, runs, tmp_path):
    chosen = laid_out(config(runs, 2), shard=2)
    share(runs, tmp_path)
    left = tmp_path / chosen.id / CHECKPOINTS / ".latest-256.dcp.tmp"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    on_many(world, chosen, tmp_path)
    assert not list((tmp_path / chosen.id).rglob(".*.tmp"))


def test_a_kept_checkpoint_is_branched_from(world, runs, tmp_path):
    from disco.train.config import ScheduleConfig

    chosen = laid_out(config(runs, 12, keep=(6 * BATCH,)), shard=2)
    share(runs, tmp_path)
    on_many(world, chosen, tmp_path)
    assert (tmp_path / chosen.id / CHECKPOINTS / f"{6 * BATCH}.dcp").is_dir()
    branch = replace(
        chosen, horizon=8 * BATCH, parent=chosen.id, schedule=ScheduleConfig(decay=0.25), keep=(),
        parallel=ParallelConfig(),
    )  # fmt: skip
    steps: list[int] = []
    assert train(branch, tmp_path, lambda step, tokens: steps.append(step)) == Outcome.FINISHED
    assert steps == [7, 8]


def diverging(rank: int, size: int, content: dict[str, Any], folder: str) -> str:
    chosen = from_dict(TrainConfig, content)
    return str(train(chosen, Path(folder), team=team_of(chosen)))


def test_all_ranks_agree_that_a_run_diverged(world, runs, tmp_path):
    wild = OptimizerConfig(name="adamw", lr=1e20, weight_decay=0.5)
    chosen = laid_out(config(runs, 40, optimizer=wild), replicate=2)
    share(runs, tmp_path)
    assert world(2).run(diverging, to_dict(chosen), str(tmp_path)) == ["diverged", "diverged"]
    assert json.loads((tmp_path / chosen.id / SUMMARY).read_text())["outcome"] == "diverged"


def test_more_processes_than_held_out_sequences(world, runs, tmp_path):
    chosen = config(runs, 2, data=DataConfig(valid_tokens=32))
    share(runs, tmp_path)
    many = laid_out(chosen, **LAYOUTS["fsdp-2"])
    on_many(world, many, tmp_path)
    assert_alike(lines(tmp_path, many), alone(runs, chosen, 0))


def stopped_by_one(rank: int, size: int, content: dict[str, Any], folder: str) -> str:
    chosen = from_dict(TrainConfig, content)

    def progress(step: int, tokens: int) -> None:
        if (step, rank) == (3, 1):
            raise BrokenPipeError

    with pytest.raises((BrokenPipeError, TrainingStoppedError)) as caught:
        train(chosen, Path(folder), progress, team_of(chosen))
    return caught.type.__name__


def test_what_stops_one_process_stops_all_and_is_saved(world, runs, tmp_path):
    chosen = laid_out(config(runs, 12), shard=2)
    share(runs, tmp_path)
    assert world(2).run(stopped_by_one, to_dict(chosen), str(tmp_path)) == ["TrainingStoppedError", "BrokenPipeError"]
    header = checkpoint.read_header(checkpoint.sharded(tmp_path / chosen.id / CHECKPOINTS)[0])
    assert header is not None
    assert header["state"]["step"] == 3


def on_meta(rank: int, size: int, content: dict[str, Any]) -> list[str]:
    """Devices of all that was made of a model before it was cut."""
    from disco.train import launch

    chosen, seen = from_dict(TrainConfig, content), []
    spread = launch.spread

    def watched(model: Any, *args: Any) -> Any:
        seen.extend(tensor.device.type for tensor in (*model.parameters(), *model.buffers()))
        return spread(model, *args)

    launch.spread = watched
    try:
        program = team_of(chosen).program([chosen], False)
    finally:
        launch.spread = spread
    assert not any(tensor.is_meta for tensor in (*program.model.parameters(), *program.model.buffers()))
    return sorted(set(seen))


def test_a_model_that_is_cut_is_never_whole_on_the_device(world, runs):
    chosen = config(runs, 2)
    assert world(2).run(on_meta, to_dict(laid_out(chosen, shard=2))) == [["meta"], ["meta"]]
    assert world(2).run(on_meta, to_dict(laid_out(chosen, replicate=2))) == [["cpu"], ["cpu"]]


def test_another_number_of_processes_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"2 x 1 x 2 = 4, but there is 1 process; .* torchrun --nproc-per-node 4 -m"):
        train(laid_out(config(runs, 2), replicate=2, tensor=2), runs)
