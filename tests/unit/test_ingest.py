"""Tables of anybody's runs: read, checked, brought into units, and fitted like records."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import columns as synthetic_columns

from disco.errors import UserError
from disco.fit import fit_table
from disco.runs.convert import to_runs, write_runs, write_table
from disco.runs.ingest import Ingested, ingest, snap
from disco.runs.reader import read_runs
from disco.runs.schema import Outcome
from disco.runs.sources import is_table, read_table, read_tables
from disco.runs.table import cells, columns

GOOD = {"lr": 0.1, "batch": 64, "tokens": 4096, "loss": 3.0}


def table(*rows: dict[str, object]) -> pl.DataFrame:
    return pl.DataFrame([GOOD | row for row in rows], infer_schema_length=None)


def study() -> pl.DataFrame:
    """A known truth under names and units of somebody else."""
    truth = synthetic_columns(np.arange(-8.0, 1.0))
    return pl.DataFrame(
        {
            "name": truth["run"],
            "log2_rate": np.log2(truth["lr"]),
            "bs": truth["batch"] // 128,
            "Mtok": truth["tokens"] / 1e6,
            "bits": truth["loss"] / math.log(2),
            "spread": truth["sigma"],
            "log2 norm": np.log2(truth["norm/output/rms_to_inf"]),
            "start": truth["loss_start"],
        }
    )


MAPS = [
    "run=name", "lr=2^log2_rate", "batch=bs*128", "tokens=Mtok*1e6", "loss=bits*0.6931471805599453", "sigma=spread",
    "norm=2^`log2 norm`", "loss_start=start", "model='d32-L2'", "family='scion'",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl", "csv.gz"])
def test_a_mapped_table_of_any_format_fits_like_the_truth(tmp_path: Path, suffix: str) -> None:
    path, frame = tmp_path / f"study.{suffix}", study()
    if suffix == "parquet":
        frame.write_parquet(path)
    elif suffix == "jsonl":
        frame.write_ndjson(path)
    elif suffix == "csv.gz":
        import gzip

        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    else:
        frame.write_csv(path, separator="\t" if suffix == "tsv" else ",")
    assert is_table(path)
    ingested = ingest(read_tables([path]), MAPS)
    assert (ingested.form, ingested.rows, ingested.dropped) == ("results", len(frame), {})
    runs = to_runs(ingested)
    assert len(runs) == 45  # 5 batches x 9 rates; four horizons each
    found, truth = fit_table(columns(runs)), fit_table(synthetic_columns(np.arange(-8.0, 1.0)))
    assert [cell.lr.x for cell in found.cells] == pytest.approx([cell.lr.x for cell in truth.cells], abs=1e-9)
    assert [cell.paper.x for cell in found.cells] == pytest.approx([cell.paper.x for cell in truth.cells], abs=1e-9)  # type: ignore[union-attr]
    law = found.rule("scion", "d32-L2", "lr(batch, tokens)").law
    assert law is not None
    assert law.exponents == pytest.approx({"batch": 0.6, "tokens": -0.5}, abs=0.02)


def test_records_written_from_a_table_are_the_table(tmp_path: Path) -> None:
    ingested = ingest(study(), MAPS, source="study.csv")
    runs = to_runs(ingested)
    for _ in range(2):  # importing again changes nothing
        write_runs(runs, tmp_path / "runs")
        read = read_runs(tmp_path / "runs")
        assert (read.problems, len(read.runs)) == ((), 45)
        assert cells(sorted(read.runs, key=lambda run: run.id)).equals(cells(sorted(runs, key=lambda run: run.id)))
    for name in ("table.csv", "table.parquet", "table.jsonl", "table.tsv"):
        write_table(ingested, tmp_path / name)
        again = to_runs(ingest(read_tables([tmp_path / name]), source="study.csv"))
        assert [run.id for run in again] == [run.id for run in runs]
        assert cells(again).equals(cells(runs))


def test_every_dropped_row_has_a_reason() -> None:
    rows = [
        {}, {"lr": None}, {"lr": -0.1}, {"lr": 0.0}, {"lr": math.inf}, {"lr": math.nan}, {"batch": 0}, {"batch": None},
        {"tokens": None}, {"tokens": 0}, {"loss": None}, {}, {"loss": math.nan, "lr": 0.2}, {"batch": 0.5},
    ]  # fmt: skip
    ingested = ingest(table(*rows))
    assert ingested.dropped == {
        "lr is not positive": 2, "lr is too large": 1, "lr is missing": 2, "batch is not positive": 2,
        "batch is missing": 1, "tokens is missing": 1, "tokens is not positive": 1, "loss is missing": 1,
        "repeats another row": 1,
    }  # fmt: skip
    assert len(ingested.table) + sum(ingested.dropped.values()) == len(rows) == ingested.rows
    assert ingested.notes == ("1 rows with a loss that is not finite: taken as diverged",)
    runs = to_runs(ingested)
    assert {run.config["optimizer"]["lr"]: run.outcome for run in runs} == {0.1: "finished", 0.2: "diverged"}
    assert dict(cells(runs).select("lr", "diverged").iter_rows()) == {0.1: False, 0.2: True}


@pytest.mark.parametrize(
    ("frame", "maps", "why"),
    [
        (
            pl.DataFrame({"lr": [0.1], "bs": [1], "D": [1.0], "loss": [1.0]}),
            [],
            "t.csv: nothing gives batch, in tokens ",
        ),
        (
            pl.DataFrame({"lr": [0.1], "batch": [1], "loss": [1.0], "tokns": [1]}),
            [],
            "tokens (or step), in tokens trained",
        ),
        (pl.DataFrame({"lr": [0.1], "batch": [1], "loss": [1.0], "tokns": [1]}), [], "nearest: tokns"),
        (table({}), ["lrr=lr"], "--map lrr=...: a run has no lrr; nearest: lr"),
        (table({}), ["lr=los"], "--map lr=los: no column 'los'; nearest: loss"),
        (table({}), ["loss='x'"], "loss must be numbers (nats per token), got 'x'"),
        (table({"loss": None}), [], "none of 1 rows can be used (1: loss is missing)"),
        (table({"diverged": "maybe"}), [], "diverged must be true or false, got 'maybe'"),
        (table({"step": 1}, {"step": 1}), [], "several rows have the same settings and step; name the runs"),
    ],
)
def test_a_table_that_cannot_be_used(frame: pl.DataFrame, maps: list[str], why: str) -> None:
    with pytest.raises(UserError) as caught:
        ingest(frame, maps, source="t.csv")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_units_are_suspected() -> None:
    in_sequences = table({"tokens": 10**11, "batch": 736})
    assert "is batch in tokens, not in sequences?" in ingest(in_sequences).notes[0]
    steps = [{"step": step, "tokens": step * 64 * 2048} for step in (100, 200, 300)]
    assert "--map batch=...*2048" in ingest(table(*steps)).notes[0]
    assert "bits become nats" in ingest(table({"loss": 1500.0}, {"loss": 1400.0, "lr": 0.2})).notes[0]
    assert ingest(table({})).notes == ()


def test_a_column_that_only_shares_its_name_is_left_out() -> None:
    ingested = ingest(table({"norm": "rms_to_inf/out", "seed": "a"}))
    assert ingested.notes == (
        "column norm is left out: it holds text, and a run's norm is a number",
        "column seed is left out: it holds text, and a run's seed is a number",
    )
    assert set(ingested.table.columns) == {*GOOD, "diverged", "_run"}
    with pytest.raises(UserError, match=r"norm/output/rms_to_inf must be numbers \(a norm\), got 'rms"):
        ingest(table({"which": "rms_to_inf/out"}), ["norm=which"])


def test_rows_with_equal_settings_are_seeds_unless_seeds_are_given() -> None:
    ingested = ingest(table({}, {"loss": 3.1}, {"loss": 3.2}))
    assert sorted(run.config["seed"] for run in to_runs(ingested)) == [0, 1, 2]
    assert ingested.notes == ("rows with equal settings are taken as seeds, numbered in their order",)
    ingested = ingest(table({"seed": 7}, {"loss": 3.1, "seed": 7}, {"loss": 3.2, "seed": 8}))
    assert sorted(run.config["seed"] for run in to_runs(ingested)) == [7, 8]
    assert ingested.dropped == {"another loss for the run and horizon of an earlier row": 1}


def test_settings_out_of_their_range_are_no_settings() -> None:
    rows = [{"momentum": 0.9, "seed": 1}, {"momentum": 2.0, "seed": 1}, {"momentum": None, "seed": 1.0}, {"seed": -1}]
    ingested = ingest(table(*(row | {"lr": 0.1 * (index + 1)} for index, row in enumerate(rows))))
    assert ingested.dropped == {"momentum is not between 0 and 1": 1, "seed is not 0 or more": 1}
    assert {run.config["optimizer"].get("momentum") for run in to_runs(ingested)} == {None, 0.9}
    strange = table({"batch": 1e19}, {"tokens": math.inf}, {"lr": math.inf}, {"batch": 0.2}, {})
    assert ingest(strange).dropped == {
        "batch is too large": 1, "tokens is too large": 1, "lr is too large": 1, "batch is not positive": 1
    }  # fmt: skip
    with pytest.raises(UserError, match="the columns norm and norm/output/rms_to_inf are one"):
        ingest(table({"norm": 1.0, "norm/output/rms_to_inf": 1.0}))


def test_decayed_rows_are_runs_of_their_own() -> None:
    rows = [{"tokens": 2**k, "loss": 3.0 - 0.1 * k} for k in (12, 13)]
    assert len(to_runs(ingest(table(*rows)))) == 1
    assert len(to_runs(ingest(table(*(row | {"decay": 0.2} for row in rows))))) == 2


def series(every: int, last: int, run: str = "a", lr: float = 0.1, **more: object) -> list[dict[str, object]]:
    """loss = 8 - 0.25 log2 tokens, log2 norm = 0.5 log2 tokens, at batch 64."""
    steps = range(every, last + 1, every)
    return [
        {
            "run": run, "step": step, "batch": 64, "lr": lr, "loss": 8 - 0.25 * math.log2(step * 64),
            "norm": (step * 64) ** 0.5, **more,
        }
        for step in steps
    ]  # fmt: skip


def test_horizons_are_cut_from_a_series_evaluated_at_any_steps() -> None:
    sparse = cells(to_runs(ingest(pl.DataFrame(series(100, 1600)))))
    dense = cells(to_runs(ingest(pl.DataFrame(series(1, 1600)))))
    assert sparse["tokens"].to_list() == [2**15, 2**16, 102400]  # 2^14 is half way in a gap from 200 to 300 steps
    assert dense["tokens"].to_list() == [2**k for k in range(6, 17)] + [102400]
    at = dict(zip(sparse["tokens"], sparse["loss"], strict=True))
    middle = {tokens: 8 - 0.25 * math.log2(tokens * (1 - 1 / 64)) for tokens in at}
    assert at[2**16] == pytest.approx(middle[2**16], abs=1e-9)
    assert at[102400] == pytest.approx(8 - 0.25 * math.log2(102400))  # the evaluation itself
    assert sparse["points"].to_list() == [1] * 3
    assert sparse["sigma"].to_list() == [None] * 3
    late = dense.filter(pl.col("tokens") >= 2**13)
    expected = [8 - 0.25 * math.log2(tokens * (1 - 1 / 64)) for tokens in late["tokens"]]
    assert late["loss"].to_list() == pytest.approx(expected, abs=2e-4)  # the mean of the window is at its middle
    assert dense.filter(pl.col("tokens") == 2**16)["points"].item() == 33  # steps 992 to 1024
    norm = sparse.filter(pl.col("tokens") == 2**16)["norm/output/rms_to_inf"].item()
    assert math.log2(norm) == pytest.approx(8 + 0.5 * math.log2(1 - 1 / 64), abs=1e-9)
    assert sparse.filter(pl.col("tokens") == 2**16)["path"].item() == pytest.approx(102.4)


def test_a_gap_around_a_horizon_leaves_it_out() -> None:
    rows = [row for row in series(100, 1600) if row["step"] not in (900, 1000, 1100, 1200)]
    assert cells(to_runs(ingest(pl.DataFrame(rows))))["tokens"].to_list() == [2**15, 102400]


def test_a_decaying_rate_gives_one_horizon_only() -> None:
    rows = series(10, 1600)
    for row in rows:
        row["lr"] = 0.1 * min(1.0, (1600 - row["step"]) / 320)  # type: ignore[operator]
    rows[-1]["lr"] = 1e-6  # a rate of 0 is none
    runs = to_runs(ingest(pl.DataFrame(rows)))
    assert len(runs) == 1
    assert (runs[0].config["optimizer"]["lr"], runs[0].config["schedule"]) == (0.1, {"decay": 0.2})
    assert cells(runs)["tokens"].to_list() == [102400]
    constant = to_runs(ingest(pl.DataFrame(series(10, 1600, decay=0.2))))
    assert cells(constant)["tokens"].to_list() == [102400]


def test_a_run_that_diverges_bounds_the_grid_of_its_batch() -> None:
    bad = [
        *series(10, 300, "b", 0.8),
        {"run": "b", "step": 310, "batch": 64, "lr": 0.8, "loss": math.nan, "norm": None},
        {"run": "b", "step": 320, "batch": 64, "lr": 0.8, "loss": 9.0, "norm": None},
    ]
    runs = to_runs(ingest(pl.DataFrame(series(10, 1600) + bad, infer_schema_length=None)))
    found = cells(runs).filter(pl.col("lr") == 0.8)
    assert {run.config["optimizer"]["lr"]: run.outcome for run in runs} == {0.1: "finished", 0.8: "diverged"}
    assert found.filter("diverged")["tokens"].to_list() == [2**15, 2**16, 102400]
    assert found.filter(~pl.col("diverged"))["tokens"].max() == 2**14  # step 256
    at_once = [{"run": "c", "step": 0, "batch": 64, "lr": 9.0, "loss": math.nan, "norm": None}]
    runs = to_runs(ingest(pl.DataFrame(series(10, 1600) + at_once, infer_schema_length=None)))
    lost = cells(runs).filter(pl.col("lr") == 9.0)
    assert lost["diverged"].all()
    assert lost["tokens"].to_list() == [2**k for k in range(6, 17)] + [102400]


def test_a_batch_ramp_and_repeated_steps() -> None:
    ramp = series(10, 100, "ramp")
    for row in ramp[5:]:
        row["batch"] = 128
    twice = series(10, 200) + [{**row, "loss": 1.0} for row in series(10, 200)[-2:]]
    ingested = ingest(pl.DataFrame(twice + ramp))
    assert ingested.dropped == {
        "the batch changes within the run": 10,
        "repeats a step of its run (the last value of each column is kept)": 2,
    }
    assert to_runs(ingested)[0].metrics["loss/valid"][-2:].tolist() == [1.0, 1.0]


def test_settings_logged_now_and_then_hold_in_between() -> None:
    rows = series(100, 1600)
    for row in rows[1:]:
        row["lr"] = row["batch"] = None
    rows[3]["loss"] = None  # its norm is still a measurement
    ingested = ingest(pl.DataFrame(rows))
    assert ingested.dropped == {}
    run = to_runs(ingested)[0]
    assert len(run.metrics["step"]) == 16
    assert math.isnan(run.metrics["loss/valid"][3])


def chart(path: Path, metric: str, values: dict[str, list[float | None]]) -> Path:
    """As W&B exports it."""
    frame: dict[str, list[float | None]] = {"Step": [100.0, 200.0, 300.0]}
    for run, column in values.items():
        frame |= {f"{run} - {metric}": column, f"{run} - {metric}__MIN": column, f"{run} - {metric}__MAX": column}
    pl.DataFrame(frame).write_csv(path)
    return path


def test_charts_of_wandb_and_its_table_of_runs(tmp_path: Path) -> None:
    loss = chart(tmp_path / "loss.csv", "val/loss", {"a - b": [4.0, 3.5, 3.2], "c": [4.1, 3.6, None]})
    norm = chart(tmp_path / "norm.csv", "norm", {"a - b": [None, 4.0, 8.0], "c": [2.0, 3.0, None]})
    pl.DataFrame({"Name": ["a - b", "c", "d"], "lr": [0.1, 0.2, 0.3], "bs": [4, 8, 8]}).write_csv(tmp_path / "runs.csv")
    maps = ["step=Step", "loss=val/loss", "norm=norm", "batch=bs*512"]
    ingested = ingest(read_tables([loss, norm], tmp_path / "runs.csv"), maps)
    assert (ingested.form, ingested.rows, ingested.dropped) == ("series", 5, {})
    first, second = sorted(to_runs(ingested), key=lambda run: run.config["optimizer"]["lr"])
    assert [run.config["optimizer"]["lr"] for run in (first, second)] == [0.1, 0.2]
    assert first.metrics["tokens"].tolist() == [204800, 409600, 614400]
    assert second.column("loss/valid").tolist() == [4.1, 3.6]
    assert first.norm("output", "rms_to_inf")[1:].tolist() == [4.0, 8.0]
    with pytest.raises(UserError, match=r"--join: no column 'name' in .*runs\.csv to join on; nearest: Name; see --on"):
        read_tables([loss], tmp_path / "runs.csv", "run=name")


def test_histories_of_runs_in_files_of_their_own(tmp_path: Path) -> None:
    for name, lr in (("one", 0.1), ("two", 0.2)):
        lines = [{"_step": step, "loss": 3.0, "config": {"lr": lr, "bs": 64}, "x": [1]} for step in (10, 20)]
        text = "\n".join(json.dumps(line) for line in [*lines, {"_step": 30, "loss": math.nan}])
        (tmp_path / f"{name}.jsonl").write_text(text)
    frame = read_tables([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    ingested = ingest(frame, ["run=file", "step=_step", "lr=config.lr", "batch=config.bs"])
    runs = to_runs(ingested)
    assert sorted(run.config["imported"]["run"] for run in runs) == ["one", "two"]
    assert [run.outcome for run in runs] == [Outcome.DIVERGED] * 2
    assert [run.tokens for run in runs] == [1280, 1280]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "", "a.csv is not a table: "),
        ("a.csv", "x,y\n", "a.csv has no rows"),
        ("a.csv", "x,y\n1,2\n1,2,3\n", "a.csv is not a table: found more fields"),
        ("a.parquet", "x", "a.parquet is not a table: "),
        ("a.jsonl", '{"x": 1}\n{"x"\n', "a.jsonl:2: not JSON: "),
        ("a.jsonl", "[1]\n", "a.jsonl:1: not a JSON object"),
        ("a.xlsx", "", "a.xlsx is no table that can be read; there are .csv, .tsv, .parquet and .jsonl"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / name)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    missing = tmp_path / f"no{name[1:]}"
    with pytest.raises(UserError, match="cannot read .*: No such file" if name != "a.xlsx" else "no table") as caught:
        read_table(missing)
    assert str(caught.value).count(str(missing)) == 1


def logs(**changes: object) -> pl.DataFrame:
    """What extract_wandb_data.py of arXiv:2510.03871 writes: batches in sequences, the authors' names of norms."""
    rows = [
        {
            "_step": step, "loss_metrics/global_avg_loss": 11.0 - math.log2(step),
            "track_param_rms_to_l1/model_part_0/output": 2.0 * step,
            "track_param_l1_to_rms/model_part_0/tok_embeddings": 3.0 * step,
            "track_param_rms_to_rms/model_part_0/layers.3.feed_forward.w2": 4.0,
            "track_param_rms_to_rms/model_part_0/layers.0.attention.wq": 5.0,
            "track_param_condition_number/model_part_0/output": 1e9,
            "run_name": "lr-0.03125-bs-32", "bs": 32, "seed": 30, "momentum": 1.0,
            "lr": 0.03125, "lr_hidden": 0.03125, "lr_in": 0.03125, "lr_out": 0.03125, **changes,
        }
        for step in (16, 32, 64)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_preset_of_the_papers_logs() -> None:
    ingested = ingest(logs(), preset="norm-transfer-logs")
    (run,) = to_runs(ingested)
    assert run.config["batch"] == 32 * 4096
    assert run.metrics["tokens"].tolist() == [0, 2**21, 2**22, 2**23]
    assert run.metrics["loss/valid"].tolist() == [11.765, 7.0, 6.0, 5.0]
    assert run.norm("output", "rms_to_inf")[1:].tolist() == [32.0, 64.0, 128.0]
    assert run.norm("input", "one_to_rms")[1:].tolist() == [48.0, 96.0, 192.0]
    assert run.norm("hidden", "rms_to_rms")[1:].tolist() == [5.0] * 3  # the largest of the layers
    assert run.config["optimizer"] == {
        "name": "scion", "lr": 0.03125, "momentum": 0.0, "ratios": {"input": 1.0, "hidden": 1.0},
    }  # fmt: skip
    assert cells([run])["tokens"].to_list() == [2**21, 2**22, 2**23]
    assert set(run.groups) == {"output", "input", "hidden"}


def test_preset_of_the_papers_logs_with_groups_momentum_and_decay() -> None:
    changes = {"lr": None, "lr_hidden": 0.125, "momentum": 0.1, "run_name": "lr-i1h8o1-bs-32-momentum-0.1-decayed"}
    (run,) = to_runs(ingest(logs(**changes, lr_in=1.0, lr_out=1.0), preset="norm-transfer-logs"))
    assert run.config["optimizer"]["ratios"] == {"input": 1.0, "hidden": 0.125}
    assert (run.config["optimizer"]["lr"], run.config["optimizer"]["momentum"]) == (1.0, 0.9)
    assert run.config["schedule"] == {"decay": 0.25}
    assert cells([run])["tokens"].to_list() == [2**23]
    with pytest.raises(UserError, match="preset norm-transfer-logs: no column 'bs' for batch; there are: _step"):
        ingest(logs().drop("bs"), preset="norm-transfer-logs")
    with pytest.raises(UserError, match="no preset 'steplaw'; nearest: step-law"):
        ingest(logs(), preset="steplaw")


def test_preset_of_step_law(shared: Path) -> None:
    ingested = ingest(read_tables([shared / "steplaw_dense.csv"]), preset="step-law")
    assert (ingested.form, len(ingested.table), ingested.dropped, ingested.notes) == ("results", 1911, {}, ())
    runs = to_runs(ingested)
    assert len({run.id for run in runs}) == 1911
    first = next(run for run in runs if run.config["batch"] == 736 * 2048 and run.config["horizon"] == 100 * 10**9)
    assert first.config["model"] == {"name": "d960-L7", "width": 960, "depth": 7, "context": 2048}
    assert first.parameters == 214663680
    found = cells(runs)
    assert found.group_by("parameters", "tokens").len().height == 17
    assert set(found["family"]) == {"adamw, decay 1"}


def test_horizons_within_a_step_have_steps_of_their_own() -> None:
    rows = table(*({"tokens": tokens} for tokens in (10, 64, 80, 500, 4096)))
    (run,) = to_runs(ingest(rows))
    assert run.metrics["step"].tolist() == [1, 2, 3, 8, 64]
    assert cells([run])["tokens"].to_list() == [10, 64, 80, 500, 4096]


def test_close_horizons_become_one() -> None:
    assert snap(np.array([1000, 2000, 2001, 4097, 4095, 9000])).tolist() == [1000, 2001, 2001, 4096, 4096, 9000]
    chain = np.arange(10_000, 10_100, 5)  # each next to the other, but wide as a whole
    assert snap(chain).tolist() == chain.tolist()
    batches = [
        {"batch": batch, "lr": lr, "tokens": round(1e6 / batch) * batch} for batch in (96, 160) for lr in (0.1, 0.2)
    ]
    assert len(set(cells(to_runs(ingest(table(*batches))))["tokens"])) == 1


def test_the_form_can_be_said() -> None:
    frame = pl.DataFrame(series(100, 1600)).with_columns(points=3)
    assert ingest(frame).form == "results"
    assert ingest(frame, form="series").form == "series"
    with pytest.raises(UserError, match="--form must be results or series, got 'x'"):
        ingest(frame, form="x")


def test_ingested_is_frozen() -> None:
    with pytest.raises(AttributeError):
        ingest(table({})).rows = 0  # type: ignore[misc]
    assert isinstance(ingest(table({})), Ingested)
