"""Runs that are really trained, watched: killed and resumed while they are followed, with faults, by exit code."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import faults

from disco.cli import main
from disco.guide import Curvatures, Estimate, Plan
from disco.guide._bands import Band, bands
from disco.guide._course import Course, course
from disco.guide._faults import looks_like
from disco.runs.reader import read_run
from disco.runs.schema import CHECKPOINTS, CONFIG, SUMMARY
from disco.runs.writer import write_json

HORIZON, BATCH = 2**16, 256
CONFIGURATION = f"""
horizon = {HORIZON}
batch = {BATCH}
checkpoint_seconds = 0.1
model = {{ width = 16, depth = 1, head_size = 8, context = 64 }}
data = {{ valid_tokens = 1024 }}
optimizer = {{ lr = 0.125 }}
"""


def _plan(norm: float) -> Plan:
    return Plan(
        family="scion", model="d16-L1", tokens=HORIZON, batch=Estimate(float(BATCH), None, "given", "given"),
        lr=Estimate(0.125, None, "rule", "made up"), norm=Estimate(norm, None, "rule", "made up"), octaves=0.0, cells=9,
        warnings=(), curvature=Curvatures(lr=0.02),
    )  # fmt: skip


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "disco", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait(for_file: Path, pattern: str, trainer: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 120
    while not (found := sorted(for_file.glob(pattern))):
        assert trainer.poll() is None, trainer.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_a_run_that_is_killed_and_resumed_is_followed_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIGURATION)
    write_json(tmp_path / "plan.json", _plan(16.0).to_dict())
    out = tmp_path / "runs"
    train = ("train", tmp_path / "run.toml", "--out", out)
    trainer = _start(*train)
    folder = _wait(out, f"*/{CONFIG}", trainer).parent
    page = tmp_path / "watch.html"
    options = ("--plan", tmp_path / "plan.json", "--follow", "--every", "0.05", "--json", "-o", page)
    watcher = _start("watch", folder, *options)
    _wait(folder, f"{CHECKPOINTS}/latest.pt", trainer)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.communicate()
    assert not (folder / SUMMARY).exists()
    time.sleep(0.2)
    assert watcher.poll() is None, watcher.communicate()
    assert subprocess.run([sys.executable, "-m", "disco", *map(str, train)], check=False).returncode == 0
    printed, errors = watcher.communicate(timeout=60)
    checks = [json.loads(line) for line in printed.splitlines()]
    assert checks, errors
    assert (checks[-1]["tokens"], checks[-1]["ended"]) == (HORIZON, "finished")
    assert watcher.returncode == {"on course": 0, "off course": 1, "cannot tell": 3}[checks[-1]["verdict"]]
    truth = course(read_run(folder))
    for each in checks:
        known = truth.until(each["tokens"])
        assert each["norm"] == pytest.approx(known.norm[-1])
        assert (each["forecast"] is None) == (each["tokens"] < 3 * BATCH)
    assert page.read_text().count('class="figure"') >= 2


def test_exit_codes_say_how_a_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(CONFIGURATION.replace(str(HORIZON), str(2**14)))
    assert main(["train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")]) == 0
    folder = next((tmp_path / "runs").glob(f"*/{CONFIG}")).parent
    norm = float(course(read_run(folder)).norm[-1])
    plan = tmp_path / "plan.json"
    capsys.readouterr()
    for target, code in ((norm, 0), (norm * 8, 1), (float("nan"), 3)):
        write_json(plan, _plan(target).to_dict())
        assert main(["watch", str(folder), "--plan", str(plan)]) == code
    printed = capsys.readouterr().out
    assert "on course after 2^14 tokens (100.0%) (the run has finished)" in printed
    assert "octaves too low" in printed
    assert "the plan knows no norm to end with" in printed
    assert main(["watch", str(tmp_path / "nowhere"), "--plan", str(plan)]) == 2
    assert main(["watch", str(folder), "--plan", str(tmp_path / "run.toml")]) == 2
    assert all(line.startswith("disco: error: ") for line in capsys.readouterr().err.splitlines())


SIZE = faults.SIZES["small"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Band, ...], list[Course]]:
    """A folder of runs, the bands of a study in it, and healthy runs of other seeds at the planned settings."""
    folder = tmp_path_factory.mktemp("faults")
    expected = bands(faults.study(folder, SIZE), SIZE.batch, SIZE.rate)
    seeds = range(1, 1 + SIZE.seeds)
    return folder, expected, faults.train(folder, [faults.planned(SIZE, seed) for seed in seeds])


def test_healthy_runs_of_other_seeds_are_not_flagged(trained: tuple[Path, tuple[Band, ...], list[Course]]) -> None:
    _, expected, healthy = trained
    assert [faults.first_off(each, expected) for each in healthy] == [math.inf] * len(healthy)


@pytest.mark.parametrize("fault", ["momentum", "small batch", "ratio", "shards"])
def test_norms_show_a_fault_in_half_the_tokens_that_the_loss_takes(
    trained: tuple[Path, tuple[Band, ...], list[Course]], fault: str
) -> None:
    """More seeds, and the faults that norms show later or not, in benchmarks/faults.py."""
    folder, expected, healthy = trained
    (run,) = faults.train(folder, [faults.planned(SIZE, 101)], fault)
    assert 2 * faults.first_off(run, expected) <= min(faults.loss_off(run, healthy), run.last)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("decay", "weights decay"),
        ("ratio", "its ratio 2^-3 were forgotten"),
        ("small batch", "is the batch, or the weight of the momentum, another than declared?"),
    ],
)
def test_a_fault_is_named(trained: tuple[Path, tuple[Band, ...], list[Course]], fault: str, words: str) -> None:
    folder, expected, _ = trained
    (run,) = faults.train(folder, [faults.planned(SIZE, 101)], fault)
    assert math.isfinite(faults.first_off(run, expected))
    assert words in looks_like(run, expected)
