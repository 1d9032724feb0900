"""The published tables (shared/data, see its README) by the command line, and other tables of these forms."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disco.cli import main

Capture = pytest.CaptureFixture[str]

PAPER = ("--map", "lr=2^log2_lr_opt", "batch=2^log2_bs", "tokens=2^log2_h")
SCANS = (
    "--map",
    "norm=2^log2_norm",
    "sigma=loss_std",
    "--scan",
    "loss ~ norm",
    "--recipe",
    "paper",
    "--anchor",
    "11.765",
)
NEAR = (
    "--map",
    "loss=smooth loss",
    "--within",
    "0.25%",
    "--by",
    "N,D",
    "--power-law",
    "lr ~ N + D",
    "--power-law",
    "bs ~ D",
)
BOWLS = (
    "--preset", "step-law", "--within", "2%", "--by", "parameters,tokens", "--quadratic", "loss ~ lr + batch",
    "--power-law", "lr ~ parameters + tokens", "--power-law", "batch ~ tokens",
)  # fmt: skip


def fitted(capsys: Capture, *arguments: object) -> Any:
    assert main(["fit", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def permuted(source: Path, to: Path, column: str) -> Path:
    """The table with one column's values in another order."""
    with source.open() as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))
    values = [rows[index][column] for index in order]
    with to.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {column: value} for row, value in zip(rows, values, strict=True))
    return to


def test_the_papers_28_optima(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    table = shared / "paper_eta_opt.csv"
    (law,) = fitted(capsys, table, *PAPER, "--power-law", "lr ~ batch + tokens")["laws"]
    assert law["n"] == 28
    assert law["exponents"] == pytest.approx({"batch": 0.619, "tokens": -0.558}, abs=5e-4)
    assert law["standard_errors"] == pytest.approx({"batch": 0.051, "tokens": 0.045}, abs=5e-4)
    assert (law["intercept"], law["intercept_error"]) == pytest.approx((9.75, 1.60), abs=5e-3)
    assert law["r2"] == pytest.approx(0.923, abs=5e-4)
    # In tokens only the intercept is another: by 12 octaves times the exponent.
    mapped = ("--map", "lr=2^log2_lr_opt", "batch=4096*2^log2_bs", "tokens=2^log2_h")
    (again,) = fitted(capsys, table, *mapped, "--power-law", "lr ~ batch + tokens")["laws"]
    assert again["intercept"] == pytest.approx(law["intercept"] - 12 * law["exponents"]["batch"])
    other = permuted(table, tmp_path / "other.csv", "log2_bs")
    (law,) = fitted(capsys, other, *PAPER, "--power-law", "lr ~ batch + tokens")["laws"]
    assert law["r2"] < 0.8
    (law,) = fitted(capsys, table, *PAPER, "--power-law", "lr ~ batch + tokens", "--interactions")["laws"]
    assert law["exponents"]["batch:tokens"] == pytest.approx(0.0509, abs=5e-4)


def test_the_papers_norm_scans(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    table = shared / "norm_scans_sample.csv"
    printed = [(7.65, 4.58), (7.26, 4.41), (6.92, 4.40), (6.73, 4.51), (6.18, 4.70), (5.88, 5.05), (5.45, 5.39)]
    by = ("--by", "log2_horizon,bs")
    optima = fitted(capsys, table, *SCANS, *by)["optima"]
    assert [(item["log2_horizon"], item["bs"]) for item in optima] == [*((31, 2**k) for k in range(5, 12)), (33, 32)]
    found = [(item["fit"]["x"], item["fit"]["y"]) for item in optima]
    assert found[:6] == [pytest.approx(pair, abs=5e-3) for pair in printed[:6]]
    assert found[6] == pytest.approx((5.41, 5.39), abs=5e-3)  # points of this panel are cut off in the figure
    assert found[7] == pytest.approx((7.87, 4.59), abs=5e-3)
    assert all(item["usable"] and item["fit"]["n"] <= 7 for item in optima)
    panels = fitted(capsys, table, *SCANS, "--by", "panel")["optima"]
    assert sorted(item["fit"]["x"] for item in panels) == pytest.approx(sorted(x for x, _ in found))
    other = permuted(table, tmp_path / "other.csv", "loss")
    assert fitted(capsys, other, *SCANS, *by)["optima"][0]["fit"]["x"] != pytest.approx(found[0][0], abs=0.05)
    # Optima by horizon to a power law: of these norms at 2^31 tokens over the batch.
    (law,) = fitted(capsys, table, *SCANS, *by, "--power-law", "norm ~ bs")["laws"]
    direct = np.polyfit([item["bs"].bit_length() - 1 for item in optima], [x for x, _ in found], 1)
    assert law["exponents"]["bs"] == pytest.approx(direct[0])


def test_step_law_near_the_minimum(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    result = fitted(capsys, shared / "steplaw_dense.csv", *NEAR)
    assert (result["rows"], result["selected"]) == (1911, 129)
    rate, batch = result["laws"]
    assert rate["exponents"] == pytest.approx({"N": -0.766, "D": 0.197}, abs=5e-4)
    assert batch["exponents"] == pytest.approx({"D": 0.613}, abs=5e-4)
    preset = ("--preset", "step-law", "--within", "0.0025", "--by", "parameters,tokens")
    (law,) = fitted(capsys, shared / "steplaw_dense.csv", *preset, "--power-law", "lr ~ parameters + tokens")["laws"]
    assert list(law["exponents"].values()) == pytest.approx([-0.766, 0.197], abs=5e-4)
    other = permuted(shared / "steplaw_dense.csv", tmp_path / "other.csv", "lr")
    assert fitted(capsys, other, *NEAR)["laws"][0]["exponents"]["N"] != pytest.approx(-0.766, abs=0.05)


def test_step_law_by_bowls(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    result = fitted(capsys, shared / "steplaw_dense.csv", *BOWLS)
    assert len(result["optima"]) == 17
    assert all(item["usable"] for item in result["optima"])
    rate, batch = result["laws"]
    assert rate["exponents"] == pytest.approx({"parameters": -0.695, "tokens": 0.208}, abs=5e-4)
    assert rate["standard_errors"] == pytest.approx({"parameters": 0.037, "tokens": 0.021}, abs=5e-4)
    assert batch["exponents"] == pytest.approx({"tokens": 0.569}, abs=5e-4)
    assert batch["standard_errors"] == pytest.approx({"tokens": 0.033}, abs=5e-4)
    assert rate["n"] == batch["n"] == 17
    assert fitted(capsys, shared / "steplaw_dense.csv", *BOWLS[:-4])["laws"] == []


def test_optima_at_edges_are_told_and_left_out_of_laws(tmp_path: Path, capsys: Capture) -> None:
    """1-D scans whose minimum moves out of the grid; all sigmas are zero."""
    grid = [(power, rate) for power in range(20, 26) for rate in range(-8, -2)]
    lines = ["tokens,lr,loss,sigma"]
    lines += [f"{2**k},{2.0**rate},{2 + 0.05 * (rate + 0.5 * k - 6.2) ** 2},0" for k, rate in grid]
    lines.append(f"{2**26},,1.0,0")
    lines += [f"{2**27},{2.0**rate},2.0,0" for rate in range(-8, -2)]
    (tmp_path / "scan.csv").write_text("\n".join(lines))
    command = (tmp_path / "scan.csv", "--scan", "loss ~ lr", "--by", "tokens", "--power-law", "lr ~ tokens")
    result = fitted(capsys, *command)
    why = {item["tokens"].bit_length() - 1: item["why"] for item in result["optima"]}
    assert why == {
        20: "", 21: "", 22: "", 23: "", 24: "", 25: "", 26: "few-points, no-minimum", 27: "edge-low, flat, no-minimum"
    }  # fmt: skip
    (law,) = result["laws"]
    assert law["n"] == 6
    assert law["exponents"]["tokens"] == pytest.approx(-0.5)
    assert "2 of 8 optima are none to fit a law to and left out" in result["warnings"]


def test_edges_of_a_scan(tmp_path: Path, capsys: Capture) -> None:
    lines = ["panel,norm,loss,loss_std"]
    for panel, best in (("low", -1.0), ("inside", 3.3), ("high", 9.0)):
        lines += [f"{panel},{2.0**x},{2 + 0.1 * (x - best) ** 2},0.0" for x in range(8)]
    (tmp_path / "scan.csv").write_text("\n".join(lines))
    command = (tmp_path / "scan.csv", "--scan", "loss ~ norm", "--by", "panel", "--map", "sigma=loss_std")
    found = {item["panel"]: (item["why"], item["fit"]["x"]) for item in fitted(capsys, *command)["optima"]}
    assert found == {"high": ("edge-high", None), "inside": ("", pytest.approx(3.3)), "low": ("edge-low", None)}


def test_rows_without_a_group_belong_to_none(tmp_path: Path, capsys: Capture) -> None:
    lines = [
        "N,lr,D,loss",
        *(f"{n},{2.0**x},{2.0 ** (20 + x)},{2 + x * x / 100}" for n in (1, 2) for x in range(-3, 4)),
    ]
    lines += [",1,5,0.1", "NaN,1,5,0.1", "1,1,5,", "2,1,5,x"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    result = fitted(capsys, tmp_path / "t.csv", "--within", "0.6%", "--by", "N", "--power-law", "lr ~ D")
    assert (result["rows"], result["selected"], result["laws"][0]["n"]) == (18, 6, 6)
    assert result["warnings"] == [
        "2 of 18 rows dropped: N is missing", "2 of 16 rows dropped: loss is missing or not finite"
    ]  # fmt: skip
    result = fitted(capsys, tmp_path / "t.csv", "--scan", "loss ~ lr", "--by", "N")
    assert [(item["N"], item["fit"]["x"]) for item in result["optima"]] == [
        (1, pytest.approx(0)),
        (2, pytest.approx(0)),
    ]


def test_the_readable_form(shared: Path, capsys: Capture) -> None:
    assert main(["fit", str(shared / "paper_eta_opt.csv"), *PAPER, "--power-law", "lr ~ batch + tokens"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("lr ~ batch + tokens: n = 28, R2 = 0.923, scatter 0.537 octaves\n")
    for text in ("9.75(1.60)", "0.619(51)", "-0.558(45)"):
        assert text in printed
    assert main(["fit", str(shared / "norm_scans_sample.csv"), *SCANS, "--by", "panel"]) == 0
    printed = capsys.readouterr().out
    assert "norm*" in printed
    assert "2^7.65" in printed
    assert main(["fit", str(shared / "steplaw_dense.csv"), *BOWLS]) == 0
    printed = capsys.readouterr().out
    assert "947 of 1911 rows are within 2% of their group's least loss" in printed
    assert "-0.695(37)" in printed


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--power-law", "lr"], "'lr' is not a formula 'Y ~ X1 + X2' of columns; arithmetic goes into --map"),
        (["--power-law", "lr ~ "], "is not a formula"),
        (["--power-law", "log2_lr ~ log2_h"], "no column 'log2_lr'; nearest: log2_lr_opt"),
        (["--power-law", "log2_bs ~ log2_h + log2_h"], "names a column twice"),
        (["--map", "x='a'", "--power-law", "x ~ log2_h"], "column 'x' must be numbers, got 'a'"),
        (["--scan", "lr_std ~ log2_h + log2_bs"], "is not a formula 'Y ~ X1' of columns"),
        (["--quadratic", "lr_std ~ log2_h"], "is not a formula 'Y ~ X1 + X2' of columns"),
        (["--scan", "lr_std ~ log2_bs", "--by", "h"], "--by: no column 'h'; nearest: log2_h"),
        (["--scan", "lr_std ~ log2_bs", "--within", "1%"], "--scan goes with neither --quadratic nor --within"),
        (["--scan", "lr_std ~ log2_bs", "--recipe", "best"], "recipe must be 'paper' or 'quadratic', got 'best'"),
        (["--scan", "lr_std ~ log2_bs", "--recipe", "paper"], "recipe 'paper' needs anchor"),
        (["--within", "1%", "--by", "log2_h"], "--of: no column 'loss'"),
        (
            ["--within", "much", "--of", "lr_std"],
            "--within must be a positive fraction such as 0.25% or 0.0025, got 'much'",
        ),
        (["--power-law", "lr_std ~ log2_h", "--of", "lr_std"], "--of names the loss of --within, which is not given"),
        (["--by", "log2_h"], "--by belongs to --scan, --quadratic, --power-law or --within"),
        (["--preset", "paper", "--power-law", "lr_std ~ log2_h"], "no preset 'paper'"),
        (["--map", "lr=2^log2_lr", "--power-law", "lr ~ log2_h"], "no column 'log2_lr'; nearest: log2_lr_opt"),
        ([], "nothing gives lr, in peak learning rate"),
    ],
)
def test_bad_input_is_one_line_and_code_2(shared: Path, capsys: Capture, arguments: list[str], why: str) -> None:
    assert main(["fit", str(shared / "paper_eta_opt.csv"), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("disco: error: ")
    assert why in printed.err
    assert printed.err.count("\n") == 1


def test_the_commands_of_the_docs(shared: Path, capsys: Capture) -> None:
    """Each command on published tables prints the numbers that the line above it promises."""
    text = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    examples = re.findall(r"\n([^\n]+):\n\n    disco (fit \$DATA/[^\n]+)", text)
    assert len(examples) == 4
    for promise, command in examples:
        assert main([part.replace("$DATA", str(shared)) for part in shlex.split(command)]) == 0
        printed = capsys.readouterr().out
        numbers = re.findall(r"-?\d+\.\d+\([\d.]+\)|2\^\d\.\d+|(?<=\^)-?0\.\d+", promise)
        assert numbers
        assert [number for number in numbers if number not in printed] == []
