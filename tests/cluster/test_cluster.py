"""A study of eight runs on a real Slurm and on a real Ray cluster of two nodes: jobs that are killed finish, cancel
works, and the records are, to the bit, those of the local engine.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
from daemons import Ray, Seen, Slurm
from sweeps import records, write_study

from disco.runs.lock import LOCK, holder
from disco.runs.reader import read_run
from disco.runs.schema import CHECKPOINTS, METRICS
from disco.sweep.adaptive.rounds import ROUNDS
from disco.sweep.record import QUEUED

pytestmark = pytest.mark.full
AXES = "[axes]\nlr = ['2^-5', '2^-4', '2^-3', '2^-2']\noptimizer = ['scion', {name = 'adamw', momentum = 0}]\n"
SECONDS = 480.0
"""For a sweep; as long as a machine takes that has much else to do."""


class Cluster(Protocol):
    environment: dict[str, str]

    def jobs(self) -> list[Seen]: ...


def write(folder: Path, engine: str = "", **settings: Any) -> Path:
    lines = [f"[{engine}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())] if engine else []
    return write_study(folder / "study.toml", AXES, *lines, horizon=2**17)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """Records and grouping of the local engine with two workers."""
    folder = tmp_path_factory.mktemp("local")
    sweep = start(write(folder), folder / "out", "local", dict(os.environ))
    assert finish(sweep)["finished"] == 8
    return records(folder / "out"), (folder / "out" / "cohorts.json").read_bytes()


def start(study: Path, out: Path, engine: str, environment: dict[str, str], workers: int = 2) -> subprocess.Popen[str]:
    command = ["sweep", "run", str(study), "--out", str(out), "--engine", engine, "--workers", str(workers), "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "disco", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(sweep: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    printed, errors = sweep.communicate(timeout=SECONDS)
    assert sweep.returncode == code, errors
    *events, result = map(json.loads, printed.splitlines())
    return {**result, "notes": [event["text"] for event in events if event["event"] == "note"]}


def disco(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "disco", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=cluster.environment, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def wait(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def trained(out: Path, since: float = 0.0) -> tuple[str, int] | None:
    """A run that is being trained and has a checkpoint made after ``since``, and the process that trains it."""
    for path in out.glob(f"*/{CHECKPOINTS}/latest*"):
        folder = path.parents[1]
        process = holder(folder / LOCK)
        with suppress(FileNotFoundError):  # a later one is there
            if process is not None and path.stat().st_mtime > since:
                return folder.name, process
    return None


def job_of(out: Path, run: str) -> str:
    """Key of the job that trains a run."""
    jobs = json.loads((out / QUEUED).read_bytes())["jobs"]
    return next(key for key, runs in jobs.items() if run in runs)


@contextmanager
def watched(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Iterator[list[Seen]]:
    """Collects and then shows what the scheduler says of its jobs, as it changes."""
    seen: list[Seen] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            seen.extend(job for job in cluster.jobs() if job not in seen)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        with capsys.disabled():
            print()
            for job in seen:
                print(f"  job {job.job}: {job.state}, requeued {job.requeues} times")


def requeues(cluster: Cluster) -> int:
    """In all: the highest count of each job."""
    counts: dict[str, int] = {}
    for job in cluster.jobs():
        counts[job.job] = max(counts.get(job.job, 0), job.requeues)
    return sum(counts.values())


def interrupt(slurm: Slurm, out: Path, *command: str) -> None:
    """Gives a command to the job that trains until Slurm has requeued one: a run may end at that very moment."""

    def training() -> list[str]:
        return [job.job for job in slurm.jobs() if job.state == "RUNNING"] if trained(out, time.time() - 0.5) else []

    before = requeues(slurm)
    while requeues(slurm) == before:
        slurm.ask(*command, *wait(training))
        patience = time.monotonic() + 10
        while requeues(slurm) == before and time.monotonic() < patience:
            time.sleep(0.1)


def states(document: dict[str, Any]) -> set[str]:
    return {run["state"] for run in document["runs"]}


def test_slurm(
    slurm: Slurm, tmp_path: Path, expected: tuple[dict[str, Any], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sweep = start(write(tmp_path, "slurm", time=10, memory=1, partition="main"), out, "slurm", slurm.environment)
    with watched(slurm, capsys) as seen:
        _, process = wait(lambda: trained(out))
        document = disco(slurm, "sweep", "status", str(out))
        assert {"running", "queued"} <= states(document), "one core, two jobs"
        (reason,) = {run["reason"] for run in document["runs"] if run["state"] == "queued"}
        assert reason in ("Resources", "Priority")
        os.kill(process, signal.SIGKILL)
        wait(lambda: requeues(slurm) == 1)
        for name in ("USR2", "TERM"):  # before a job's time is over; a node that goes down
            interrupt(slurm, out, "scancel", f"--signal={name}")
        result = finish(sweep)
        wait(lambda: {job.state for job in slurm.jobs()} == {"COMPLETED"})
    assert (result["finished"], result["failed"], result["waiting"]) == (8, {}, 0)
    (death,) = (note for note in result["notes"] if "died" in note)
    assert death.endswith("died: FAILED (exit code 137); it is requeued")
    assert states(disco(slurm, "sweep", "status", str(out))) == {"finished"}
    assert {"PENDING", "RUNNING", "FAILED", "COMPLETED"} <= {job.state for job in seen}
    assert (records(out), (out / "cohorts.json").read_bytes()) == expected
    messages = [json.loads(line) for file in (out / "jobs").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert sum(message["event"] == "stopped" for message in messages) == 2, "both signals: saved, and requeued"


def test_slurm_cancel(
    slurm: Slurm, tmp_path: Path, expected: tuple[dict[str, Any], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    study = write(tmp_path, "slurm", time=10, memory=1)
    sweep = start(study, out, "slurm", slurm.environment)
    with watched(slurm, capsys) as seen:
        wait(lambda: trained(out))
        before = {job.job for job in slurm.jobs() if job.state in ("RUNNING", "PENDING")}
        sweep.kill()  # what watches the jobs dies; they do not
        sweep.communicate()
        sweep = start(study, out, "slurm", slurm.environment)
        wait(lambda: disco(slurm, "sweep", "status", str(out))["process"] == sweep.pid)
        document = disco(slurm, "sweep", "cancel", str(out))
        assert (document["stopped"], document["jobs"]) == (True, 2)
        assert finish(sweep, code=128 + signal.SIGTERM)["waiting"] == document["left"] > 0
    assert {job.state for job in slurm.jobs() if job.job in before} <= {"CANCELLED", "COMPLETED"}
    assert "CANCELLED" in {job.state for job in seen}
    assert states(disco(slurm, "sweep", "status", str(out))) <= {"finished", "interrupted", "waiting"}
    assert finish(start(study, out, "slurm", slurm.environment))["finished"] == 8
    assert records(out) == expected[0]


def test_slurm_time_limit(slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The only checkpoint is the one that a job makes when Slurm warns it; longer than the limit of a minute."""
    study = write_study(
        tmp_path / "study.toml",
        "[axes]\nbatch = [64]\n[slurm]\ntime = 1\nwarning = 30\nmemory = 1",
        horizon=2**22,
        checkpoint_seconds=1e6,
    )
    out = tmp_path / "out"
    sweep = start(study, out, "slurm", slurm.environment)
    with watched(slurm, capsys) as seen:
        run, _ = wait(lambda: trained(out))
        (job,) = (job.job for job in slurm.jobs() if job.state in ("RUNNING", "COMPLETING"))
        wait(lambda: Seen(job, "RUNNING", 1) in seen)
        disco(slurm, "sweep", "cancel", str(out))
        result = finish(sweep, code=128 + signal.SIGTERM)
    assert "TIMEOUT" not in {seen.state for seen in seen if seen.job == job}
    assert not [note for note in result["notes"] if "died" in note]
    assert read_run(out / run).outcome is None


def test_slurm_refuses(slurm: Slurm, tmp_path: Path) -> None:
    sweep = start(write(tmp_path, "slurm", partition="none"), tmp_path / "out", "slurm", slurm.environment)
    _, errors = sweep.communicate(timeout=SECONDS)
    assert sweep.returncode == 2
    assert "disco: error: Slurm refused 2 jobs: sbatch: error:" in errors
    assert "invalid partition specified: none" in errors
    assert not (tmp_path / "out" / QUEUED).exists()


def test_slurm_full(tmp_path: Path, expected: tuple[dict[str, Any], bytes], capsys: pytest.CaptureFixture[str]) -> None:
    """A Slurm that takes two jobs, which are somebody else's; sbatch itself tries for two minutes."""
    out = tmp_path / "out"
    with Slurm("MaxJobCount=3", "MinJobAge=2") as full, watched(full, capsys) as seen:
        for _ in range(2):
            assert full.ask("sbatch", "--hold", "--job-name=others", "--wrap=true")
        sweep = start(write(tmp_path, "slurm", time=10, memory=1), out, "slurm", full.environment, workers=1)
        wait(lambda: (out / QUEUED).exists())
        wait(lambda: not (out / QUEUED).exists())
        assert states(disco(full, "sweep", "status", str(out))) == {"waiting"}
        assert sweep.poll() is None
        full.ask("scancel", "--name=others")
        wait(lambda: sweep.poll() is not None, seconds=3 * SECONDS)
        result = finish(sweep)
    (refused,) = (note for note in result["notes"] if "refused" in note)
    assert refused.startswith("Slurm refused 1 jobs: sbatch: error: ")
    assert refused.endswith("Resource temporarily unavailable; trying again every 30 seconds")
    assert (result["finished"], result["failed"], result["waiting"]) == (8, {}, 0)
    assert records(out) == expected[0]
    messages = [file.read_text().count('"ready"') for file in (out / "jobs").glob("*.jsonl")]
    assert messages == [1] * len(messages), "no job twice"
    assert len(messages) == len(json.loads((out / "cohorts.json").read_bytes())["cohorts"])
    assert {job.job for job in seen if job.state == "RUNNING"}


def test_slurm_adaptive(slurm: Slurm, tmp_path: Path) -> None:
    """The rounds and the records are the local engine's, though the process that watches is killed on the way."""
    axes = (
        "[axes]\nbatch = [64, 128]\nlr = ['2^-4', '2^-3', '2^-2']\n[adaptive]\nbudget = '2^13.8'\n[slurm]\nmemory = 1\n"
    )
    study = write_study(tmp_path / "study.toml", axes, horizon=2**13)
    study.write_text(study.read_text().replace("valid_tokens = 1024", "valid_tokens = 256"))
    here, there = tmp_path / "here", tmp_path / "there"
    local = finish(start(study, here, "local", dict(os.environ)))
    sweep = start(study, there, "slurm", slurm.environment)
    wait(lambda: list(there.glob(f"*/{METRICS}")))  # the first round
    assert sweep.poll() is None
    sweep.kill()
    sweep.communicate()
    result = finish(start(study, there, "slurm", slurm.environment))
    assert result["finished"] == local["finished"] >= 5
    assert (there / ROUNDS).read_bytes() == (here / ROUNDS).read_bytes()
    assert records(there) == records(here)


def test_ray(
    ray: Ray, tmp_path: Path, expected: tuple[dict[str, Any], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.job_submission import JobSubmissionClient

    out = tmp_path / "out"
    sweep = start(write(tmp_path, "ray", memory=1, address=ray.address), out, "ray", ray.environment)
    with watched(ray, capsys) as seen:
        run, process = wait(lambda: trained(out))
        assert "running" in states(disco(ray, "sweep", "status", str(out)))
        job = job_of(out, run)
        os.kill(process, signal.SIGKILL)
        wait(lambda: Seen(job, "RUNNING", 1) in seen)
        result = finish(sweep)
        wait(lambda: {job.state for job in ray.jobs()} == {"FAILED", "SUCCEEDED"})
    assert (result["finished"], result["failed"], result["waiting"]) == (8, {}, 0)
    assert [other for other in seen if other.state == "FAILED"] == [Seen(job, "FAILED", 0)]
    assert Seen(job, "SUCCEEDED", 1) in seen
    nodes = {details.driver_node_id for details in JobSubmissionClient(ray.address).list_jobs()}
    assert len(nodes) == 2, "both nodes trained"
    assert (records(out), (out / "cohorts.json").read_bytes()) == expected


def test_ray_cancel(ray: Ray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sweep = start(write(tmp_path, "ray", memory=1, address=ray.address), out, "ray", ray.environment)
    with watched(ray, capsys) as seen:
        wait(lambda: trained(out))
        document = disco(ray, "sweep", "cancel", str(out))
        assert finish(sweep, code=128 + signal.SIGTERM)["waiting"] == document["left"] > 0
    assert document["jobs"] == 2
    assert "STOPPED" in {job.state for job in seen}
    assert trained(out) is None


def test_ray_lost_node(
    ray: Ray, tmp_path: Path, expected: tuple[dict[str, Any], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one: the node stays away."""
    out = tmp_path / "out"
    sweep = start(write(tmp_path, "ray", memory=1, address=ray.address), out, "ray", ray.environment)
    with watched(ray, capsys):
        wait(lambda: len(list(out.glob(f"*/{CHECKPOINTS}/latest.pt"))) > 2)  # both cohorts, of two runs each
        ray.lose_node()
        result = finish(sweep)
    assert (result["finished"], result["failed"], result["waiting"]) == (8, {}, 0)
    assert len([note for note in result["notes"] if "died" in note]) == 1
    assert records(out) == expected[0]
