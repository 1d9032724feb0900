"""What is read back is what was written; damage costs the damaged line and is named."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from records import GROUPS, config, write

from disco.errors import UserError
from disco.runs.reader import outcome_so_far, read_run, read_runs, read_summary
from disco.runs.schema import CONFIG, METRICS, SUMMARY, Outcome

LINES = [
    {"step": 0, "loss/valid": 5.5},
    {"step": 1, "loss/train": 5.0, "norm/weights/rms_to_rms/layers.0.wq": 2.0},
    {"step": 2, "loss/valid": 4.0, "norm/weights/rms_to_rms/layers.0.wo": 3.0},
]


def test_reads_what_was_written(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), LINES, tokens=512)
    run = read_run(folder)
    assert (run.id, run.outcome, run.tokens, run.parameters) == (folder.name, Outcome.FINISHED, 512, 11520)
    assert run.groups == {group: tuple(layers) for group, layers in GROUPS.items()}
    assert run.config["batch"] == 256
    np.testing.assert_array_equal(run.metrics["loss/valid"], [5.5, math.nan, 4.0])
    np.testing.assert_array_equal(run.metrics["step"], [0, 1, 2])
    np.testing.assert_array_equal(run.column("loss/never"), [math.nan] * 3)


def test_the_norm_of_a_group_is_that_of_its_largest_layer(tmp_path: Path) -> None:
    lines = [
        *LINES,
        {"step": 3, **{f"norm/weights/rms_to_rms/layers.0.{name}": n for name, n in (("wq", 5), ("wo", 4))}},
    ]
    run = read_run(write(tmp_path, config(), lines))
    np.testing.assert_array_equal(run.norm("hidden", "rms_to_rms"), [math.nan, 2.0, 3.0, 5.0])
    np.testing.assert_array_equal(run.norm("output", "rms_to_inf"), [math.nan] * 4)
    np.testing.assert_array_equal(run.norm("vector", "rms"), [math.nan] * 4)


def test_a_run_under_way_is_readable(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), [], outcome=None)
    run = read_run(folder)
    assert (run.outcome, run.tokens, run.summary, read_summary(folder)) == (None, 0, None, None)


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        ('{"step": 1, "tok', "the line is cut off"),
        ("\x00\x00\x00\n", "not JSON: .*"),
        ("\n", "not JSON: .*"),
        ("[1]\n", "not a JSON object"),
        ('{"step": 1}\n', "has no tokens"),
        ('{"tokens": 1}\n', "has no step"),
        ('{"step": 1.5, "tokens": 1}\n', "step is not a whole number: 1.5"),
        ('{"step": -1, "tokens": 1}\n', "step is not a whole number: -1"),
        ('{"step": "1", "tokens": 1}\n', "step is not a finite number: '1'"),
        ('{"step": true, "tokens": 1}\n', "step is not a finite number: 'True'"),
        ('{"step": 1, "tokens": 1, "loss/train": null}\n', "loss/train is not a finite number: 'None'"),
        ('{"step": 1, "tokens": 1, "loss/train": NaN}\n', "not JSON: NaN is not a number in JSON"),
        ('{"step": 1, "tokens": 1, "loss/train": 1e999}\n', "loss/train is not a finite number: 'inf'"),
        ("[" * 100_000 + "\n", "not JSON: .*"),
        ('{"step": 2, "tokens": 512}\n', "repeats step 2"),
    ],
)
def test_a_damaged_line_is_named_and_the_rest_is_read(tmp_path: Path, damaged: str, why: str) -> None:
    folder = write(tmp_path, config(), LINES[::2])
    with (folder / METRICS).open("a") as file:
        file.write(damaged)
    found = read_runs(tmp_path)
    assert len(found.problems) == 1
    where, line, reason = found.problems[0].split(":", 2)
    assert (where, line) == (str((folder / METRICS).resolve()), "3")
    assert re.fullmatch(why, reason.strip(), flags=re.DOTALL)
    np.testing.assert_array_equal(found.runs[0].metrics["loss/valid"], [5.5, 4.0])


def test_lines_are_in_step_order_however_they_were_written(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, config(), LINES[::-1]))
    np.testing.assert_array_equal(run.metrics["step"], [0, 1, 2])
    np.testing.assert_array_equal(run.metrics["tokens"], [0, 256, 512])


def test_a_damaged_document_costs_its_run_only(tmp_path: Path) -> None:
    good, bad = (write(tmp_path, config(seed=seed), LINES) for seed in (0, 1))
    (bad / CONFIG).write_text('{"id": "x",\n "config": }')
    found = read_runs(tmp_path)
    assert [run.id for run in found.runs] == [good.name]
    assert found.problems == (f"{(bad / CONFIG).resolve()}:2: not JSON: Expecting value",)
    with pytest.raises(UserError, match=r"config.json:2: not JSON"):
        read_run(bad)


@pytest.mark.parametrize("change", [{"schema": 99}, {"id": 3}, {"groups": []}, {"parameters": None}])
def test_a_document_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = write(tmp_path, config(), LINES)
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(document | change))
    with pytest.raises(UserError, match=rf"no readable run: .*{CONFIG}:1: {next(iter(change))}"):
        read_runs(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data", None),
        ("data.valid_tokens", "many"),
        ("model.width", None),
        ("optimizer.ratios", []),
        ("optimizer.lr", 0.0),
        ("batch", 0),
        ("horizon", -1),
        ("seed", None),
    ],
)
def test_a_configuration_without_what_fits_need_is_refused(tmp_path: Path, key: str, value: object) -> None:
    folder = write(tmp_path, config(), LINES)
    document = json.loads((folder / CONFIG).read_text())
    *tables, last = ("config." + key).split(".")
    table = document
    for name in tables:
        table = table[name]
    table[last] = value
    (folder / CONFIG).write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"no readable run: .*{CONFIG}:1: config\.{key}"):
        read_runs(tmp_path)


def test_groups_are_lists(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), LINES)
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(document | {"groups": {"input": 3}}))
    with pytest.raises(UserError, match="groups are not lists of layers"):
        read_runs(tmp_path)


def test_a_damaged_summary_leaves_the_run_unfinished(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), LINES)
    (folder / SUMMARY).write_text('{"outcome": "triumph"}')
    found = read_runs(folder)
    assert found.runs[0].outcome is None
    assert found.problems == (f"{folder / SUMMARY}:1: unknown outcome 'triumph'",)
    assert read_summary(folder) is None


def test_a_finished_run_that_lost_its_lines_is_named_and_not_done(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), LINES, tokens=512)
    assert outcome_so_far(folder, 512) == Outcome.FINISHED
    (folder / METRICS).unlink()
    assert outcome_so_far(folder, 512) is None
    found = read_runs(tmp_path)
    assert found.problems == (f"{folder / METRICS}:1: the run is finished but its lines are missing",)


def test_finds_runs_at_every_level_and_each_once(tmp_path: Path) -> None:
    first, second = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    one = write(first, config(), LINES)
    write(second, config(seed=1), LINES)
    (first / "data").mkdir()
    assert len(read_runs(one).runs) == len(read_runs(first).runs) == len(read_runs(one, first).runs) == 1
    assert len(read_runs(tmp_path / "runs").runs) == len(read_runs(first, second).runs) == 2
    write(second, config(), LINES)
    found = read_runs(first, second)
    assert (len(found.runs), found.problems, len(found.notes)) == (2, (), 1)


def test_a_folder_without_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        read_runs(tmp_path)
    with pytest.raises(UserError, match="is not a folder of runs"):
        read_runs(tmp_path / "nowhere")
