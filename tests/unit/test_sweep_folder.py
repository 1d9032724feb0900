"""A folder takes its own study, extended or cut, and no other one."""

from pathlib import Path
from typing import Any

import pytest
from test_study import BASE, prepare

from disco.errors import UserError
from disco.sweep.folder import check_folder
from disco.sweep.record import STUDY, write_plan
from disco.sweep.study import Study, build_study


def study(name: str = "a", adaptive: bool = False, lr: tuple[float, ...] = (0.1, 0.2), **base: Any) -> Study:
    axes = {"lr": list(lr), "batch": [256, 512]}
    return build_study({"name": name, "base": BASE | base, "axes": axes, "adaptive": adaptive}, prepare)


def test_the_same_study_extended_or_cut_may_go_on(tmp_path: Path) -> None:
    assert check_folder(study(), tmp_path) == ()
    write_plan(study(), tmp_path)
    assert check_folder(study(), tmp_path) == ()
    assert check_folder(study(lr=(0.1, 0.2, 0.4)), tmp_path) == ()
    assert check_folder(study(horizon=2**16), tmp_path) == ()
    assert check_folder(study(lr=(0.1,)), tmp_path) == (
        f"2 runs of the plan in {tmp_path} are not in this one; their records stay",
    )
    (tmp_path / STUDY).write_text("{")
    assert check_folder(study("b"), tmp_path) == ()


def test_another_study_is_refused_in_one_line(tmp_path: Path) -> None:
    write_plan(study(), tmp_path)
    with pytest.raises(
        UserError, match=f"{tmp_path} holds the study 'a', not 'b'; give another --out, or the file that"
    ):
        check_folder(study("b"), tmp_path)
    with pytest.raises(
        UserError, match="holds another study named 'a': none of its 4 runs is in this one; give another"
    ):
        check_folder(study(seed=1), tmp_path)


def test_an_adaptive_study_knows_its_runs_by_all_but_rate_batch_and_horizon(tmp_path: Path) -> None:
    write_plan(study(lr=(0.05, 0.3)), tmp_path)
    assert check_folder(study(adaptive=True), tmp_path) == ()
    with pytest.raises(UserError, match="holds another study"):
        check_folder(study(adaptive=True, seed=1), tmp_path)
