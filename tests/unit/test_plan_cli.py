"""``disco plan`` at the command line."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import config, write
from synthetic import columns

from disco.cli import main
from disco.fit import StudyFit, fit_table
from disco.guide import Plan, plan
from disco.runs.units import UNKNOWN, power

RATES = np.arange(-9.0, 2.0)
SWEEP = {
    "optimizer.name": "scion", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0, "schedule.decay": 0.0,
    "schedule.shape": "constant",
}  # fmt: skip
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
    assert found == json.loads(json.dumps(plan(fitted, 2**22, sweep={"scion": SWEEP}).to_dict()))
    assert found["trust"] == "ok"
    assert Plan.from_dict(found).to_dict() == found


def test_growth_is_fitted_only_where_it_is_kept(
    file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr("disco.cli._plan.read_courses", lambda path: read.append(path) or [])
    assert main(["plan", str(file), "--tokens", "2^22"]) == 0
    assert not read
    assert main(["plan", str(file), "--tokens", "2^22", "-o", str(tmp_path / "plan.json")]) == 0
    capsys.readouterr()
    shown(capsys, file, "--tokens", "2^22")
    assert read == [file, file]


def test_the_text_fits_a_terminal_and_says_it_all(file: Path, capsys: Capture) -> None:
    assert main(["plan", str(file), "--tokens", "2^23", "--max-batch", "2000", "--momentum", "0.9"]) == 0
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines())) <= 100
    assert printed.out.startswith(
        "2^23 tokens (8,388,608) with d32-L2 scion\ntrust: caution: extrapolated 2.0 doublings of tokens from a"
    )
    for part in (
        "90%: 2^10.97 .. 2^10.97   capped", "the largest allowed; best without the cap: 2^1", "Cost of being wrong: ",
        "The cap on the batch costs ",
        "Largest batch that costs at most ", "Rests on 20 cells", "extrapolated 2.0 doublings",
        "step-law: 1.79 N^-0.713 D^0.307", "two-stage", "joint", "one-stage", "paper's recipe",
        "Output norm along the way", "Runs that would narrow this most per token",
    ):  # fmt: skip
        assert part in printed.out
    found = shown(capsys, file, "--tokens", "2^23", "--max-batch", "2000")
    number = r"([\d.]+)"
    form = rf"The cap on the batch costs {number} nats against the best one \(90%: {number} to {number} nats"
    (said,) = re.findall(form, printed.out)
    cost = found["cost"]
    assert list(map(float, said)) == pytest.approx([cost["of_batch"], *cost["of_batch_interval"]], rel=0.05)
    now, first = (line.split() for line in printed.out.partition("Runs that would")[2].splitlines()[3:5])
    assert now == ["now", f"±{found['lr_half']:.2f}", f"±{found['batch_half']:.2f}"]
    assert float(first[-3][1:]) <= found["lr_half"]
    assert "momentum is 0.9, in the sweep 0" in printed.err


def test_one_batch_shows_what_is_known_and_says_why_the_rest_is_not(tmp_path: Path, capsys: Capture) -> None:
    fit = fit_table(columns(RATES, batches=(2048,), noise=0.004, rng=np.random.default_rng(3)), bootstraps=200)
    (tmp_path / "fit.json").write_text(json.dumps(fit.to_dict()))
    assert main(["plan", str(tmp_path / "fit.json"), "--tokens", "2^22"]) == 0
    printed = capsys.readouterr().out
    assert UNKNOWN not in printed
    ways = printed.partition("Other ways to answer")[2]
    assert ways.splitlines()[3].split()[:2] == ["two-stage", power(plan(fit, 2**22).lr.value)]
    assert "No answer by joint: " in printed
    assert "No answer by optimal-norm, power-lines, bjorck: it gives exponents only" in printed
    advice = printed.partition("Runs that would narrow")[2]
    assert "saves" not in advice.splitlines()[1]
    assert "batch 90%" not in advice
    assert "There is no interval of the best batch yet, so what these runs do to it is not known" in advice


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1B", 10**9), ("10B", 10**10), ("3.5M", 3_500_000), ("2^30", 2**30), ("1e9", 10**9), ("1_000_000", 10**6)],
)
def test_counts_of_tokens_in_every_form(text: str, tokens: int, file: Path, capsys: Capture) -> None:
    assert shown(capsys, file, "--tokens", text)["tokens"] == tokens
    capped = shown(capsys, file, "--tokens", "2^30", "--batch", "20k", "--max-batch", text, "--context", "1k")
    assert capped["batch"]["value"] == 20_000


def test_a_table_without_momentum_is_not_one_with_none(tmp_path: Path, capsys: Capture) -> None:
    table = columns(RATES)
    names = ("batch", "lr", "tokens", "loss", "sigma")
    lines = [",".join(map(str, row)) for row in zip(*(table[name] for name in names), strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join((",".join(names), *lines)))
    output = tmp_path / "fit.json"
    assert main(["fit", str(tmp_path / "runs.csv"), "--bootstraps", "0", "-o", str(output)]) == 0
    capsys.readouterr()
    assert main(["plan", str(output), "--tokens", "2^22", "--momentum", "0.9", "--schedule", "constant"]) == 0
    printed = capsys.readouterr()
    said = "the sweep's decay of the learning rate (fraction) and momentum are not recorded"
    assert f"trust: caution: {said}" in printed.out
    assert "in the sweep" not in printed.out + printed.err


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
