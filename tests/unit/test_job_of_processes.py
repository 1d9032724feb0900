"""What the launcher of a job of several processes does, with a shell script in the place of torchrun."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from disco.sweep.engines import torchrun

TREE = "sh -c 'until [ -e {folder}/stop ]; do sleep 0.02; done; touch {folder}/stopped' & wait"
"""A process, and one below it, that leave once they are told by the file."""


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> list[int]:
    """Has ``launch`` run a script, in which {folder} is the launcher's; returns process ids of those started."""
    started: list[int] = []

    def popen(command: list[str], preexec_fn: object) -> subprocess.Popen[bytes]:
        line = script.replace("{folder}", command[-2])
        process = Popen(["sh", "-c", line], preexec_fn=preexec_fn, start_new_session=True)  # type: ignore[call-overload]
        started.append(process.pid)
        return process

    Popen = subprocess.Popen
    monkeypatch.setattr(torchrun.subprocess, "Popen", popen)
    return started


def launch(stop: threading.Event) -> bool:
    return torchrun.launch(Path("disco-1.0.json"), 2, torchrun.STANDALONE, stop)


def test_a_signal_to_all_reaches_the_launcher_alone_which_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started, stop = stand_in(monkeypatch, TREE), threading.Event()

    def signalled() -> None:
        for number in (*torchrun.SIGNALS, *torchrun.SIGNALS):
            os.killpg(started[0], number)  # Slurm sends to every process of a step
        stop.set()

    threading.Timer(0.3, signalled).start()
    assert launch(stop)


def test_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, f"sleep 0.2; {TREE}")
    stop = threading.Event()
    stop.set()
    assert launch(stop)


def test_the_end_of_a_run_is_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "true")
    stop = threading.Event()
    stop.set()
    assert not launch(stop)


def test_a_death_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "touch {folder}/stopped; exit 3")
    with pytest.raises(RuntimeError, match="torchrun ended with exit code 3"):
        launch(threading.Event())


def test_the_command_of_one_of_several_nodes(tmp_path: Path) -> None:
    meet = ("--nnodes=2", "--node-rank=1", "--master-addr=gpu7", "--master-port=24567")
    assert torchrun.command(Path("/o/disco-1.0.json"), 4, meet, tmp_path) == [
        sys.executable, "-m", "torch.distributed.run", *meet, "--nproc-per-node=4", "--signals-to-handle=SIGINT",
        "-m", "disco.sweep.engines.torchrun", "/o/disco-1.0.json", str(tmp_path), str(os.getpid()),
    ]  # fmt: skip


class Ranks:
    """A team of which another process may say that it is to stop."""

    others = False

    def agree(self, flag: bool) -> bool:
        return flag or self.others


def test_processes_leave_when_any_is_told_or_its_launcher_is_gone(tmp_path: Path) -> None:
    def told(launcher: int) -> torchrun._Told:
        asked = torchrun._Told(tmp_path, launcher)
        asked.team = Ranks()  # type: ignore[assignment]
        return asked

    mine = told(os.getpid())
    assert not mine.is_set()
    mine.team.others = True  # type: ignore[attr-defined]
    assert mine.is_set()
    (tmp_path / torchrun.STOP).touch()
    assert told(os.getpid()).is_set()
    (tmp_path / torchrun.STOP).unlink()
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert told(gone.pid).is_set()
