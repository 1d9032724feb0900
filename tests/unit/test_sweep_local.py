"""The local engine, with workers that train nothing: every run ends once, whatever becomes of its workers."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from disco.errors import NoSpaceError, UserError
from disco.runs.lock import LOCK, locked
from disco.runs.reader import read_run, read_runs
from disco.runs.schema import DATA, Outcome
from disco.sweep.engines._pool import Pool
from disco.sweep.engines.local import Result, run_study
from disco.sweep.progress import Bar, JsonLines, Lines, Snapshot
from disco.sweep.record import LOG, outcome, read_cohorts, read_plan
from disco.sweep.study import Study, build_study
from disco.train.data import prepare

WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
BASE = {
    "batch": 256,
    "horizon": 2**12,
    "model": {"width": 16, "depth": 1, "head_size": 8, "context": 64},
    "data": {"valid_tokens": 256},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("All happy families are alike. " * 500)
    return path


def study(out: Path, text: Path, decay: dict[str, Any] | None = None, **axes: Any) -> Study:
    data = BASE["data"] | {"source": [str(text)]}
    table = {"name": "s", "base": BASE | {"data": data}, "axes": axes} | ({"decay": decay} if decay else {})
    return build_study(table, partial(prepare, cache=out / DATA))


def run(plan: Study, out: Path, workers: int = 2) -> Result:
    return run_study(plan, out, workers=workers, show=Lines(io.StringIO()), command=WORKER)


def attempts(out: Path, run: str) -> list[list[str]]:
    return [line.split() for line in (out / run / "attempts").read_text().splitlines()]


def test_all_runs_finish_and_a_second_sweep_has_nothing_to_do(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, lr=[0.1, 0.2, 0.3, 0.4])
    assert run(plan, out) == Result(finished=4, diverged=0)
    assert {r.outcome for r in read_runs(out).runs} == {Outcome.FINISHED}
    assert run(plan, out) == Result(finished=4, diverged=0)
    tried = [attempts(out, config.id) for config in plan.configs]
    assert [len(t) for t in tried] == [1] * 4
    assert len({t[0][0] for t in tried}) <= 2, "workers are kept from run to run"
    assert {t[0][1] for t in tried} == {"1"}, "one thread each"
    assert read_plan(out).configs == plan.configs
    assert "a library prints something" in (out / LOG).read_text()


def test_a_pool_keeps_its_workers_from_sweep_to_sweep_also_when_one_has_died(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    rounds = [study(out, text, lr=[2.0**-rate]) for rate in range(4)]
    with Pool(WORKER) as pool:
        for plan in rounds[:3]:
            run_study(plan, out, workers=1, show=Lines(io.StringIO()), pool=pool)
        (first,) = {attempts(out, config.id)[0][0] for plan in rounds[:3] for config in plan.configs}
        os.kill(int(first), signal.SIGKILL)
        result = run_study(rounds[3], out, workers=1, show=Lines(io.StringIO()), pool=pool)
        assert result == Result(finished=1, diverged=0)
        assert attempts(out, rounds[3].configs[0].id)[0][0] != first
        (last,) = [worker.process for worker in pool.workers]
    assert last.poll() is not None, "none is left behind"


def test_trouble_in_one_run_leaves_the_others_alone(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, seed=[0, 1, 2, 3, 4])
    ids = {config.seed: config.id for config in plan.configs}
    result = run(plan, out)
    assert (result.finished, result.diverged, result.waiting) == (2, 1, 0)
    assert result.failed == {
        ids[1]: "ValueError: the loss has the wrong shape",
        ids[3]: f"its worker died 3 times, last by signal 9; see {LOG}",
    }
    for seed, reason in ((1, "ValueError: the loss has the wrong shape"), (3, "its worker died 3 times")):
        record = read_run(out / ids[seed])
        assert record.outcome == Outcome.FAILED
        assert record.summary is not None
        assert record.summary["reason"].startswith(reason)
        assert record.tokens == 0, "what it had recorded stays"
    assert [len(attempts(out, ids[seed])) for seed in range(5)] == [1, 1, 3, 3, 1]
    assert "ValueError: the loss has the wrong shape\nand more" in (out / LOG).read_text()
    run(plan, out)
    assert [len(attempts(out, ids[seed])) for seed in range(5)] == [1, 2, 3, 6, 1], "failed runs are tried again"


def test_a_cohort_that_fails_is_taken_apart_down_to_the_run_that_is_the_reason(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, seed=[0, 1, 3, 7], lr=[0.1, 0.2, 0.3, 0.4])
    result = run(plan, out, workers=1)
    assert result.finished == 4
    reasons = {config.id: config.seed for config in plan.configs}
    failed = {0: "", 1: "ValueError: the loss", 3: "its worker died 3 times", 7: "UserError: its checkpoint is damaged"}
    assert result.failed.keys() == {run for run, seed in reasons.items() if seed}
    assert all(reason.startswith(failed[reasons[run]]) for run, reason in result.failed.items())
    first, *rest = [line.split() for line in (out / "cohorts.log").read_text().splitlines()]
    assert len(first) == 8  # 16 runs, two cohorts for each worker
    assert max(map(len, rest)) <= 8
    assert all(len(attempts(out, config.id)) == 1 for config in plan.configs if config.seed in (0, 7))


def test_a_full_disk_ends_the_sweep_and_fails_no_run(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, seed=[8, 5])  # the other one trains until it is told to stop
    with pytest.raises(NoSpaceError, match="No space left on device"):
        run(plan, out)
    assert [outcome(config, out) for config in plan.configs] == [None, None]
    assert not list(out.glob("*/summary.json"))
    assert run(study(out, text, seed=[8]), out) == Result(finished=1, diverged=0)


def test_an_interrupted_cohort_stays_together_and_new_runs_form_others(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, seed=[0, 1], lr=[0.1, 0.2, 0.3, 0.4])  # seed 1 fails: left to do
    run(plan, out, workers=1)
    before = {frozenset(run.id for run in cohort.runs) for cohort in read_cohorts(out, plan.configs)}
    (out / "cohorts.log").unlink()
    wider = study(out, text, seed=[0, 1], lr=[0.1, 0.2, 0.3, 0.4, 0.5])
    run(wider, out, workers=1)
    again = [frozenset(line.split()) for line in (out / "cohorts.log").read_text().splitlines()]
    old, new = {config.id for config in plan.configs}, {config.id for config in wider.configs}
    failed = {frozenset(c.id for c in plan.configs if c.id in cohort and c.seed == 1) for cohort in before} - {
        frozenset()
    }
    assert failed <= set(again)
    assert all(cohort <= old or not cohort & old for cohort in again)
    assert frozenset(new - old) == frozenset().union(*again) - old


def test_a_longer_horizon_goes_on_and_a_shorter_one_is_done(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, seed=[0, 4])
    longer = dataclasses.replace(plan, configs=tuple(dataclasses.replace(c, horizon=2**13) for c in plan.configs))
    for each in (longer, plan, longer):
        assert run(each, out) == Result(finished=1, diverged=1)
    assert [len(attempts(out, config.id)) for config in plan.configs] == [1, 1]
    longest = dataclasses.replace(plan.configs[0], horizon=3 * 2**12)
    assert outcome(plan.configs[0], out) is Outcome.FINISHED
    assert outcome(longest, out) is None
    run(dataclasses.replace(plan, configs=(longest,)), out)
    assert len(attempts(out, longest.id)) == 2
    assert read_run(out / longest.id).tokens == 3 * 2**12


def test_branches_wait_for_their_parents_and_end_with_them(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, decay={"fraction": 0.25, "at": [1536, 3072]}, seed=[0, 1, 4])
    parents = {config.id: config.seed for config in plan.configs}
    result = run(plan, out)
    for branch in plan.branches:
        assert branch.parent is not None
        seed, record = parents[branch.parent], read_run(out / branch.id)
        if seed == 0:
            assert record.outcome == Outcome.FINISHED
            assert attempts(out, branch.id)[0][2] > attempts(out, branch.parent)[0][2]
        elif seed == 1 or branch.branch_tokens == 3072:
            how = "failed" if seed == 1 else "diverged"
            assert record.outcome == (Outcome.FAILED if seed == 1 else Outcome.PRUNED)
            assert record.summary is not None
            assert record.summary["reason"] == f"parent {branch.parent} {how} before {branch.branch_tokens} tokens"
            assert record.summary["parent_outcome"] == how
            assert record.groups == {}
        else:  # its parent diverged at 2,048 tokens, after it branches off
            assert record.outcome == Outcome.DIVERGED
    assert (result.finished, result.diverged, result.pruned, len(result.failed)) == (3, 2, 1, 3)


def test_a_diverged_parent_is_no_failure_of_the_sweep(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, decay={"fraction": 0.25, "at": [3072]}, seed=[4])
    for _ in range(2):
        assert run(plan, out) == Result(finished=0, diverged=1, pruned=1)
    assert not (out / plan.branches[0].id / "attempts").exists()


def test_data_that_do_not_last_are_said_before_anything_is_trained(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text, lr=[0.1], horizon=[2**12, 2**20])
    with pytest.raises(
        UserError, match=r"the horizon of 1,048,576 tokens is longer than the data: the data have 14,\d+"
    ):
        run(plan, out)
    assert os.listdir(out) == [DATA]


def test_a_second_sweep_in_the_same_folder_is_told_so(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text)
    with locked(out / LOCK), pytest.raises(UserError, match=f"{out} is in use by process {os.getpid()}"):
        run(plan, out)
    assert run(plan, out).finished == 1


def test_an_orphan_that_still_holds_a_run_is_waited_for(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, text)
    released = threading.Event()

    def hold() -> None:
        with locked(out / plan.configs[0].id / LOCK):
            released.wait()

    orphan = threading.Thread(target=hold)
    orphan.start()
    threading.Timer(0.5, released.set).start()
    assert run(plan, out).finished == 1
    orphan.join()


def test_workers_that_cannot_start_end_the_sweep(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"workers die when they start \(exit code 1\); the reason is in .*{LOG}"):
        run_study(study(out, text), out, workers=2, show=Lines(io.StringIO()), command=(*WORKER, "broken"))
    assert "no such library" in (out / LOG).read_text()


SWEEP = """
import io, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sweep_local import WORKER, run_study, study
from disco.sweep.progress import JsonLines
out, text = Path(sys.argv[2]), Path(sys.argv[3])
plan = study(out, text, seed=[5, 0])
result = run_study(plan, out, workers=1, show=JsonLines(), command=WORKER)
print(repr(result))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_workers_too(tmp_path: Path, text: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    parent = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(Path(__file__).parent), str(out), str(text)],
        stdout=subprocess.PIPE,
        text=True,
    )
    stuck = next(config.id for config in study(out, text, seed=[5]).configs)
    _wait(lambda: (out / stuck / "metrics.jsonl").exists() and (out / stuck / "metrics.jsonl").stat().st_size > 0)
    worker = int(attempts(out, stuck)[0][0])
    begun = time.monotonic()
    parent.send_signal(number)
    printed = parent.communicate(timeout=10)[0]
    if number == signal.SIGKILL:
        assert parent.returncode == -signal.SIGKILL
    else:
        assert parent.returncode == 0
        assert printed.splitlines()[-1] == repr(Result(finished=1, diverged=0, waiting=1, signal=int(number)))
    _wait(lambda: not _alive(worker))
    assert time.monotonic() - begun < 5
    with locked(out / LOCK), locked(out / stuck / LOCK):
        assert read_run(out / stuck).outcome is None


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


STATE = Snapshot(
    runs=8, ended=3, running=2, diverged=1, failed=0, tokens=8000, done=4000, tokens_per_second=2000, seconds_left=125.4
)  # fmt: skip


def test_progress_in_a_log_and_for_machines() -> None:
    assert str(STATE) == "3/8 runs, 1 diverged, 2k tokens/s, 2m05s left"
    assert str(dataclasses.replace(STATE, pruned=2)) == "3/8 runs, 1 diverged, 2 pruned, 2k tokens/s, 2m05s left"
    unknown = dataclasses.replace(STATE, tokens_per_second=float("nan"), seconds_left=float("nan"))
    assert str(unknown) == "3/8 runs, 1 diverged, ? left"
    assert str(dataclasses.replace(STATE, ended=8)) == "8/8 runs, 1 diverged, 2k tokens/s"
    plain, machine = io.StringIO(), io.StringIO()
    for display in (Lines(plain), JsonLines(machine)):
        with display as shown:
            shown.update(unknown)
            shown.update(STATE)  # within ten seconds: nothing, until the end
            shown.ended("abc", "finished", "")
            shown.ended("def", "diverged", "loss 99")
    assert plain.getvalue() == f"{unknown}\nrun def diverged: loss 99\n{STATE}\n"
    events = [json.loads(line) for line in machine.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["progress", "ended", "ended", "progress"]
    assert "tokens_per_second" not in events[0]
    assert events[2] == {"event": "ended", "run": "def", "outcome": "diverged", "reason": "loss 99"}


def test_the_bar_takes_the_same_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as shown:
        shown.update(STATE)
        shown.say("[a note]")
        shown.ended("abc", "failed", "why")
    said = capsys.readouterr().err
    assert "[a note]" in said
    assert "run abc failed: why" in said
