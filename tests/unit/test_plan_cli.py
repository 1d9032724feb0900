"""``disco plan`` at the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import config, write
from synthetic import columns

from disco.cli import main
from disco.fit import StudyFit, fit_table
from disco.guide import Plan, plan

RATES = np.arange(-9.0, 2.0)
SWEEP = {"optimizer.name": "scion", "optimizer.momentum": 0.0, "schedule.decay": 0.0, "schedule.shape": "constant"}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def fitted() -> StudyFit:
    return fit_table(columns(RATES, noise=0.004, rng=np.random.default_rng(3)), bootstraps=200)


@pytest.fixture
def file(fitted: StudyFit, tmp_path: Path) -> Path:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(fitted.to_dict() | {"settings": {"scion": SWEEP}}))
    return path


def shown(capture: Capture, *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capture.readouterr().out)
    return found


def test_the_document_is_the_plan(fitted: StudyFit, file: Path, capsys: Capture) -> None:
    found = shown(capsys, file, "--tokens", "2^22")
    assert found == json.loads(json.dumps(plan(fitted, 2**22).to_dict()))
    assert found["trust"] == "ok"
    assert Plan.from_dict(found).to_dict() == found


def test_the_text_fits_a_terminal_and_says_it_all(file: Path, capsys: Capture) -> None:
    assert main(["plan", str(file), "--tokens", "2^23", "--max-batch", "2000", "--momentum", "0.9"]) == 0
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines())) <= 100
    assert printed.out.startswith("8.39M tokens (2^23) with d32-L2 scion\ntrust: caution\n")
    for part in (
        "capped", "the largest allowed; best: 2^1", "Cost of being wrong: ", "The cap on the batch costs ",
        "Largest batch that costs at most ", "Rests on 20 cells", "extrapolated 2.0 doublings",
        "step-law: 1.79 N^-0.713 D^0.307", "two-stage", "joint", "one-stage", "paper's recipe",
        "Output norm along the way", "Runs that would narrow this most per token",
    ):  # fmt: skip
        assert part in printed.out
    assert "momentum is 0.9, in the sweep 0" in printed.err


def test_what_is_not_to_be_trusted_is_said_first(file: Path, capsys: Capture) -> None:
    assert main(["plan", str(file), "--tokens", "2^40"]) == 0
    assert "\nDO NOT TRUST THIS: " in capsys.readouterr().out
    assert shown(capsys, file, "--tokens", "2^40")["trust"] == "do not trust"


def test_settings_of_the_run_come_from_options_and_files(file: Path, tmp_path: Path, capsys: Capture) -> None:
    def unlike(*options: object) -> dict[str, str]:
        return {each["setting"]: each["run"] for each in shown(capsys, file, "--tokens", "2^22", *options)["unlike"]}

    assert unlike("--schedule", "constant", "--optimizer", "scion", "--momentum", "0") == {}
    assert unlike("--schedule", "0.25", "--weight-decay", "0.1") == {
        "schedule.decay": "0.25",
        "optimizer.weight_decay": "0.1",
    }
    assert unlike("--schedule", "cosine") == {"schedule.shape": "cosine"}
    like = tmp_path / "big.toml"
    like.write_text("batch = 1048576\n[model]\nwidth = 64\n[optimizer]\nmomentum = 0.95\n[schedule]\ndecay = 0.2\n")
    assert unlike("--like", like) == {"optimizer.momentum": "0.95", "schedule.decay": "0.2"}
    assert unlike("--like", like, "--momentum", "0", "--schedule", "constant") == {}
    assert shown(capsys, file, "--tokens", "2^22", "--like", like)["width"] == 64
    record = write(tmp_path / "runs", config(optimizer={"momentum": 0.5}), [])
    assert unlike("--like", record)["optimizer.momentum"] == "0.5"


def test_a_fit_without_settings_says_so(fitted: StudyFit, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(fitted.to_dict()))
    assert main(["plan", str(path), "--tokens", "2^22", "--momentum", "0.9"]) == 0
    assert "does not tell the sweep's settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "best"], "stage must be one of two-stage, joint, one-stage, got 'best'"),
        (["--like", "nowhere.toml"], "--like: cannot read nowhere.toml: No such file"),
        (["--batch", "4096", "--max-batch", "2^10"], "larger than the largest allowed, 1024"),
        (["--width", "wide"], "--width must be a number such as"),
        (["--schedule", "0.2.1"], "--schedule must be a number such as"),
        (["--tolerance", "0"], "tolerance must be a positive number, got 0.0"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, file: Path, capsys: Capture) -> None:
    assert main(["plan", str(file), "--tokens", "2^22", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("disco: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_not_a_configuration(file: Path, tmp_path: Path, capsys: Capture) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("this is [not toml")
    assert main(["plan", str(file), "--tokens", "2^22", "--like", str(bad)]) == 2
    assert "is neither a configuration nor the record of a run" in capsys.readouterr().err
