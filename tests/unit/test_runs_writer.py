"""Records are whole or absent, whatever was written when; the lock belongs to one living process."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disco.errors import UserError
from disco.runs.lock import BusyError, holder, locked
from disco.runs.schema import CONFIG, METRICS, SUMMARY, Outcome
from disco.runs.writer import RunWriter, write_json

LINE = {"step": 1, "tokens": 256, "loss/train": 5.5}
HOLDER = """
import pathlib, sys, time
from disco.runs.lock import locked

with locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    writer = RunWriter(tmp_path / "abc")
    writer.start({"id": "abc"})
    return writer


def test_lines_are_sorted_and_on_disk_at_once(writer: RunWriter) -> None:
    writer.append({"tokens": 256, "step": 1, "loss/train": 5.5})
    expected = b'{"loss/train": 5.5, "step": 1, "tokens": 256}\n'
    assert (writer.folder / METRICS).read_bytes() == expected
    assert writer.offset == len(expected)


def test_a_number_that_is_not_finite_is_missing(writer: RunWriter) -> None:
    writer.append({"step": 1, "loss/train": math.nan, "loss/valid": math.inf, "path": -math.inf})
    assert json.loads((writer.folder / METRICS).read_text()) == {"step": 1}
    writer.finish(Outcome.DIVERGED, "loss nan", tokens=256, loss=math.nan)
    assert "loss" not in json.loads((writer.folder / SUMMARY).read_text())


def test_resume_cuts_the_lines_after_the_checkpoint_and_goes_on(writer: RunWriter) -> None:
    writer.append(LINE)
    offset = writer.offset
    writer.append({**LINE, "step": 2})
    writer.finish(Outcome.FINISHED, tokens=512)
    again = RunWriter(writer.folder)
    again.resume(offset)
    assert not (writer.folder / SUMMARY).exists()
    again.append({**LINE, "step": 3})
    steps = [json.loads(line)["step"] for line in (writer.folder / METRICS).read_text().splitlines()]
    assert steps == [1, 3]
    assert again.offset > offset


def test_without_resume_a_record_begins_empty(writer: RunWriter) -> None:
    writer.append(LINE)
    writer.finish(Outcome.FINISHED)
    again = RunWriter(writer.folder)
    again.append({**LINE, "step": 7})
    assert json.loads((writer.folder / METRICS).read_text())["step"] == 7
    assert not (writer.folder / SUMMARY).exists()


def test_resume_refuses_when_lines_were_lost(writer: RunWriter) -> None:
    writer.append(LINE)
    with pytest.raises(UserError, match=r"metrics\.jsonl has 46 bytes but its checkpoint needs 100"):
        RunWriter(writer.folder).resume(100)
    assert (writer.folder / METRICS).stat().st_size == 46


def test_the_summary_says_how_it_ended(writer: RunWriter) -> None:
    writer.finish(Outcome.FAILED, "worker died", step=3, parent=None)
    summary = json.loads((writer.folder / SUMMARY).read_text())
    expected = {"schema": 1, "id": "abc", "outcome": "failed", "reason": "worker died", "step": 3, "parent": None}
    assert summary == expected


def test_a_failing_write_leaves_the_old_file_and_no_other(writer: RunWriter) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(writer.folder / CONFIG, {"lr": math.nan})
    assert json.loads((writer.folder / CONFIG).read_text()) == {"id": "abc"}
    assert os.listdir(writer.folder) == [CONFIG]


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/abc: Not a directory; choose another place"):
        RunWriter(tmp_path / "file" / "abc").start({})
    with pytest.raises(UserError, match=r"cannot write .*nowhere/config.json: No such file"):
        write_json(tmp_path / "nowhere" / CONFIG, {})


def test_one_process_holds_a_lock_and_the_kernel_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    assert holder(path) == other.pid
    with pytest.raises(BusyError, match=f"{tmp_path} is in use by process {other.pid}"), locked(path):
        pass
    other.send_signal(signal.SIGKILL)
    with locked(path, wait=5.0):
        assert holder(path) == os.getpid()
        assert path.read_text() == f"{os.getpid()}\n"
    assert holder(path) is None
    other.wait()


def test_waiting_for_a_lock_gives_up_in_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    with locked(tmp_path / "lock"), pytest.raises(BusyError), locked(tmp_path / "lock", wait=0.2):
        pass
    assert 0.2 <= time.monotonic() - begun < 2
