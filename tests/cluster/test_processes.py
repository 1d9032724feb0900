"""Runs that are sharded over the processes of a job, on one node and on two: jobs that are stopped or lose a process
finish, and the losses are, but for rounding, those of one process.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemons import Ray, Slurm
from sweeps import records, write_study
from test_cluster import finish, interrupt, requeues, start, trained, wait, watched

pytestmark = pytest.mark.full
SHARDED = ("[axes]", "lr = ['2^-5', '2^-4']")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Records of two runs, each in one process of the local engine."""
    folder = tmp_path_factory.mktemp("alone")
    study = write_study(folder / "study.toml", *SHARDED, horizon=2**16)
    assert finish(start(study, folder / "out", "local", dict(os.environ)))["finished"] == 2
    return records(folder / "out")


def sharded(folder: Path, *settings: str) -> Path:
    """The study of ``one_process``, its runs sharded over the two processes of a job."""
    return write_study(folder / "study.toml", "parallel = { shard = 2 }", *SHARDED, *settings, horizon=2**16)


@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 1)])
def test_slurm_processes(
    nodes: int, processes: int, tmp_path: Path, one_process: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs of two processes are requeued by their owner, by themselves, and when a process died."""
    out = tmp_path / "out"
    study = sharded(tmp_path, "[slurm]", "time = 10", "memory = 1", f"nodes = {nodes}", f"processes = {processes}")
    with Slurm(nodes=nodes, cpus=processes) as two, watched(two, capsys) as seen:
        sweep = start(study, out, "slurm", two.environment)
        interrupt(two, out, "scontrol", "requeue")
        interrupt(two, out, "scancel", "--signal=USR2")
        kill_a_rank(out)
        result = finish(sweep)
        wait(lambda: {job.state for job in two.jobs()} == {"COMPLETED"})
        assert requeues(two) == 3
    assert (result["finished"], result["failed"], result["waiting"]) == (2, {}, 0)
    (death,) = (note for note in result["notes"] if "died" in note)
    assert death.endswith("died: FAILED (exit code 1); it is requeued")
    assert {"PENDING", "RUNNING", "FAILED", "COMPLETED"} <= {job.state for job in seen}
    messages = [json.loads(line) for file in (out / "jobs").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [sum(message["event"] == event for message in messages) for event in ("ready", "stopped")] == [5, 2]
    assert_alike(records(out), one_process, capsys)


def test_ray_processes(tmp_path: Path, one_process: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with Ray(cpus=2) as two, watched(two, capsys) as seen:
        study = sharded(tmp_path, "[ray]", "memory = 1", "processes = 2", f"address = '{two.address}'")
        sweep = start(study, out, "ray", two.environment, workers=1)
        kill_a_rank(out)
        result = finish(sweep)
        wait(lambda: {job.state for job in two.jobs()} == {"FAILED", "SUCCEEDED"})
    assert (result["finished"], result["failed"], result["waiting"]) == (2, {}, 0)
    assert len([note for note in result["notes"] if "died" in note]) == 1
    assert {("FAILED", 0), ("SUCCEEDED", 1)} <= {(job.state, job.requeues) for job in seen}
    assert_alike(records(out), one_process, capsys)


def kill_a_rank(out: Path) -> None:
    """Kills a process of a job, though not the one that writes the record."""
    _, leader = wait(lambda: trained(out, since=time.time() - 0.5))
    commands = {process: " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    ours = f"-m disco.sweep.engines.torchrun {out}/"
    ranks = [each for each, command in commands.items() if ours in command and "torch.distributed.run" not in command]
    (other,) = (rank for rank in ranks if rank.pid != leader)
    other.kill()


def assert_alike(ours: dict[str, Any], theirs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The same runs with the same losses but for rounding, which 256 steps have not made more of than 1e-4."""
    assert ours.keys() == theirs.keys()
    for run, (head, lines, summary) in ours.items():
        assert (head["config"]["parallel"]["shard"], summary["outcome"]) == (2, "finished")
        worst = furthest(lines, theirs[run][1])
        with capsys.disabled():
            print(f"  run {run}: losses within {worst:.1e} of one process")
        assert worst < 1e-4


def furthest(lines: list[bytes], others: list[bytes]) -> float:
    """The largest relative difference of a loss; the lines must tell the same of the same steps."""
    worst = 0.0
    for line, other in zip(map(json.loads, lines), map(json.loads, others), strict=True):
        assert line.keys() == other.keys()
        assert (line["step"], line["tokens"]) == (other["step"], other["tokens"])
        losses = [key for key in line if key.startswith("loss/") and line[key] is not None]
        worst = max([worst, *(abs(line[key] / other[key] - 1) for key in losses)])
    return worst
