"""Cells: windows, group norms, diverged rows and family names, against numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from records import config, write

from disco.runs.reader import Run, read_run
from disco.runs.schema import CONFIG, Outcome
from disco.runs.table import AXES, DEFAULTS, cells, columns, curves, families, horizons, layer_norms
from disco.train.config import TrainConfig, to_dict


def lines(*steps: int, base: float = 5.0) -> list[dict[str, float]]:
    """Loss base - step/100, path step/8, output norm 2^(step/16)."""
    return [
        {
            "step": s,
            "path": s / 8,
            "loss/valid": base - s / 100,
            "loss/train": base - s / 50,
            "norm/weights/rms_to_inf/output": 2 ** (s / 16),
        }
        for s in steps
    ]


def run(folder: Path, rows: list[dict[str, float]], outcome: Outcome = Outcome.FINISHED, **changes: Any) -> Run:
    return read_run(write(folder, config(**changes), rows, outcome))


def test_a_cell_is_the_mean_over_the_trailing_window(tmp_path: Path) -> None:
    # Batch 256, held-out 256: horizons from 1,024 tokens (4 steps); written for 4 and for the own 16,384 (64 steps).
    rows = lines(0, 2, 3, 4, 62, 63, 64)
    table = cells([run(tmp_path, rows, optimizer={"lr": 0.125})])
    assert table["tokens"].to_list() == [1024, 16384]
    four, own = table.rows(named=True)
    assert (four["step"], four["points"], own["step"], own["points"]) == (4, 3, 64, 3)
    assert four["loss"] == pytest.approx(5 - 0.03)
    assert own["loss"] == pytest.approx(5 - 0.63)
    assert own["sigma"] == pytest.approx(0.01)  # of 4.38, 4.37, 4.36 with ddof 1
    assert own["path"] == 8.0
    assert own["norm/output/rms_to_inf"] == pytest.approx(2 ** (63 / 16))  # geometric mean of 2^(62, 63, 64 / 16)
    assert own["loss_start"] == 5.0
    assert own["lr"] == 0.125
    assert not own["diverged"]


def test_the_window_widens_with_the_horizon(tmp_path: Path) -> None:
    rows = lines(0, 252, 253, 254, 255, 256)  # 256 steps: d = 4, so 248, 252, 256
    row = cells([run(tmp_path, rows, horizon=2**16)]).row(0, named=True)
    assert row["points"] == 2
    assert row["loss"] == pytest.approx(5 - 2.54)


def test_one_point_has_no_spread(tmp_path: Path) -> None:
    row = cells([run(tmp_path, lines(64))]).row(0, named=True)
    assert (row["points"], row["sigma"], row["loss_start"]) == (1, None, None)


def test_the_train_loss_on_request(tmp_path: Path) -> None:
    row = cells([run(tmp_path, lines(62, 63, 64))], loss="loss/train").row(0, named=True)
    assert row["loss"] == pytest.approx(5 - 63 / 50)


def test_horizons_are_powers_of_two_that_the_batch_divides_and_the_own(tmp_path: Path) -> None:
    assert horizons(run(tmp_path, [])) == [2**k for k in range(10, 15)]
    assert horizons(run(tmp_path, [], batch=192, horizon=1920)) == [1920]
    assert horizons(run(tmp_path, [], batch=64, horizon=64 * 50)) == [1024, 2048, 3200]
    assert horizons(run(tmp_path, [], schedule={"decay": 0.25})) == [2**14]


def test_a_diverged_run_bounds_the_grid(tmp_path: Path) -> None:
    table = cells([run(tmp_path, lines(0, 4, 8), Outcome.DIVERGED)])
    assert table["tokens"].to_list() == [1024, 2048, 4096, 8192, 16384]
    assert table["diverged"].to_list() == [False, False, True, True, True]
    assert table["loss"].is_null().to_list() == [False, False, True, True, True]


def test_an_unfinished_run_has_the_horizons_it_reached(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), lines(0, 4, 8), outcome=None)
    assert cells([read_run(folder)])["tokens"].to_list() == [1024, 2048]


def test_a_branch_starts_from_its_parents_loss_and_diverges_with_it(tmp_path: Path) -> None:
    parent = run(tmp_path, lines(0, 64), Outcome.DIVERGED)
    decay = {"schedule": {"decay": 0.25}, "parent": parent.id}
    branch = run(tmp_path, lines(64), **decay)
    row = cells([parent, branch]).row(-1, named=True)
    assert (row["tokens"], row["loss_start"], row["family"]) == (2**14, 5.0, "scion, decay 0.25")
    orphan = read_run(write(tmp_path, config(**decay, horizon=2**15), [], Outcome.PRUNED, parent_outcome="diverged"))
    row = cells([orphan]).row(0, named=True)
    assert (row["diverged"], row["loss"], row["tokens"]) == (True, None, 2**15)


def test_no_runs_give_an_empty_table_with_columns() -> None:
    table = cells([])
    assert table.is_empty()
    assert {"lr", "loss", "family", "diverged"} <= set(table.columns)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "scion"),
        ({"seed": 3, "batch": 512, "optimizer": {"lr": 1.0}}, "scion"),
        ({"optimizer": {"momentum": 0.9, "nesterov": True}}, "scion, momentum 0.9, nesterov"),
        ({"optimizer": {"ratios": {"hidden": 0.125}}}, "scion, ratio hidden 2^-3"),
        ({"optimizer": {"name": "adam", "betas": [0, 0]}}, "adam, betas 0 0"),
        ({"optimizer": {"name": "adamw", "weight_decay": 0.1}}, "adamw, weight decay 0.1"),
        ({"optimizer": {"name": "adamw", "eps": 1e-6}}, "adamw, eps 1e-06"),
        ({"optimizer": {"ratios": {"hidden": 0.3}, "momentum": 0.9}}, "scion, ratio hidden 0.3, momentum 0.9"),
        ({"schedule": {"warmup": 1024}}, "scion, warmup 2^10"),
    ],
)
def test_a_family_is_named_by_what_differs_from_the_defaults(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    assert families([run(tmp_path, [], **changes)]) == [name]


def test_a_family_tells_apart_whatever_else_differs_between_the_runs(tmp_path: Path) -> None:
    model = {"width": 16, "depth": 1, "head_size": 8, "context": 32}
    both = [run(tmp_path, []), run(tmp_path, [], model=model)]
    assert families(both) == ["scion, context 2^6", "scion, context 2^5"]


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in table.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_every_setting_is_an_axis_or_part_of_the_family() -> None:
    settings = flat(to_dict(TrainConfig()))
    where_varied = {"model.head_size", "model.context", "data.digest", "data.valid_tokens"}
    assert not set(AXES) & set(DEFAULTS)
    assert {*AXES, *DEFAULTS, "optimizer.name", *where_varied} == set(settings)
    assert {key: settings[key] for key in DEFAULTS} == DEFAULTS


def other(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, list):
        return [other(value[0]), *value[1:]] if value else [1]
    if isinstance(value, str):
        return f"x{value}"
    return value + 1 if isinstance(value, int) else value * 1.001 or 0.001


@pytest.mark.parametrize("key", flat(to_dict(TrainConfig())))
def test_runs_share_a_family_just_when_they_differ_in_axes_only(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path, config(), lines(64))
    first = read_run(folder)
    document = json.loads((folder / CONFIG).read_text())
    table = document["config"]
    *tables, last = key.split(".")
    for name in tables:
        table = table[name]
    table[last] = other(table[last])
    (folder / CONFIG).write_text(json.dumps(document))
    one, two = families([first, read_run(folder)])
    assert (one == two) == (key in AXES)


def test_columns_are_those_of_cells(tmp_path: Path) -> None:
    runs = [run(tmp_path, lines(0, 62, 63, 64)), run(tmp_path, lines(0, 64), seed=1)]
    arrays = columns(runs)
    assert list(arrays) == cells(runs).columns
    assert arrays["loss"] == pytest.approx([5 - 0.63, 5 - 0.64])
    assert math.isnan(arrays["sigma"][1])


def test_curves_have_a_row_per_evaluation(tmp_path: Path) -> None:
    runs = [run(tmp_path, lines(0, 64)), run(tmp_path, [{"step": 1, "loss/train": 4.0}], seed=1)]
    table = curves(runs)
    assert table["step"].to_list() == [0, 64, 1]
    assert table["loss_train"].to_list() == pytest.approx([5.0, 5 - 64 / 50, 4.0])
    assert table["norm/output/rms_to_inf"].to_list() == [1.0, 16.0, None]
    assert table["run"].to_list() == [runs[0].id] * 2 + [runs[1].id]


def test_layer_norms_are_long_and_hold_only_what_was_measured(tmp_path: Path) -> None:
    rows = [{"step": 0, "norm/weights/rms_to_rms/layers.0.wq": 1.0}, *lines(64)]
    table = layer_norms(run(tmp_path, rows))
    assert table.rows() == [
        (0, 0, "hidden", "layers.0.wq", "rms_to_rms", 1.0),
        (64, 2**14, "output", "output", "rms_to_inf", 16.0),
    ]
    assert math.isclose(table["value"].sum(), 17.0)
