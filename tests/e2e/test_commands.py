"""Whole commands: train and continue, interrupt a sweep and take it up again, look at it while it runs."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from sweeps import MODEL, records, run, start, write_study

from disco.cli import main
from disco.runs.schema import METRICS

AXES = "[axes]\nlr = ['2^-4', '2^-3', '2^-2']\n"

Capture = pytest.CaptureFixture[str]


def disco(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process, which has torch already."""
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_one_run_is_trained_continued_and_in_the_end_done(tmp_path: Path, capsys: Capture) -> None:
    path, out = tmp_path / "run.toml", tmp_path / "runs"
    path.write_text(f"horizon = 4096\nbatch = 256\n{MODEL}")
    command = ("train", path, "--set", "optimizer.lr=2^-3", "seed=1", "--out", out)
    code, printed, _ = disco(capsys, *command)
    folder = next(file.parent for file in out.glob(f"*/{METRICS}"))
    assert code == 0
    assert printed.startswith(f"finished at 4,096 tokens: {folder}\nheld-out loss ")
    lines = (folder / METRICS).read_bytes()
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["optimizer"]["lr"], config["seed"]) == (0.125, 1)

    code, printed, _ = disco(capsys, *command, "--set", "horizon=8192", "--json")
    result = json.loads(printed.splitlines()[-1])
    assert (code, result["outcome"], result["tokens"], result["folder"]) == (0, "finished", 8192, str(folder))
    assert result["loss"] < 5
    assert (folder / METRICS).read_bytes().startswith(lines)
    assert disco(capsys, *command)[1].startswith("finished at 8,192 tokens")

    code, printed, _ = disco(capsys, "train", path, "--set", "optimizer.lr=2^10", "horizon=8192", "--out", out)
    assert code == 1
    assert printed.startswith("diverged at ")
    assert "training loss" in printed


def test_ctrl_c_leaves_checkpoints_and_the_same_command_goes_on(tmp_path: Path, capsys: Capture) -> None:
    study, out = write_study(tmp_path / "study.toml", AXES, horizon=2**22), tmp_path / "out"
    study.write_text(study.read_text().replace("checkpoint_seconds = 0.2", "checkpoint_seconds = 1000"))
    sweep = start(study, out)
    deadline = time.monotonic() + 60
    while sum(file.stat().st_size > 4_000 for file in out.glob(f"*/{METRICS}")) < 2:  # both workers are well into a run
        assert time.monotonic() < deadline
        time.sleep(0.01)

    status = _status(out, capsys)
    assert status["process"] == sweep.pid
    assert sorted(run["state"] for run in status["runs"]) == ["running", "running", "waiting"]
    code, _, errors = disco(capsys, "sweep", "run", study, "--out", out)
    assert code == 2
    assert f"{out} is in use by process {sweep.pid}; wait for it or stop it" in errors

    sweep.send_signal(signal.SIGINT)
    printed, errors = sweep.communicate(timeout=30)
    assert sweep.returncode == 130, errors
    result = json.loads(printed.splitlines()[-1])
    assert (result["waiting"], result["signal"]) == (3, signal.SIGINT)
    status = _status(out, capsys)
    assert status["process"] is None
    assert sorted(run["state"] for run in status["runs"]) == ["interrupted", "interrupted", "waiting"]
    content = {file: file.read_bytes() for file in out.glob(f"*/{METRICS}")}

    horizon = 256 * (max(run["tokens"] for run in status["runs"]) * 3 // 2 // 256 + 1)  # beyond the checkpoints
    write_study(study, AXES, horizon=horizon)
    assert run(study, out)["finished"] == 3
    for file, before in content.items():  # wall times included: what was recorded was not trained again
        assert file.read_bytes().startswith(before)
    assert {run["state"] for run in _status(out, capsys)["runs"]} == {"finished"}
    assert {record[2]["tokens"] for record in records(out).values()} == {horizon}


def _status(out: Path, capsys: Capture) -> Any:
    return json.loads(disco(capsys, "sweep", "status", out, "--json")[1])
