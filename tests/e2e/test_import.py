"""Tables from elsewhere through the whole product: import, list, fit, plan, report."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from synthetic_series import write_series

from disco.cli import main

Capture = pytest.CaptureFixture[str]
MAPS = (
    "--map", "run=name", "step=_step", "batch=bs*128", "lr=2^log2_rate", "loss=bits*0.6931471805599453",
    "norm=2^`log2 norm`", "loss_start=8*0.6931471805599453", "model='mine'",
)  # fmt: skip


def disco(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def ok(capsys: Capture, *arguments: object) -> Any:
    code, printed, errors = disco(capsys, *arguments, "--json")
    assert code == 0, errors
    return json.loads(printed)


def test_a_series_from_elsewhere_is_imported_fitted_planned_and_reported(tmp_path: Path, capsys: Capture) -> None:
    table = write_series(tmp_path / "logs.csv")
    runs, one = tmp_path / "runs", tmp_path / "one.parquet"
    told = ok(capsys, "runs", "import", table, "--into", runs, *MAPS)
    assert (told["form"], told["runs"]) == ("series", 35)
    assert told["dropped"] == {"nothing was measured": 3}
    assert ok(capsys, "runs", "import", table, "--into", one, *MAPS)["runs"] == 35

    rows = ok(capsys, "runs", "ls", runs)["runs"]
    assert {row["model"] for row in rows} == {"mine"}
    assert {row["outcome"] for row in rows} == {"finished", "diverged"}
    shown = disco(capsys, "runs", "show", runs / rows[0]["run"])[1]
    assert re.search(r"parameters +–", shown)

    from_folder, from_file = tmp_path / "folder.json", tmp_path / "file.json"
    fit = ok(capsys, "fit", runs, "--bootstraps", "100", "-o", from_folder)
    ok(capsys, "fit", table, *MAPS, "--bootstraps", "100", "-o", tmp_path / "table.json")
    assert from_folder.read_text() == (tmp_path / "table.json").read_text()
    for source, to in ((table, from_file), (one, tmp_path / "one.json")):  # other ids, and so other resamples
        ok(capsys, "fit", source, *(MAPS if source == table else ()), "--bootstraps", "0", "-o", to)
    assert from_file.read_text() == (tmp_path / "one.json").read_text()
    law = next(
        rule["law"] for rule in fit["rules"] if (rule["name"], rule["recipe"]) == ("lr(batch, tokens)", "quadratic")
    )
    assert law["exponents"]["batch"] == pytest.approx(0.6, abs=0.03)
    assert law["exponents"]["tokens"] == pytest.approx(-0.5, abs=0.03)
    last = 2**23 // (8192 * 50) * 8192 * 50  # what all batches reach: evaluations are 50 steps apart
    tokens = [cell["tokens"] for cell in fit["cells"]]
    assert {count: tokens.count(count) for count in {*tokens} if count > 2**20} == {2**21: 5, 2**22: 5, last: 5}

    plan = ok(capsys, "plan", from_folder, "--tokens", "2^24", "--batch", "2^12")
    assert math.log2(plan["lr"]["value"]) == pytest.approx(-4 + 0.6 * 1 - 0.5 * 4, abs=0.3)
    for source in (runs, one):
        page = tmp_path / f"{source.stem}.html"
        assert disco(capsys, "report", source, "-o", page)[0] == 0
        assert "mine" in page.read_text()


def test_published_results_are_imported_and_fitted(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    runs = tmp_path / "step-law"
    told = ok(capsys, "runs", "import", shared / "steplaw_dense.csv", "--preset", "step-law", "--into", runs)
    assert (told["form"], told["runs"], told["rows"], told["dropped"]) == ("results", 1911, 1911, {})
    code, printed, _ = disco(
        capsys, "runs", "import", shared / "steplaw_dense.csv", "--preset", "step-law", "--into", runs
    )
    assert code == 0
    assert re.search(r"batch +tokens per step +13 +32768 +4\.1943e\+06", printed)
    assert printed.endswith(f"1911 runs from 1911 of 1911 rows (results): {runs}\n")
    fit = ok(capsys, "fit", runs, "--bootstraps", "0", "-o", tmp_path / "fit.json")
    assert len({(cell["model"], cell["tokens"]) for cell in fit["cells"]}) == 17
    assert sum(len(cell["points"]) for cell in fit["cells"]) == 1911


def test_dropped_rows_are_told(tmp_path: Path, capsys: Capture) -> None:
    rates = np.repeat([0.01, 0.02, 0.04, 0.08, 0.16], 2).tolist()
    frame = pl.DataFrame(
        {"lr": rates, "batch": 64, "tokens": [2**14, 2**15] * 5, "loss": [3.0 + abs(math.log2(r) + 5) for r in rates]}
    )
    frame = frame.with_columns(pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise("loss").alias("loss"))
    frame.write_csv(tmp_path / "t.csv")
    code, printed, errors = disco(capsys, "runs", "import", tmp_path / "t.csv", "--into", tmp_path / "runs")
    assert code == 0
    assert "disco: warning: t.csv: 1 of 10 rows dropped: loss is missing\n" in errors
    assert printed.endswith(f"5 runs from 9 of 10 rows (results): {tmp_path / 'runs'}\n")
    code, _, errors = disco(capsys, "fit", tmp_path / "t.csv", "-o", tmp_path / "fit.json")
    assert code == 0
    assert "1 of 10 rows dropped: loss is missing" in errors


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["runs", "import", "t.csv"], "into"),
        (["runs", "import", "--into", "x"], "name at least one table of runs"),
        (["runs", "import", "no.csv", "--into", "x"], "cannot read no.csv"),
        (["runs", "import", "t.csv", "--into", "x.csv.gz"], "a table is a .csv, .tsv, .parquet or .jsonl"),
        (["runs", "import", "t.csv", "--into", "t.csv/x"], "choose another place"),
        (
            ["runs", "import", "t.csv", "--into", "x", "--map", "lr=rate"],
            "--map lr=rate: no column 'rate'; there are: lr, ",
        ),
        (
            ["runs", "import", "t.csv", "--into", "x", "--preset", "step-law"],
            "preset step-law: no column 'bs' for batch",
        ),
        (["runs", "import", "t.csv", "--into", "x", "--form", "wide"], "--form must be results or series, got 'wide'"),
        (["runs", "import", "t.csv", "--into", "x", "--join", "no.csv"], "cannot read no.csv"),
        (["runs", "import", "t.csv", "--into", "x", "--join", "t.csv"], "no column 'run' in the tables to join on"),
        (["fit", "."], ". holds no runs"),
        (["fit", ".", "--map", "lr=lr"], "--map, --preset, --join, --on and --form are for tables, and . is none"),
        (["fit", "t.csv", "-o", "fit.json", "--map", "loss=lr-lr"], ""),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("lr,batch,tokens,loss\n0.1,64,4096,3\n")
    code, printed, errors = disco(capsys, *arguments)
    if not why:  # losses of 0 are suspicious, not impossible
        assert code == 0
        assert "unusual for nats per token" in errors
        return
    assert (code, printed) == (2, "")
    assert why in errors
    assert errors.startswith("disco: error: ")
    assert errors.count("\n") == 1
