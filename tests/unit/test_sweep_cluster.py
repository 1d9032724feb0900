"""The cluster engine with a scheduler whose jobs train nothing: every run ends once, whatever becomes of its jobs."""

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_queue import FakeQueue
from test_sweep_local import attempts
from test_sweep_local import run as run_locally
from test_sweep_local import study as study_of

from disco.errors import NoSpaceError, UserError
from disco.runs.lock import LOCK, locked
from disco.runs.reader import read_run, read_runs
from disco.runs.schema import Outcome
from disco.sweep.clusters import JobConfig
from disco.sweep.engines import cluster, local
from disco.sweep.engines._course import DEATHS, Result
from disco.sweep.progress import Lines
from disco.sweep.record import CANCEL, JOBS, Queued, outcome, read_queued, write_queued
from disco.sweep.study import Study


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "LISTEN_SECONDS", 0.02)
    monkeypatch.setattr(cluster, "RETRY_SECONDS", 0.1)


def study(out: Path, **axes: Any) -> Study:
    text = out.with_name("text.txt")
    text.write_text("All happy families are alike. " * 500)
    return study_of(out, text, **axes)


def queue(**settings: Any) -> FakeQueue:
    return FakeQueue(JobConfig(jobs=2), **settings)


def run(plan: Study, out: Path, scheduler: FakeQueue, said: io.StringIO | None = None) -> Result:
    return cluster.run_study(plan, out, scheduler, show=Lines(said or io.StringIO()))


def test_all_runs_finish_as_cohorts_and_a_second_sweep_has_nothing_to_do(tmp_path: Path) -> None:
    out, scheduler = tmp_path / "out", queue()
    plan = study(out, lr=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert run(plan, out, scheduler) == Result(finished=8, diverged=0)
    assert {r.outcome for r in read_runs(out).runs} == {Outcome.FINISHED}
    assert [len(attempts(out, config.id)) for config in plan.configs] == [1] * 8
    assert scheduler.most <= 2
    assert sum(map(len, scheduler.submitted)) == 4, "two cohorts for each of the jobs at once"
    assert read_queued(out) is None
    before = len(scheduler.processes)
    assert run(plan, out, scheduler) == Result(finished=8, diverged=0)
    assert len(scheduler.processes) == before


def test_the_grouping_is_the_local_engine_s(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    plan = study(here, seed=[0, 4], lr=[0.1, 0.2, 0.3, 0.4])
    run_locally(plan, here)
    run(study(there, seed=[0, 4], lr=[0.1, 0.2, 0.3, 0.4]), there, queue())
    assert (here / "cohorts.json").read_bytes() == (there / "cohorts.json").read_bytes()


def test_trouble_in_one_run_leaves_the_others_alone(tmp_path: Path) -> None:
    out, scheduler, said = tmp_path / "out", queue(), io.StringIO()
    plan = study(out, seed=[0, 1, 2, 3, 4, 7])
    ids = {config.seed: config.id for config in plan.configs}
    result = run(plan, out, scheduler, said)
    assert (result.finished, result.diverged, result.waiting) == (2, 1, 0)
    assert result.failed.keys() == {ids[1], ids[3], ids[7]}
    assert result.failed[ids[1]] == "ValueError: the loss has the wrong shape"
    assert result.failed[ids[7]] == "UserError: its checkpoint is damaged"
    assert result.failed[ids[3]].startswith(f"its job died {DEATHS} times, last by CODE -9; see {JOBS}/disco-")
    assert [len(attempts(out, ids[seed])) for seed in (0, 1, 2, 3, 4)] == [1, 1, 3, 3, 1]
    assert sorted(scheduler.requeues.values())[-2:] == [2, 2], "the same job, requeued"
    assert "died: CODE -9; it is requeued" in said.getvalue()
    for config in plan.configs:
        if config.seed in (1, 3, 7):
            assert read_run(out / config.id).outcome == Outcome.FAILED
            assert outcome(config, out) is None, "left to do"


def test_a_job_that_may_not_be_requeued_is_submitted_anew(tmp_path: Path) -> None:
    out, scheduler = tmp_path / "out", queue(may_requeue=False)
    plan = study(out, seed=[2])
    assert run(plan, out, scheduler) == Result(finished=1, diverged=0)
    assert len(scheduler.processes) == 3


def test_branches_are_submitted_once_their_parents_have_ended(tmp_path: Path) -> None:
    out, scheduler = tmp_path / "out", queue()
    plan = study(out, decay={"fraction": 0.25, "at": [1536, 3072]}, seed=[0, 1, 4])
    result = run(plan, out, scheduler)
    seeds = {config.id: config.seed for config in plan.configs}
    for branch in plan.branches:
        record = read_run(out / branch.id)
        assert branch.parent is not None
        if seeds[branch.parent] == 0:
            assert record.outcome == Outcome.FINISHED
            assert attempts(out, branch.id)[0][2] > attempts(out, branch.parent)[0][2]
    assert (result.finished, result.diverged, result.pruned, len(result.failed)) == (3, 2, 1, 3)


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    out, scheduler, said = tmp_path / "out", queue(room=0), io.StringIO()
    plan = study(out, lr=[0.1, 0.2, 0.3, 0.4, 0.5])
    threading.Timer(1.0, lambda: setattr(scheduler, "room", 1)).start()
    assert run(plan, out, scheduler, said) == Result(finished=5, diverged=0)
    assert said.getvalue().count("the queue is full; trying again every 0.1 seconds") >= 1
    assert scheduler.most == 1, "two jobs at once were refused, one was not"
    assert [len(attempts(out, config.id)) for config in plan.configs] == [1] * 5


def test_a_refusal_for_good_ends_the_sweep_but_not_one_that_has_jobs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = study(out, lr=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="no such partition"):
        run(plan, out, queue(refuse=1))
    assert read_queued(out) is None
    scheduler, said = queue(), io.StringIO()
    accept = scheduler.submit

    def once(name: str, orders: Any) -> None:
        accept(name, orders)
        scheduler.refuse, scheduler.submit = 2, accept  # type: ignore[method-assign]

    scheduler.submit = once  # type: ignore[method-assign]
    assert run(plan, out, scheduler, said) == Result(finished=3, diverged=0)
    assert said.getvalue().count("no such partition; trying again every 0.1 seconds") == 1


@pytest.mark.parametrize("deaf", [0, 4])
@pytest.mark.parametrize("lose", ["answer", "all"])
def test_a_submission_whose_answer_is_lost_is_not_made_twice(tmp_path: Path, lose: str, deaf: int) -> None:
    out, scheduler = tmp_path / "out", queue(lose=lose, deaf=deaf)
    plan = study(out, lr=[0.1, 0.2, 0.3])
    first = lose == "all" or deaf
    if first:  # the first submission: the user is told, and what may be in the queue is remembered
        with pytest.raises(UserError, match="no answer"):
            run(plan, out, scheduler)
        assert (read_queued(out) is not None) == bool(deaf)
        scheduler.deaf = 0
    assert run(plan, out, scheduler) == Result(finished=3, diverged=0)
    assert [len(attempts(out, config.id)) for config in plan.configs] == [1] * 3


@pytest.mark.parametrize("lose", ["answer", "all"])
def test_later_a_lost_answer_is_waited_for(tmp_path: Path, lose: str) -> None:
    out, scheduler = tmp_path / "out", queue()
    accept = scheduler.submit

    def once(name: str, orders: Any) -> None:
        accept(name, orders)
        scheduler.lose, scheduler.deaf, scheduler.submit = lose, 3, accept  # type: ignore[method-assign]

    scheduler.submit = once  # type: ignore[method-assign]
    plan = study(out, lr=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert run(plan, out, scheduler) == Result(finished=8, diverged=0)
    assert [len(attempts(out, config.id)) for config in plan.configs] == [1] * 8


def test_a_full_disk_ends_the_sweep_and_fails_no_run(tmp_path: Path) -> None:
    out, scheduler = tmp_path / "out", queue()
    plan = study(out, seed=[8, 0])
    with pytest.raises(NoSpaceError, match="No space left on device"):
        run(plan, out, scheduler)
    assert not [record for record in read_runs(out).runs if record.outcome == Outcome.FAILED]
    assert run(plan, out, scheduler) == Result(finished=2, diverged=0)


def test_jobs_that_die_before_they_train_end_the_sweep(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"jobs die before they train, the last one by CODE 5; see .*{JOBS}"):
        run(study(out, lr=[0.1 * i for i in range(1, 9)]), out, queue(broken=True))


def _wait(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alone(out: Path, plan: Study) -> str:
    """Waits until the run of seed 5, which trains until it is told to stop, is the only one in a job."""
    stuck = next(config.id for config in plan.configs if config.seed == 5)
    _wait(lambda: (out / stuck / "attempts").exists())
    _wait(lambda: (queued := read_queued(out)) and list(queued.jobs.values()) == [(stuck,)])
    return stuck


def test_an_interrupted_watcher_leaves_its_jobs_and_the_next_one_adopts_them(tmp_path: Path) -> None:
    out, scheduler, said = tmp_path / "out", queue(), io.StringIO()
    plan = study(out, seed=[5, 0])
    threading.Timer(0, lambda: (_alone(out, plan), os.kill(os.getpid(), signal.SIGINT))).start()
    assert run(plan, out, scheduler, said) == Result(finished=1, diverged=0, waiting=1, signal=signal.SIGINT)
    assert "1 jobs stay with fake" in said.getvalue()
    queued = read_queued(out)
    assert queued is not None
    ((key, runs),) = queued.jobs.items()
    assert scheduler.processes[key].poll() is None
    with pytest.raises(UserError, match=r"fake may still have 1 jobs .* --engine fake, or first: disco sweep cancel"):
        local.run_study(plan, out, show=Lines(io.StringIO()))
    # the next one watches the same job: killed, it is requeued under the same key, until it is given up
    threading.Timer(0.3, scheduler.processes[key].kill).start()
    threading.Timer(0, lambda: _cancel_after_requeue(out, runs[0])).start()
    result = run(plan, out, scheduler)
    assert (result.finished, result.waiting, result.signal) == (1, 1, signal.SIGTERM)
    assert scheduler.requeues[key] == 1
    assert len(attempts(out, runs[0])) == 2
    assert len(scheduler.processes) == 2, "no job was submitted twice"


def _cancel_after_requeue(out: Path, run: str) -> None:
    _wait(lambda: len(attempts(out, run)) == 2)
    (out / CANCEL).touch()


def test_cancel_ends_the_jobs_and_the_process_that_watches_them(tmp_path: Path) -> None:
    out, scheduler = tmp_path / "out", queue()
    plan = study(out, seed=[5, 0], decay={"fraction": 0.25, "at": [3072]})
    results: list[Result] = []
    watcher = threading.Thread(target=lambda: results.append(run(plan, out, scheduler)))
    watcher.start()
    stuck = _alone(out, plan)
    assert cluster.cancel(out, scheduler) >= 1
    watcher.join(timeout=20)
    assert results[0].signal == signal.SIGTERM
    assert results[0].waiting >= 2, "the run, and its branch that was never submitted"
    assert all(process.poll() is not None for process in scheduler.processes.values())
    messages = [json.loads(line) for file in (out / JOBS).glob("*.jsonl") for line in file.read_text().splitlines()]
    assert {"event": "stopped"} in messages, "it left its run by itself"
    assert read_run(out / stuck).outcome is None
    assert (read_queued(out), (out / CANCEL).exists()) == (None, False)
    assert cluster.cancel(out, scheduler) == 0


def test_cancel_without_a_watcher(tmp_path: Path) -> None:
    out, scheduler = tmp_path / "out", queue()
    plan = study(out, seed=[5])
    threading.Timer(0, lambda: (_alone(out, plan), os.kill(os.getpid(), signal.SIGTERM))).start()
    assert run(plan, out, scheduler).waiting == 1
    assert cluster.cancel(out, scheduler) == 1
    assert all(process.poll() is not None for process in scheduler.processes.values())
    assert (read_queued(out), (out / CANCEL).exists()) == (None, False)
    with locked(out / LOCK):
        pass


def test_a_job_that_somebody_else_cancels_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    out, scheduler = tmp_path / "out", queue()
    plan = study(out, seed=[5, 0])
    threading.Timer(0, lambda: (_alone(out, plan), scheduler.cancel(_running(scheduler)))).start()
    result = run(plan, out, scheduler)
    assert (result.finished, result.waiting) == (1, 0)
    (reason,) = result.failed.values()
    assert reason.endswith("was cancelled: CANCELLED")
    assert reason.startswith("its job disco-")


def _running(scheduler: FakeQueue) -> list[str]:
    return [key for key, process in scheduler.processes.items() if process.poll() is None]


def test_damaged_files_are_said(tmp_path: Path) -> None:
    write_queued(tmp_path, Queued("slurm", {"partition": "gpu"}, {"disco-1.0": ("a", "b")}))
    assert read_queued(tmp_path) == Queued("slurm", {"partition": "gpu"}, {"disco-1.0": ("a", "b")})
    write_queued(tmp_path, Queued("slurm", {}, {}))
    assert read_queued(tmp_path) is None
    (tmp_path / "jobs.json").write_text('{"engine": "slurm"}')
    with pytest.raises(UserError, match=r"jobs.json is damaged \('jobs'\); cancel the sweep's jobs by hand"):
        read_queued(tmp_path)
