"""Logs that grow, are cut, rewritten, rotated or damaged while they are read."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planned
import pytest
import records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disco.cli import main
from disco.guide import check
from disco.guide._course import Course, course
from disco.guide._follow import Look, follow
from disco.guide._log import Columns, without_abandoned
from disco.guide._tail import Tail
from disco.runs.reader import Run
from disco.runs.schema import METRICS, Outcome, norm_key
from disco.runs.writer import RunWriter, write_json

PLAN = planned.plan(planned.study())


def _line(step: int) -> dict[str, float]:
    path = planned.RATE * step
    norm = 2 ** float(planned.law(path))
    return {
        "step": step, "tokens": 256 * step, "path": path, "loss/train": 5.0 - 0.001 * step, "lr/output": planned.RATE,
        norm_key("rms_to_inf", "output"): norm, norm_key("one_to_rms", "tok_embeddings"): norm,
        norm_key("rms_to_rms", "layers.0.wq"): norm,
    }  # fmt: skip


STEPS = [0, *(round(2 ** (k / 2)) for k in range(2, 20))]
LINES = [json.dumps(_line(step), sort_keys=True).encode() + b"\n" for step in STEPS]
CONFIG = records.config(horizon=planned.TOKENS, optimizer={"lr": planned.RATE})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return records.write(tmp_path, CONFIG, [], None)


def _course(look: Look) -> Course:
    assert look.course is not None, look.notes
    return look.course


def _tokens(look: Look) -> list[float]:
    return _course(look).tokens.tolist()


def test_a_line_that_is_cut_off_waits_for_its_rest(tmp_path: Path) -> None:
    path, tail = tmp_path / "log", Tail(tmp_path / "log")
    assert tail.read() == ([], False)
    path.write_bytes(b"one\ntw")
    assert tail.read() == ([b"one\n"], False)
    with path.open("ab") as file:
        file.write(b"o\n")
    assert tail.read() == ([b"two\n"], False)
    assert tail.read() == ([], False)


def test_a_file_that_is_cut_rewritten_or_gone_voids_what_was_read(tmp_path: Path) -> None:
    path, tail = tmp_path / "log", Tail(tmp_path / "log")
    path.write_bytes(b"one\ntwo\n")
    tail.read()
    path.write_bytes(b"one\n")
    assert tail.read() == ([b"one\n"], True)
    path.write_bytes(b"ONE\ntwo\nthree\n")  # longer than before, and another
    assert tail.read() == ([b"ONE\n", b"two\n", b"three\n"], True)
    path.unlink()  # it may be about to be made again, by rotation
    assert tail.read() == ([], False)


def test_a_rotated_file_goes_on(folder: Path) -> None:
    look, metrics = follow(folder, PLAN), folder / METRICS
    metrics.write_bytes(b"".join(LINES[:8]))
    assert len(_tokens(look())) == 8
    metrics.rename(folder / "metrics.jsonl.1")
    metrics.write_bytes(b"".join(LINES[8:12]))
    assert _tokens(look()) == [256.0 * step for step in STEPS[:12]]


def test_a_look_between_renaming_and_making_again_forgets_nothing(folder: Path) -> None:
    look, metrics = follow(folder, PLAN), folder / METRICS
    metrics.write_bytes(b"".join(LINES[:8]))
    look()
    metrics.rename(folder / "metrics.jsonl.1")
    assert len(_tokens(look())) == 8
    metrics.write_bytes(b"".join(LINES[8:12]))
    assert _tokens(look()) == [256.0 * step for step in STEPS[:12]]


def test_a_resumed_record_is_cut_back(folder: Path) -> None:
    look = follow(folder, PLAN)
    with RunWriter(folder) as writer:
        writer.resume(0)
        for step in STEPS[:10]:
            writer.append(_line(step))
        offset = sum(map(len, LINES[:6]))
        assert len(_tokens(look())) == 10
        writer.resume(offset)
        assert _tokens(look()) == [256.0 * step for step in STEPS[:6]]
        writer.append(_line(STEPS[6]) | {"loss/train": 9.0})
        assert _course(look()).loss[-1] == 9.0
        writer.finish(Outcome.DIVERGED, "by hand")
    found = look()
    assert found.ended == "diverged"
    assert check(_course(found), PLAN, found.ended).verdict == "off course"


def test_a_run_that_starts_over_forgets_what_was(folder: Path) -> None:
    look, metrics = follow(folder, PLAN), folder / METRICS
    metrics.write_bytes(b"".join(LINES[:12]))
    look()
    with metrics.open("ab") as file:  # an appending logger, from a checkpoint at step 4
        file.write(LINES[3] + LINES[4])
    assert _tokens(look()) == [256.0 * step for step in STEPS[:5]]


def test_a_finished_run_that_is_to_go_on_has_not_ended(folder: Path) -> None:
    with RunWriter(folder) as writer:
        writer.resume(0)
        writer.append(_line(4))
        writer.finish(Outcome.FINISHED)
    assert follow(folder, PLAN)().ended == ""


def test_a_run_ends_though_its_horizon_is_no_multiple_of_the_batch(tmp_path: Path) -> None:
    for name, horizon, ended in (("whole", 4 * 256 + 100, "finished"), ("short", 5 * 256, "")):
        (tmp_path / name).mkdir()
        folder = records.write(tmp_path / name, records.config(horizon=2048), [], None)
        config = json.loads((folder / "config.json").read_text())  # of another trainer's record
        config["config"]["horizon"] = horizon
        (folder / "config.json").write_text(json.dumps(config))
        with RunWriter(folder) as writer:
            writer.resume(0)
            writer.append(_line(4))
            writer.finish(Outcome.FINISHED)
        assert follow(folder, PLAN)().ended == ended


def _allowed(look: Look) -> None:
    """No forecast without norms along a path, no verdict but with reasons, always JSON."""
    if look.course is None:
        assert look.notes
        return
    found = check(look.course, PLAN, look.ended)
    course = look.course
    measured = np.isfinite(course.norm) & np.isfinite(course.path) & (course.tokens > 0)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.verdict == "on course" or found.reasons
    if found.forecast is not None:
        assert measured.sum() >= 3
        assert found.forecast.low <= found.forecast.log2 <= found.forecast.high
        assert math.isfinite(found.forecast.high - found.forecast.low)
    else:
        assert found.octaves is None
        assert found.correction is None


HERE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(_line(1))), inner, max_size=4),
    max_leaves=6,
)


@HERE
@given(ends=st.lists(st.integers(0, sum(map(len, LINES))), min_size=1, max_size=5))
def test_any_prefix_of_a_record_in_any_order(folder: Path, ends: list[int]) -> None:
    look, whole = follow(folder, PLAN), b"".join(LINES)
    for end in ends:
        (folder / METRICS).write_bytes(whole[:end])
        found = look()
        _allowed(found)
        assert len(_tokens(found)) == whole[:end].count(b"\n")


@HERE
@given(
    lines=st.lists(st.sampled_from(LINES) | st.binary(max_size=60) | ANY.map(lambda v: json.dumps(v).encode() + b"\n")),
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
)
def test_damaged_lines_of_a_record(folder: Path, lines: list[bytes], flips: list[tuple[int, int]]) -> None:
    content = bytearray(b"".join(lines))
    for at, byte in flips:
        if at < len(content):
            content[at] = byte
    (folder / METRICS).write_bytes(content)
    _allowed(follow(folder, PLAN)())


@HERE
@given(config=st.binary(max_size=40) | ANY.map(lambda v: json.dumps(v).encode()))
def test_damaged_configurations(folder: Path, config: bytes) -> None:
    (folder / METRICS).write_bytes(b"".join(LINES))
    (folder / "config.json").write_bytes(config)
    _allowed(follow(folder, PLAN)())


Written = Callable[[Path, list[dict[str, Any]]], Path]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path / "log.csv"
    path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    return path


def _chart(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path / "chart.csv"
    names = [name for name in rows[0] if name != "step"]
    lines = ["Step," + ",".join(f'"my run - {name}"' for name in names)]
    lines += [",".join([str(row["step"]), *(str(row[name]) for name in names)]) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def _trainer_state(path: Path, rows: list[dict[str, Any]]) -> Path:
    folder = path / "checkpoint-8"
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"learning_rate" if name == "lr" else name: value for name, value in row.items()} for row in rows]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 8, "log_history": history}))
    return path


def _titan(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path / "train.log"
    lines = [
        f"[titan] 2026-01-01 00:00:00 - root - INFO - \x1b[31mstep: {row['step']:2}  \x1b[32mloss: {row['loss']:.4f}"
        f"  \x1b[38mgrad_norm:  1.2345  \x1b[36mmemory:  1.00GiB(2.50%)  \x1b[34mtps: 12,345"
        f"  lr: {row['lr']:.6f}  norm: {row['norm']:.4f}\x1b[39m"
        for row in rows
    ]
    path.write_text("\n".join(["[titan] - INFO - Training starts at step 1", *lines]) + "\n")
    return path


def _rows(steps: list[int]) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 5.0 - 0.001 * step, "lr": planned.RATE, "norm": 2 ** float(planned.law(step / 2))}
        for step in steps
    ]


@pytest.mark.parametrize("write", [_jsonl, _csv, _chart, _trainer_state, _titan])
def test_other_trainers_logs(tmp_path: Path, write: Written) -> None:
    path = write(tmp_path, _rows(STEPS[1:12]))
    found = follow(path, PLAN)()
    course = _course(found)
    assert course.tokens.tolist() == [256.0 * step for step in STEPS[1:12]]
    assert np.log2(course.norm) == pytest.approx(planned.law(np.array(STEPS[1:12]) / 2), abs=1e-3)
    assert course.path == pytest.approx(np.array(STEPS[1:12]) / 2)
    assert (course.horizon, course.batch, course.optimizer) == (planned.TOKENS, 256, "scion")
    assert any("batch: taken as planned" in note for note in found.notes)
    assert check(course, PLAN).forecast is not None


@pytest.mark.parametrize("write", [_jsonl, _csv, _titan, _trainer_state])
def test_a_log_that_grows_and_goes_back(tmp_path: Path, write: Written) -> None:
    look = follow(write(tmp_path, _rows(STEPS[1:8])), PLAN)
    assert len(_tokens(look())) == 7
    write(tmp_path, _rows(STEPS[1:12]))
    assert len(_tokens(look())) == 11
    write(tmp_path, _rows([*STEPS[1:12], *STEPS[5:8]]))  # resumed from step STEPS[4]
    assert _tokens(look()) == [256.0 * step for step in STEPS[1:8]]


def test_runs_of_a_log_are_chosen_by_name(tmp_path: Path) -> None:
    rows = [row | {"run": name} for name in ("a", "b") for row in _rows(STEPS[1:6])]
    path = _jsonl(tmp_path, rows)
    assert "say which with --name: a, b" in follow(path, PLAN)().notes[0]
    assert len(_tokens(follow(path, PLAN, Columns(run="b"))())) == 5


def test_a_log_without_norms_gives_no_forecast(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("step", "loss")} for row in _rows(STEPS[1:9])]
    found = check(_course(follow(_jsonl(tmp_path, rows), PLAN)()), PLAN)
    assert (found.verdict, found.forecast) == ("cannot tell", None)


def test_settings_of_a_log_may_be_given(tmp_path: Path) -> None:
    columns = Columns(maps=("batch=512",), settings={"schedule.warmup": 2048, "optimizer.momentum": 0.9})
    course = _course(follow(_jsonl(tmp_path, _rows(STEPS[1:9])), PLAN, columns)())
    assert (course.batch, course.warmup, course.momentum) == (512, 2048, 0.9)


def _falling(steps: range, factor: Callable[[float], float]) -> list[dict[str, Any]]:
    total, path, rows = planned.TOKENS // 256, 0.0, []
    for step in steps:
        rate = planned.RATE * factor(step / total)
        path += rate * steps.step
        rows.append({"step": step, "loss": 5.0, "lr": rate, "norm": 2 ** float(planned.law(path))})
    return rows


def test_a_log_goes_on_at_its_current_rate(tmp_path: Path) -> None:
    rows = _falling(range(8, 513, 8), lambda at: 1.0 if at < 0.25 else 0.25)
    found = follow(_jsonl(tmp_path, rows), PLAN)()
    course = _course(found)
    assert course.lr.tolist() == pytest.approx([row["lr"] for row in rows])
    assert course.rate == pytest.approx(planned.RATE / 4)
    assert course.path_at(planned.TOKENS) == pytest.approx(course.path[-1] + 512 * planned.RATE / 4)
    assert "the log does not tell the schedule: taken as planned: constant" in found.notes


def test_a_schedule_that_is_not_declared_cannot_be_followed(tmp_path: Path) -> None:
    rows = _falling(range(8, 308, 8), lambda at: (1 + math.cos(math.pi * at)) / 2)
    found = check(_course(follow(_jsonl(tmp_path, rows), PLAN)()), PLAN)
    assert found.verdict == "cannot tell"
    assert "the logged rate falls, and no decay is declared" in found.reasons[0]


def test_a_declared_peak_and_warmup_tell_where_a_log_is_going(tmp_path: Path) -> None:
    rows = _falling(range(8, 97, 8), lambda at: min(1.0, at / 0.25))
    path = _jsonl(tmp_path, rows)
    told = {"schedule.warmup": 0.25 * planned.TOKENS, "optimizer.lr": planned.RATE}
    look = follow(path, PLAN, Columns(settings=told))()
    course = _course(look)
    assert course.rate == pytest.approx(planned.RATE)
    assert not any("schedule" in note for note in look.notes)
    end = planned.RATE * (0.125 + 0.75) * planned.TOKENS / 256
    assert course.path_at(planned.TOKENS) == pytest.approx(end, rel=0.01)
    untold = check(_course(follow(path, PLAN)()), PLAN)
    assert untold.verdict == "cannot tell"
    assert "the logged rate rises, and no warmup is declared" in untold.reasons[0]


def test_a_folder_of_checkpoints_is_looked_for_again(tmp_path: Path) -> None:
    look = follow(tmp_path, PLAN)
    assert look().course is None
    (tmp_path / "config.json").write_text("{}")  # the model's
    assert look().course is None
    _trainer_state(tmp_path, _rows(STEPS[1:6]))
    assert len(_tokens(look())) == 5
    later = _trainer_state(tmp_path / "later", _rows(STEPS[1:9])) / "checkpoint-8"
    later.rename(tmp_path / "checkpoint-16")
    os.utime(tmp_path / "checkpoint-8" / "trainer_state.json", (1, 1))
    assert len(_tokens(look())) == 8


def test_a_log_ends_with_its_last_interval(tmp_path: Path) -> None:
    total = planned.TOKENS // 256
    for last, ended in ((total - 10, "finished"), (total - 20, ""), (total, "finished")):
        path = _jsonl(tmp_path, _rows([*range(20, last, 15), last - 15, last]))
        assert follow(path, PLAN)().ended == ended


def test_only_what_needs_the_user_is_stuck(tmp_path: Path) -> None:
    few, many = ([{"step": step, "lr": 0.1} for step in range(1, count)] for count in (4, 30))
    assert not follow(_jsonl(tmp_path, few), PLAN)().stuck
    assert follow(_jsonl(tmp_path, many), PLAN)().stuck
    assert follow(_jsonl(tmp_path, [row | {"run": name} for name in "ab" for row in _rows(STEPS[1:4])]), PLAN)().stuck
    assert not follow(tmp_path / "nothing.csv", PLAN)().stuck
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    assert not follow(tmp_path / "half.parquet", PLAN)().stuck


def test_following_stops_where_the_user_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "plan.json", PLAN.to_dict())
    log = _jsonl(tmp_path, [row | {"run": name} for name in "ab" for row in _rows(STEPS[1:4])])
    following = ["watch", str(log), "--plan", str(tmp_path / "plan.json"), "--follow", "--every", "0.01"]
    assert main(following) == 2
    assert "say which with --name: a, b" in capsys.readouterr().err
    _jsonl(tmp_path, _rows([*STEPS[1:], planned.TOKENS // 256]))
    assert main(following) in (0, 1, 3)
    assert capsys.readouterr().err.count("the schedule: taken as planned: constant") == 1


def test_momentum_that_an_import_does_not_tell_is_not_known() -> None:
    head = {"model": {}, "batch": 256, "horizon": 1024, "optimizer": {"name": "", "lr": 0.1}}
    run = Run(id="a", folder=Path("a"), config=head, groups={}, parameters=None, summary=None, metrics={
        "step": np.array([4.0]), "tokens": np.array([1024.0])})  # fmt: skip
    own, imported = course(run), course(replace(run, config=head | {"imported": {"form": "series"}}))
    assert (own.momentum, own.weight_decay) == (0, 0)
    assert math.isnan(imported.momentum)
    assert math.isnan(imported.weight_decay)


def test_rows_out_of_order_are_not_taken_for_a_resumption() -> None:
    newest_first = [{"step": step} for step in range(300, 0, -1)]
    assert without_abandoned(newest_first) == newest_first


@HERE
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".csv", ".tsv", ".json", ".log", ".parquet"]))
def test_any_bytes_as_a_log(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"log{suffix}"
    path.write_bytes(content)
    _allowed(follow(path, PLAN)())


@HERE
@given(
    rows=st.lists(
        st.sampled_from(_rows(STEPS)) | st.dictionaries(st.sampled_from(["step", "loss", "norm", "lr", "run"]), ANY),
        max_size=12,
    )
)
def test_any_objects_as_a_log(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    _allowed(follow(_jsonl(tmp_path, rows), PLAN)())
