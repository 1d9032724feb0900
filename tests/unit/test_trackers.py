"""Trackers that follow run records, with the real packages: what they hold is read back and is the record."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from records import config, write

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
from tracked import in_tensorboard, in_trackio, in_wandb, record, to_float32

from disco.cli import main
from disco.errors import UserError
from disco.integrations import follow
from disco.integrations.follow import Follower, following, send
from disco.integrations.trackers import TRACKERS, Head, chosen
from disco.runs.lock import locked
from disco.runs.schema import METRICS, Outcome, deterministic
from disco.runs.writer import RunWriter

ALL = dict.fromkeys(TRACKERS, "")


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")


def line(step: int, wall: float = 0.5) -> dict[str, float]:
    values = {"loss/train": 5.5 / (1 + step), "lr/hidden": 2**-4, "norm/weights/rms_to_inf/output": 1 + step / 3}
    odd = {"loss/valid": math.pi / (1 + step)} if step % 2 else {}
    return {"step": step, "tokens": step * 2**33, "time/wall": wall * step, **values, **odd}


def grow(folder: Path, lines: Sequence[Mapping[str, float]], after: int | None = None) -> None:
    """Appends to a record, after cutting it to its first ``after`` lines."""
    with RunWriter(folder) as writer:
        writer.resume(sum(map(len, (folder / METRICS).read_bytes().splitlines(keepends=True)[:after])))
        for each in lines:
            writer.append(each)


def check(folder: Path) -> None:
    expected = record(folder)
    assert in_tensorboard(folder) == to_float32(expected)
    assert in_wandb(folder) == expected
    assert in_trackio(folder) == expected


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_all_trackers_hold_the_record_and_a_second_time_nothing_more(tmp_path: Path) -> None:
    folder = write(tmp_path / "runs", config(), [line(step) for step in range(5)])
    other = write(tmp_path / "runs", config(seed=1), [line(7)], Outcome.DIVERGED, reason="training loss nan")
    assert main(["runs", "track", str(tmp_path / "runs"), "--to", "tensorboard,wandb,trackio"]) == 0
    check(folder)
    check(other)
    files = sorted(tmp_path.rglob("*.wandb")), sorted(tmp_path.rglob("events.*"))
    assert send([tmp_path / "runs"], "wandb,tensorboard,trackio") == 2
    assert files == (sorted(tmp_path.rglob("*.wandb")), sorted(tmp_path.rglob("events.*")))
    (file,) = tmp_path.glob(f"runs/wandb/*/run-{other.name}.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(file)]
    summary = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    text = json.dumps(summary)
    assert '"diverged"' in text
    assert "training loss nan" in text
    assert json.dumps(config(seed=1).optimizer.lr) in text


def test_a_run_that_is_killed_and_resumed_has_no_point_twice_and_no_gap(tmp_path: Path) -> None:
    folder = write(tmp_path / "runs", config(), [line(0), line(1)], outcome=None)
    follower = Follower([tmp_path / "runs"], ALL, no_warning)
    follower.poll()
    grow(folder, [line(2), line(3)])
    follower.poll()
    grow(folder, [line(step, wall=1000 / 3) for step in (2, 3, 4)], after=2)  # longer: what was read ends in a line
    follower.poll()
    grow(folder, [line(2)], after=2)
    follower.poll()
    with (folder / METRICS).open("ab") as file:
        file.write(b'{"step": 3, "to')  # a line that is being written
    follower.poll()
    follower.close()  # killed: the rest is for the next one
    grow(folder, [line(step) for step in (3, 4, 5, 6)], after=3)
    second = Follower([tmp_path / "runs"], ALL, no_warning)
    assert second.poll(last=True)
    second.close()
    tracked = in_tensorboard(folder), in_wandb(folder), in_trackio(folder)
    assert [[step for step, _ in points] for points in tracked] == [list(range(7))] * 3
    for points in tracked[1:]:
        assert [deterministic(values) for _, values in points] == [deterministic(line) for _, line in record(folder)]


class Unsteady:
    """Fails ``fails`` times, and has its lines in ``lines``."""

    fails = 0
    lines: ClassVar[list[tuple[str, float]]] = []

    def __init__(self, run: Head, where: str) -> None:
        self.run = run
        self.last = int(max((step for name, step in self.lines if name == run.id), default=-1))

    def log(self, lines: Sequence[Mapping[str, float]]) -> None:
        for each in lines:
            if Unsteady.fails and each["step"] > 1:
                Unsteady.fails -= 1
                raise OSError("no route to host\nat all")
            self.lines.append((self.run.id, each["step"]))
            self.last = int(each["step"])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        pass


def test_a_tracker_that_fails_warns_once_and_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", Unsteady)  # type: ignore[arg-type]
    monkeypatch.setattr(Unsteady, "lines", [])
    monkeypatch.setattr(Unsteady, "fails", 2)
    folders = [write(tmp_path / "runs", config(seed=seed), map(line, range(4))) for seed in (1, 2)]
    said: list[str] = []
    follower = Follower([tmp_path / "runs"], {"wandb": "", "trackio": ""}, said.append)
    assert not follower.poll()
    assert not follower.poll(), "it rests"
    assert Unsteady.fails == 1
    monkeypatch.setattr(follow, "RETRY_SECONDS", -1.0)
    assert not follower.poll(last=True)
    assert follower.poll()
    assert said == ["wandb: OSError: no route to host at all"]
    assert sorted(Unsteady.lines) == sorted((folder.name, step) for folder in folders for step in range(4))
    assert [in_trackio(folder) for folder in folders] == [record(folder) for folder in folders]


class Missing:
    """Makes a package one that is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(name), *sys.meta_path])
    write(tmp_path / "runs", config(), [line(0)])
    assert main(["runs", "track", str(tmp_path / "runs"), "--to", name]) == 2
    error = f"disco: error: {name}: the package {name} is not installed: pip install 'disco-scion[trackers]'\n"
    assert capsys.readouterr().err == error


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen(" wandb:me/mine, tensorboard") == {"wandb": "me/mine", "tensorboard": ""}
    for text, said in (("mlflow", "got 'mlflow'"), (",", "no tracker is named")):
        with pytest.raises(UserError, match=said), following(tmp_path / "runs", text):
            pass
    assert main(["runs", "track", str(tmp_path), "--to", "trackio"]) == 2
    assert "holds no runs" in capsys.readouterr().err


def test_two_processes_do_not_send_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "HANDOVER_SECONDS", 0.05)
    folder = write(tmp_path / "runs", config(), [line(0)])
    with locked(folder / "trackio.lock"), pytest.raises(UserError, match="another process sends these runs"):
        send([tmp_path / "runs"], "trackio:mine")
    send([tmp_path / "runs"], "trackio:mine")
    assert in_trackio(folder, "mine") == record(folder)


def test_following_imports_no_torch() -> None:
    code = "import sys, disco.integrations.follow; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
