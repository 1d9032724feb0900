"""Workers of a local sweep: one on each GPU that torch finds, each seeing only its own, or one on each core."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from records import config

from disco.errors import UserError
from disco.runs.schema import DATA
from disco.sweep import places
from disco.sweep.engines._pool import Pool
from disco.sweep.engines.local import Result, run_study
from disco.sweep.places import Places, places_for
from disco.sweep.progress import Lines
from disco.sweep.study import build_study
from disco.train import calibrate
from disco.train import gpus as machine
from disco.train.config import ParallelConfig, TrainConfig
from disco.train.data import prepare
from disco.train.gpus import Gpu, gpus

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
TELLS = """
import os, sys
os.write(1, b'"%s"\\n' % os.environb[b"CUDA_VISIBLE_DEVICES"])
sys.stdin.read()
"""
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def ask_again() -> Iterator[None]:
    gpus.cache_clear()
    yield
    gpus.cache_clear()


def on(device: str) -> TrainConfig:
    return config(parallel=ParallelConfig(device=device))  # type: ignore[arg-type]


def torch_says(monkeypatch: pytest.MonkeyPatch, there: Path, **answer: Any) -> list[Any]:
    """A machine with the driver file ``there`` and this answer of torch; returns where the questions are written."""
    there.touch()
    asked: list[Any] = []
    monkeypatch.setattr(machine, "DRIVERS", (str(there),))

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(**({"returncode": 0, "stdout": "", "stderr": ""} | answer))

    monkeypatch.setattr(machine.subprocess, "run", run)
    return asked


def test_gpus_are_those_that_torch_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = torch_says(monkeypatch, tmp_path / "driver", stdout="[100, 200]")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == (Gpu("0", 100), Gpu("1", 200))
    assert gpus() == (Gpu("0", 100), Gpu("1", 200))
    assert asked == [[sys.executable, "-c", machine.QUESTION]], "asked once"
    gpus.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f")
    assert gpus() == (Gpu("3", 100), Gpu("GPU-5f", 200))


def test_a_gpu_that_cannot_be_used_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_says(monkeypatch, tmp_path / "driver", stdout="a library says hello\n[100, null, 300]\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == (Gpu("0", 100), Gpu("2", 300))


def test_without_a_driver_nobody_asks_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = torch_says(monkeypatch, tmp_path / "driver", stdout="[100]")
    (tmp_path / "driver").unlink()
    assert (gpus(), asked) == ((), [])


def test_a_torch_that_does_not_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_says(monkeypatch, tmp_path / "driver", returncode=1, stderr="Traceback\nImportError: libcudart")
    with pytest.raises(UserError, match=r"what GPUs are here \(exit code 1\): ImportError: libcudart"):
        gpus()
    torch_says(monkeypatch, tmp_path / "driver", stdout="hello")
    with pytest.raises(UserError, match=r"what GPUs are here \(exit code 0\): hello"):
        gpus()


def test_the_question_to_torch_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", machine.QUESTION],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_a_worker_per_gpu_unless_all_runs_want_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "gpus", lambda: (Gpu("0", 2**34), Gpu("1", 2**33)))
    assert places_for([on("auto")]) == Places(2, 2**33, ("0", "1")), "half of the smaller one's memory each"
    monkeypatch.setattr(places, "memory_to_use", lambda: 2**30)
    assert places_for([on("cpu"), on("auto")]) == Places(2, 2**30, ("0", "1")), "some are on the CPU"
    assert places_for([on("cuda")], workers=4) == Places(4, 2**33, ("0", "1")), "two share a GPU"
    assert places_for([on("cuda")], workers=1) == Places(1, 2**32, ("0", "1"))
    assert places_for([on("cpu")]) == Places(CORES, 2**30, ())
    monkeypatch.setattr(places, "gpus", lambda: ())
    assert (places_for([on("auto")]).workers, places_for([on("auto")]).gpus) == (CORES, ())
    assert places_for([on("auto")], workers=3).workers == 3


def test_workers_share_the_gpus_evenly_also_after_a_death(tmp_path: Path) -> None:
    def start() -> str:
        pool.start(log, ("2", "7"))
        ((_, told),) = [heard for heard in pool.heard(30.0) if heard[1]]
        return str((told or [""])[0])

    with (tmp_path / "log").open("wb") as log, Pool((sys.executable, "-c", TELLS)) as pool:
        assert [start() for _ in range(5)] == ["2", "7", "2", "7", "2"]
        pool.workers[3].process.kill()
        assert [messages for _, messages in pool.heard(30.0)] == [None]
        assert [start(), start()] == ["7", "7"]
    with (tmp_path / "log").open("wb") as log, Pool((sys.executable, "-c", TELLS)) as pool:
        pool.start(log)
        assert [messages for _, messages in pool.heard(30.0)] == [[""]], "no GPU is seen from a core"


def test_a_study_trains_on_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "gpus", lambda: (Gpu("3", 2**34), Gpu("5", 2**34)))
    (tmp_path / "text.txt").write_text("All happy families are alike. " * 500)
    out = tmp_path / "out"
    model = {"width": 16, "depth": 1, "head_size": 8, "context": 64}
    data = {"valid_tokens": 256, "source": [str(tmp_path / "text.txt")]}
    table = {"base": {"batch": 256, "horizon": 2**12, "model": model, "data": data}, "axes": {"lr": [0.1, 0.2, 0.4]}}
    plan = build_study(table, partial(prepare, cache=out / DATA))
    with Pool(FAKE) as pool:
        assert run_study(plan, out, show=Lines(io.StringIO()), pool=pool) == Result(finished=3, diverged=0)
        assert sorted(worker.gpu for worker in pool.workers) == ["3", "5"]


def test_speed_is_measured_on_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(*_: Any, env: dict[str, str], **__: Any) -> SimpleNamespace:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(returncode=0, stdout="[30.0]")

    monkeypatch.setattr(calibrate.subprocess, "run", run)
    assert calibrate.tokens_per_second([[on("auto")]], tmp_path, 3, ("0", "1")) == [30.0]
    assert sorted(seen) == ["0", "0", "1"]
    seen.clear()
    calibrate.tokens_per_second([[on("auto")]], tmp_path, 2)
    assert seen == ["", ""]
