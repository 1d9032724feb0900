"""``--track`` with the real trackers: whatever is killed, they end up with the record, each point once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeps import MODEL, children, write_study
from tracked import in_tensorboard, in_trackio, in_wandb, record, to_float32

from disco.runs.schema import CONFIG, METRICS, deterministic

ALL = "tensorboard,wandb,trackio"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}


def start(environment: dict[str, str], *command: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "disco", *map(str, command)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def rows(out: Path) -> int:
    """Lines that trackio has of the only run in ``out``."""
    folders = [file.parent for file in out.glob(f"*/{CONFIG}")]
    try:
        return len(in_trackio(folders[0])) if folders else 0
    except Exception:  # no database yet, or one that is being made
        return 0


def numbers(points: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, object]]]:
    """A line may have been sent before a kill, and written again after it with other times."""
    return [(step, deterministic(values)) for step, values in points]


def test_a_run_that_is_killed_is_complete_in_every_tracker(tmp_path: Path, environment: dict[str, str]) -> None:
    config, out = tmp_path / "run.toml", tmp_path / "runs"
    config.write_text(f"horizon = {2**17}\nbatch = 64\ncheckpoint_seconds = 0.2\n{MODEL}")
    command = ("train", config, "--out", out, "--track", ALL)
    for whom in ("training", "follower"):
        before = rows(out)
        process = start(environment, *command)
        wait(lambda before=before: rows(out) > before)
        if whom == "training":
            process.kill()
        else:
            (follower,) = (pid for pid in children(process.pid) if b"integrations.follow" in cmdline(pid))
            os.kill(follower, signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 0, "training does not need its follower"
    assert "ended early; disco runs track" in errors
    (folder,) = (file.parent for file in out.glob(f"*/{CONFIG}"))
    assert rows(out) < len(record(folder))
    after = start(environment, "runs", "track", folder, "--to", ALL)
    assert after.wait() == 0
    expected = record(folder)
    assert numbers(in_tensorboard(folder)) == numbers(to_float32(expected))
    assert numbers(in_wandb(folder)) == numbers(expected)
    assert numbers(in_trackio(folder)) == numbers(expected)


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_sweep_without_the_tracker_s_package_loses_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tensorboard':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    study, out = write_study(tmp_path / "study.toml", "[axes]\nlr = ['2^-5', '2^-4']"), tmp_path / "runs"
    path = f"{blocked}:{environment.get('PYTHONPATH', '')}"
    command = ("sweep", "run", study, "--out", out, "--json", "--track", "tensorboard,trackio")
    printed, errors = start(environment | {"PYTHONPATH": path}, *command).communicate()
    assert printed, errors
    assert json.loads(printed.splitlines()[-1])["finished"] == 2, errors
    assert errors.count("disco: warning: ") == 1, errors
    assert "the package tensorboard is not installed: pip install 'disco-scion[trackers]'" in errors
    folders = [file.parent for file in out.glob(f"*/{METRICS}")]
    assert [in_trackio(folder) for folder in folders] == [record(folder) for folder in folders]
    after = start(environment, "runs", "track", out, "--to", "tensorboard")
    assert "2 runs are in tensorboard" in after.communicate()[0]
    assert [in_tensorboard(folder) for folder in folders] == [to_float32(record(folder)) for folder in folders]
