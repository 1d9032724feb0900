"""The command line: quick to start, one line and exit code 2 for bad input, JSON for machines."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import config, write

from disco.cli import _sweep, main
from disco.cli._train import load_config
from disco.errors import UserError
from disco.runs.schema import METRICS
from disco.sweep.forecast import forecast_study

STUDY = """
[base]
horizon = 4096
batch = 256
model = { width = 16, depth = 1, head_size = 8, context = 64 }
data = { valid_tokens = 1024 }
[axes]
lr = ["2^-4", "2^-3"]
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_help_loads_nothing_heavy() -> None:
    shown = python("-X", "importtime", "-m", "disco", "--help")
    assert shown.returncode == 0
    for command in ("train", "sweep", "fit", "plan", "report", "runs", "demo"):
        assert f"• {command}" in shown.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert not loaded & {"torch", "polars", "scipy", "numpy", "plotly", "tokenizers"}


@pytest.mark.parametrize("module", ["runs.table", "sweep.engines.local", "cli._sweep", "cli._runs", "cli._fit"])
def test_records_studies_and_the_parent_of_a_sweep_need_no_torch(module: str) -> None:
    done = python("-c", f"import disco.{module}, sys; print([name for name in sys.modules if name == 'torch'])")
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {train, fit, plan, watch, report, demo, sweep, data, runs}; see disco --help"),
        (["trian"], "Unrecognized options: trian; Available subcommands: train, fit, "),
        (["sweep"], "Expected one of {run, status, cancel}"),
        (["train"], "Missing from disco train: PATH"),
        (["train", "no.toml"], "cannot read the configuration no.toml: No such file or directory"),
        (["train", "c.toml", "--lr", "1"], "Unrecognized options: --lr, 1"),
        (["train", "c.toml", "--set", "lr"], "--set takes KEY=VALUE, such as optimizer.lr=2^-5, got 'lr'"),
        (["train", "c.toml", "--set", "horizon.x=1"], "--set horizon.x=1: horizon is not a table"),
        (["train", "c.toml", "--set", "optimizer.lr=0"], "c.toml with --set: lr must be a positive number, got 0.0"),
        (["train", "c.toml", "--set", "data.source=nowhere.txt"], "nowhere.txt"),
        (
            ["train", "c.toml", "--set", "horizon=2^60"],
            "the horizon of 1,152,921,504,606,846,976 tokens is longer than",
        ),
        (["train", "bad.toml"], "bad.toml is not TOML: "),
        (["sweep", "run", "no.toml"], "cannot read the study no.toml: No such file or directory"),
        (["sweep", "run", "bad.toml"], "bad.toml is not TOML: "),
        (["sweep", "run", "s.toml", "--data", "nowhere.txt"], "nowhere.txt"),
        (["sweep", "run", "s.toml", "--data", "empty.txt"], "empty.txt"),
        (["sweep", "run", "s.toml", "--data", "binary.txt"], "binary.txt"),
        (["sweep", "run", "s.toml", "--data", "short.txt"], "the horizon of 4,096 tokens is longer than the data: "),
        (["train", "c.toml", "--data", "short.txt", "--set", "batch=4096"], "the batch of 4,096 tokens is larger than"),
        (["demo", "--quick", "--data", "short.txt"], "too few to hold 8,192 tokens out"),
        (["sweep", "run", "s.toml", "--workers", "0"], "--workers must be 1 or more, got 0"),
        (["demo", "--quick", "--workers", "0"], "--workers must be 1 or more, got 0"),
        (["demo", "--workers", "-1"], "--workers must be 1 or more, got -1"),
        (["train", "c.toml", "--threads", "0"], "--threads must be 1 or more, got 0"),
        (["sweep", "run", "s.toml", "--workers", "x"], "Error parsing --workers: no type matching INT"),
        (["sweep", "run", "s.toml", "--out", "s.toml"], "s.toml/data: Not a directory"),
        (["sweep", "status", "."], ". is not the folder of a sweep: it has no study.json"),
        (["fit"], "name at least one folder of run records"),
        (["fit", "nowhere"], "nowhere is not a folder of runs; give the --out of a sweep or a run"),
        (["fit", "."], ". holds no runs (folders with a config.json)"),
        (["report", "."], ". holds no runs (folders with a config.json)"),
        (["plan", "no.json", "--tokens", "2^30"], "cannot read the fit no.json: No such file or directory"),
        (["plan", "bad.toml", "--tokens", "2^30"], "bad.toml is not what disco fit writes: "),
        (["plan", "no.json"], "Missing from disco plan: --tokens NUMBER"),
        *(
            (
                ["plan", "no.json", "--tokens", text],
                f"tokens must be a count of tokens such as 2^30, 1e9, 10B or 20k, got '{text}'",
            )
            for text in ("many", "nan", "inf", "2^5000", "5X", "1.5k5", "1,000", "k", "")
        ),
        (["plan", "no.json", "--tokens", "2^0.5"], "--tokens must be a positive whole number, got '2^0.5'"),
        (["plan", "no.json", "--tokens", "0"], "--tokens must be a positive whole number, got '0'"),
        (["plan", "no.json", "--tokens", "1e300"], "--tokens must be at most 1e+18 tokens, got '1e300'"),
        (["plan", "no.json", "--tokens", "-3"], "--tokens must be a positive whole number, got '-3'"),
        (["plan", "no.json", "--tokens", "8", "--batch", "1.5"], "--batch must be a positive whole number, got '1.5'"),
        (
            ["plan", "no.json", "--tokens", "8", "--max-batch", "0"],
            "--max-batch must be a positive whole number, got '0'",
        ),
        (["runs", "ls", "nowhere"], "nowhere is not a folder of runs"),
        (["runs", "show", "nowhere"], "nowhere is not a folder of runs"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[")
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(bytes(range(256)))
    Path("short.txt").write_text("All work and no play. " * 150)
    Path("s.toml").write_text(STUDY)
    Path("c.toml").write_text(STUDY.partition("[axes]")[0].replace("[base]\n", ""))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("disco: error: ")
    assert message in printed.err
    left = {str(path) for path in Path().rglob("*") if path.is_file() and "data" not in path.parts}
    assert left == {"bad.toml", "s.toml", "c.toml", "empty.txt", "binary.txt", "short.txt"}, "no run was begun"


def test_the_process_exits_with_the_code_and_leaves_stdout_empty() -> None:
    failed = python("-m", "disco", "runs", "ls", "/nowhere")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("disco: error: ")


def test_settings_are_toml_values_or_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("batch = 4096\n[model]\ncontext = 1024\n")
    settings = [
        "optimizer.lr=2^-5.5",
        "model.placement=output",
        "optimizer.ratios={hidden = 0.125}",
        "keep=[4096, 8192]",
    ]
    assert load_config(path, ["horizon=1.024M"]).horizon == 1_024_000
    result = load_config(path, settings)
    assert (result.batch, result.model.context, result.model.placement) == (4096, 1024, "output")
    assert (result.optimizer.lr, result.optimizer.ratios["hidden"], result.keep) == (2**-5.5, 0.125, (4096, 8192))
    with pytest.raises(UserError, match=r"unknown key 'modle'; did you mean 'model'\?"):
        load_config(path, ["modle.width=3"])


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        _sweep, "forecast_study", partial(forecast_study, speeds=lambda cohorts, *_: [2.0**9] * len(cohorts))
    )
    Path("s.toml").write_text(STUDY)
    assert main(["sweep", "run", "s.toml", "--dry-run", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "left to do: 2 runs in 2 cohorts, 2^13 tokens\nexpected: 25s with 1 processes, 0.4 GB of memory" in shown
    assert "study s: 2 runs, 2^13 tokens" in shown
    assert "2^-4 .. 2^-3" in shown
    assert main(["sweep", "run", "s.toml", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["name"], plan["tokens"], len(plan["runs"])) == ("s", 8192, 2)
    assert plan["forecast"]["cohorts"] == 2
    assert os.listdir() == ["s.toml"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A grid of runs whose loss has its minimum at a learning rate of 2^-3."""
    for seed, lr in enumerate(2.0 ** np.arange(-6, 1)):
        x = np.log2(lr) + 3
        lines: list[dict[str, Any]] = [{"step": 0, "path": 0.0, "loss/valid": 5.5}]
        lines += [
            {
                "step": step,
                "path": lr * step,
                "loss/train": 4 + 0.05 * x**2,
                "loss/valid": 4 + 0.05 * x**2 + 0.001 * (-1) ** step,
                "norm/weights/rms_to_inf/output": 2 ** (5 + x),
            }
            for step in (62, 63, 64)
        ]
        write(tmp_path / "runs", config(optimizer={"lr": float(lr)}), lines, tokens=2**14, reason="", wall=float(seed))
    return tmp_path / "runs"


def test_listing_and_showing_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "ls", str(runs), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert sorted(row["lr"] for row in listed["runs"]) == [2.0**k for k in range(-6, 1)]
    assert {row["tokens"] for row in listed["runs"]} == {2**14}
    best = min(listed["runs"], key=lambda row: row["loss"])
    assert main(["runs", "ls", str(runs)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if best["run"] in line)
    assert line.split() == [
        best["run"],
        "d16-L1",
        "scion",
        "2^8",
        "2^-3",
        "0",
        "2^14",
        "2^14",
        "4.0010",
        "2^5",
        "finished",
    ]

    for name in (best["run"], best["run"][:6]):
        assert main(["runs", "show", str(runs / name), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["id"], shown["config"]["batch"], shown["last"]["step"]) == (best["run"], 256, 64)
    assert main(["runs", "show", str(runs / best["run"])]) == 0
    assert "norm/weights/rms_to_inf/output" in capsys.readouterr().out
    assert main(["runs", "show", str(runs)]) == 2
    assert "holds 7 runs; name one of them" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "report", "ls", "show"])
def test_with_damaged_lines_a_command_does_its_work_and_fails(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = next(runs.iterdir())
    with (folder / METRICS).open("a") as file:
        file.write("{\n")
    output = tmp_path / "output"
    arguments = {
        "fit": ["fit", str(runs), "-o", str(output)],
        "report": ["report", str(runs), "-o", str(output)],
        "ls": ["runs", "ls", str(runs), "--json"],
        "show": ["runs", "show", str(folder), "--json"],
    }
    assert main(arguments[command]) == 2
    printed = capsys.readouterr()
    damage = f"{folder / METRICS}:5: not JSON"
    assert printed.err.startswith(f"disco: warning: {damage}")
    if command == "fit":
        assert json.loads(output.read_text())["horizons"][0]["lr"] == pytest.approx(-3, abs=0.01)
    elif command == "report":
        assert damage in output.read_text()
    elif command == "ls":
        assert len(json.loads(printed.out)["runs"]) == 7
    else:
        assert json.loads(printed.out)["last"]["step"] == 64


def test_a_run_in_two_folders_is_no_damage(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = runs.parent / "copy"
    shutil.copytree(runs, copy)
    assert main(["runs", "ls", str(runs), str(copy), "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["runs"]) == 7
    assert printed.err.count("was already read from") == 7


def test_from_runs_to_a_plan(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "fit.json"
    assert main(["fit", str(runs), "-o", str(output)]) == 0
    assert " 2^-3 " in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["horizons"][0]["lr"] == pytest.approx(-3, abs=0.01)
    assert content["horizons"][0]["norm"] == pytest.approx(5, abs=0.01)
    assert main(["fit", str(runs), "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == content
    assert main(["plan", str(output), "--tokens", "2^20", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == 2**20
    assert plan["lr"]["value"] == pytest.approx(2**-3, rel=0.01)
    assert main(["plan", str(output), "--tokens", "2^20"]) == 0
    printed = capsys.readouterr()
    assert "2^-3" in printed.out
    assert "the learning rate is a default, not a prediction" in printed.err


def test_an_unwritable_output_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(runs), "-o", str(runs / "no" / "fit.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_report_is_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(runs), "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"report: {page}\n"
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_a_full_disk_is_one_line_wherever_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "workers.log")

    monkeypatch.setattr(_sweep, "status", full)
    assert main(["sweep", "status", str(tmp_path)]) == 2
    said = (
        "disco: error: cannot write workers.log: No space left on device; make room, then give the same command again\n"
    )
    assert capsys.readouterr().err == said
