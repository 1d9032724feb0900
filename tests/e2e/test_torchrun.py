"""One run in processes that torchrun starts: told to stop, continued by other numbers of processes, refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disco.cli import main
from disco.cli._train import load_config
from disco.runs.schema import CHECKPOINTS, METRICS, deterministic
from disco.train import checkpoint
from disco.train.config import TrainConfig
from disco.train.data import TokenStream, prepare
from disco.train.loop import train
from disco.train.team import Team
from disturbed import Disturbed

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "train.toml"
TRACED = Path(__file__).parent / "traced.py"
PARALLEL = {1: (1, 1, 1), 2: (1, 2, 1), 4: (1, 2, 2)}
"""Processes -> replicate, shard, tensor."""
SMALLER = ("model.width=32", "data.valid_tokens=1024")


def arguments(out: Path, processes: int, *more: str) -> list[str]:
    names = ("replicate", "shard", "tensor")
    sizes = [f"parallel.{name}={size}" for name, size in zip(names, PARALLEL[processes], strict=True)]
    return ["train", str(CONFIG), "--out", str(out), "--set", *SMALLER, *sizes, *more]


def torchrun(processes: int, *what: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *what]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def lines(out: Path) -> list[dict[str, Any]]:
    (metrics,) = out.glob(f"*/{METRICS}")
    return [deterministic(json.loads(line)) for line in metrics.read_text().splitlines() if line.endswith("}")]


def last_step(out: Path) -> int:
    found = [lines(out) for _ in out.glob(f"*/{METRICS}")]
    return int(found[0][-1]["step"]) if found and found[0] else -1


def stop(command: list[str], when: Callable[[], bool], number: int = signal.SIGTERM) -> tuple[int, str]:
    """Sends a signal once ``when`` says so; exit code and stderr."""
    process = start(command)
    deadline = time.monotonic() + 300
    while not when():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def config(*settings: str) -> TrainConfig:
    return load_config(CONFIG, [*SMALLER, "parallel.shard=1", *settings])


def blocks(folder: Path) -> dict[tuple[int, int], str]:
    """(step, place in the batch) -> hash of the block, of all processes; they must agree where they saw the same."""
    seen: dict[tuple[int, int], str] = {}
    for file in folder.glob("*.txt"):
        for line in file.read_text().splitlines():
            step, place, digest = line.split()
            assert seen.setdefault((int(step), int(place)), digest) == digest
    return seen


@pytest.mark.parametrize(
    ("worlds", "count", "steps"),
    [pytest.param((2,), 3, 64, id="2-1"), pytest.param((2, 4), 10, 600, id="2-4-1", marks=pytest.mark.full)],
)
def test_other_numbers_of_processes_continue_one_run(
    tmp_path: Path, worlds: tuple[int, ...], count: int, steps: int
) -> None:
    out, trace = tmp_path / "runs", tmp_path / "trace"
    trace.mkdir()
    longer = f"horizon={steps * 1024}"
    for index, processes in enumerate(worlds):
        until = (index + 1) * steps // (len(worlds) + 2)
        command = torchrun(processes, str(TRACED), str(trace), *arguments(out, processes, longer))
        code, errors = stop(command, lambda until=until: last_step(out) >= until)  # type: ignore[misc]
        assert code != 0
        assert errors.count("disco: stopped by SIGTERM at ") == 1, errors
    stopped = checkpoint.sharded(next(out.glob(f"*/{CHECKPOINTS}")))[0].name
    assert main(arguments(out, 1, longer)) == 0
    singles = []
    for noise in range(count + 1):
        own = tmp_path / f"single{noise}"
        own.mkdir()
        (own / "data").symlink_to(out / "data")
        train(config(longer), own, team=Disturbed(noise) if noise else Team())
        singles.append(lines(own))
    assert_within(lines(out), singles)
    assert_the_order_of(blocks(trace), config(longer), out / "data", int(stopped[len("latest-") : -len(".dcp")]))


def assert_within(found: list[dict[str, Any]], singles: list[list[dict[str, Any]]]) -> None:
    """The same steps, and losses within the spread of runs of one process whose initial weights differ by 1e-7."""
    assert [line["step"] for line in found] == [line["step"] for line in singles[0]]
    for key in ("loss/valid", "loss/train"):
        several = np.array([[line.get(key, np.nan) for line in single] for single in singles])
        mine = np.array([line.get(key, np.nan) for line in found])
        low, high = several.min(0), several.max(0)
        # one more run lies outside the range of ten in two of eleven cases, hence the slack; runs only move apart
        slack = np.fmax.accumulate(high - low) + 1e-5 * high
        measured = np.isfinite(mine)
        assert measured.any()
        assert (mine >= low - slack)[measured].all(), key
        assert (mine <= high + slack)[measured].all(), key


def assert_the_order_of(seen: dict[tuple[int, int], str], chosen: TrainConfig, cache: Path, tokens: int) -> None:
    """All blocks up to ``tokens`` were trained on, each at its place in the order of one process."""
    stream = TokenStream(prepare(chosen.data, cache), cache, context=chosen.model.context, seed=chosen.seed)
    assert len(seen) >= tokens // chosen.model.context
    for step in range(1 + max(step for step, _ in seen)):
        for place, block in enumerate(stream.batch(step, chosen.batch)[0]):
            assert seen[step, place] == hashlib.sha256(block.tobytes()).hexdigest()


def test_plain_train_saves_when_told_to_stop(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    command = [sys.executable, "-m", "disco", *arguments(out, 1)]
    code, errors = stop(command, lambda: last_step(out) >= 11)
    assert code == 128 + signal.SIGTERM
    assert errors.count("disco: stopped by SIGTERM at ") == 1
    assert "Traceback" not in errors
    before = last_step(out)
    assert main(arguments(out, 1)) == 0
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "data").symlink_to(out / "data")
    train(config(), tmp_path / "whole")
    assert lines(out) == lines(tmp_path / "whole")
    assert before < lines(out)[-1]["step"]


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_stopped_and_started_again_leaves_the_same_record(tmp_path: Path, number: signal.Signals) -> None:
    for name, interrupted in (("cut", True), ("whole", False)):
        command = torchrun(2, "-m", "disco", *arguments(tmp_path / name, 2))
        if interrupted:
            _, errors = stop(command, lambda: last_step(tmp_path / "cut") >= 16, number)
            assert errors.count(f"disco: stopped by {number.name} at ") == 1, errors
        process = start(command)
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert printed.count("finished at ") == 1
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_wrong_sizes_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(tmp_path, 4)) == 2
    assert capsys.readouterr().err == (
        "disco: error: parallel.replicate x shard x tensor is 1 x 2 x 2 = 4, but torchrun started 2 processes; make "
        "the sizes multiply to that, or start it with torchrun --nproc-per-node 4 -m disco train ...\n"
    )


@pytest.mark.full
def test_wrong_sizes_are_said_once_by_torchrun(tmp_path: Path) -> None:
    process = start(torchrun(2, "-m", "disco", *arguments(tmp_path, 4)))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.count("disco: error: parallel.replicate x shard x tensor is 1 x 2 x 2 = 4") == 1
    assert "exitcode  : 2" in errors
