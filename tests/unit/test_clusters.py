"""Settings of schedulers, what is made of them for sbatch and Ray, and what their answers mean."""

import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disco.cli import main
from disco.runs.lock import LOCK, locked
from disco.sweep.clusters import RayConfig, SlurmConfig, read_cluster
from disco.sweep.engines._queue import JobState, Phase, QueueError
from disco.sweep.engines.ray import RayQueue
from disco.sweep.engines.slurm import SlurmQueue, _own_id, _rendezvous
from disco.sweep.record import Queued, write_plan, write_queued
from disco.sweep.study import Study
from disco.train.config import ConfigError, DataConfig, ModelConfig, TrainConfig

DATA = DataConfig(digest="d" * 8, vocab=256)
MODEL = ModelConfig(width=16, depth=1, head_size=8, context=64)


def test_settings_are_checked() -> None:
    table = {"slurm": {"partition": "gpu", "time": 90, "memory": 2.5, "setup": ["module load gcc"]}}
    config = read_cluster("slurm", table)
    assert config == SlurmConfig(partition="gpu", time=90, memory=2.5, setup=("module load gcc",))
    assert config.memory_bytes == 2.5 * 2**30
    assert read_cluster("ray", table) == RayConfig()
    for engine, bad, said in (
        ("slurm", {"partion": "gpu"}, "unknown key 'slurm.partion'; did you mean 'partition'?"),
        ("slurm", {"time": "an hour"}, "slurm.time must be a number such as"),
        ("slurm", {"time": 1, "warning": 60}, "slurm.warning must lie within the time, got 60 seconds"),
        ("slurm", {"options": ["--exclusive"]}, "slurm.options are without dashes"),
        ("slurm", {"partition": 3}, "slurm.partition must be str, got 3"),
        ("ray", {"jobs": 0}, "ray.jobs must be 1 or more, got 0"),
        ("ray", {"processes": 0}, "ray.processes must be 1 or more, got 0"),
        ("slurm", {"nodes": 0}, "slurm.nodes must be 1 or more, got 0"),
        ("ray", {"nodes": 2}, "unknown key 'ray.nodes'"),
        ("ray", {"memory": 0}, "ray.memory is a number of GiB, got 0"),
        ("ray", 3, "ray must be a table, got 3"),
    ):
        with pytest.raises(ConfigError) as error:
            read_cluster(engine, {engine: bad})
        assert str(error.value).startswith(said)


def test_a_study_file_is_checked_for_all_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "study.toml"
    study.write_text('[base]\nhorizon = 65536\nmodel = { context = 64 }\nbatch = 64\n[slurm]\nacount = "a"\n')
    assert main(["sweep", "run", str(study), "--dry-run"]) == 2
    assert f"{study}: unknown key 'slurm.acount'; did you mean 'account'?" in capsys.readouterr().err


def test_sizes_that_do_not_fit_a_job_are_said_before_anything_is_submitted(
    commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = tmp_path / "study.toml", tmp_path / "out"
    base = "[base]\nhorizon = 8192\nbatch = 256\nmodel = { context = 64 }\nparallel = { shard = 2 }\n"
    study.write_text(f"{base}[slurm]\nprocesses = 2\nnodes = 2\n")
    assert main(["sweep", "run", str(study), "--out", str(out), "--engine", "slurm"]) == 2
    assert capsys.readouterr().err == (
        f"disco: error: {study}: parallel.replicate x shard x tensor is 1 x 2 x 1 = 2, but slurm.nodes x "
        "slurm.processes is 2 x 2 = 4; make them the same\n"
    )
    assert not out.exists()
    assert not (commands / "called").exists()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH for commands that stand in for Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    command(folder, "srun", "")
    command(folder, "sbatch", "echo Submitted batch job 7")
    return folder


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$0" "$@" >> {folder}/called\n{script}\n')
    path.chmod(0o755)


def called(folder: Path) -> list[list[str]]:
    return [line.removeprefix(f"{folder}/").split() for line in (folder / "called").read_text().splitlines()]


def test_sbatch_gets_every_setting(commands: Path, tmp_path: Path) -> None:
    config = SlurmConfig(
        account="a1", partition="p", constraint="c", time=90, warning=30, cpus=2, gpus=1, memory=1.5,
        setup=("module load gcc",), options=("reservation=r", "exclusive"),
    )  # fmt: skip
    orders = [tmp_path / f"disco-1.{index}.json" for index in range(3)]
    SlurmQueue(config).submit("disco-1", orders)
    script = (tmp_path / "7_submission.sh").read_text()
    for line in (
        "--job-name=disco-1", "--account=a1", "--partition=p", "--constraint=c", "--time=90", "--signal=USR2@30",
        "--cpus-per-task=2", "--gpus-per-node=1", "--mem=1536MB", "--requeue", "--reservation=r", "--exclusive",
        "--array=0-2%3",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--qos" not in script
    setup = script.partition("# setup\n")[2].splitlines()
    assert setup[0] == "module load gcc"
    assert "export OMP_NUM_THREADS=2" in setup


def test_jobs_of_several_nodes_and_processes(commands: Path, tmp_path: Path) -> None:
    config = SlurmConfig(nodes=3, processes=4, cpus=2, gpus=4)
    assert config.world == 12
    SlurmQueue(config).submit("disco-1", [tmp_path / "disco-1.0.json"])
    script = (tmp_path / "7_submission.sh").read_text()
    for line in ("--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=8", "--gpus-per-node=4"):
        assert f"#SBATCH {line}\n" in script
    assert "export OMP_NUM_THREADS=2\n" in script
    (launchers,) = (line for line in script.splitlines() if line.startswith("srun "))
    assert " --cpus-per-task=8 " in launchers


def test_nodes_of_a_job_meet_at_the_first(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(commands, "scontrol", "echo gpu7; echo gpu9")
    settings = {"JOB_NUM_NODES": "1", "NODEID": "0", "JOB_NODELIST": "gpu[7,9]", "JOB_ID": "1234567"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert _rendezvous(0) == ("--standalone",)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    both = ["--nnodes=2", "--node-rank=1", "--master-addr=gpu7", "--master-port=24567"]
    assert list(_rendezvous(1)) == both
    assert called(commands)[-1] == ["scontrol", "show", "hostnames", "gpu[7,9]"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # the port may have been taken
    assert list(_rendezvous(0)) == [*both[:1], "--node-rank=0", "--master-addr=gpu7", "--master-port=24769"]


def test_what_sbatch_says_is_the_reason(commands: Path, tmp_path: Path) -> None:
    command(commands, "sbatch", 'case "$1" in --version) exit 0;; esac\necho "sbatch: error: QOSMaxSubmit" >&2\nexit 1')
    queue = SlurmQueue(SlurmConfig())
    with pytest.raises(QueueError, match=r"^Slurm refused 2 jobs: sbatch: error: QOSMaxSubmit$"):
        queue.submit("disco-1", [tmp_path / "disco-1.0.json", tmp_path / "disco-1.1.json"])


SQUEUE = """cat <<EOF
disco-1|12_0|0|RUNNING|None|2|0|
disco-1|12_1|1|PENDING|Resources|0|0|
disco-1|12_2|2|FAILED|NonZeroExitCode|1|35072|
disco-1|12_3|3|CANCELLED|None|0|15|
disco-2|13|N/A|OUT_OF_MEMORY|OutOfMemory|0|32000|
disco-2|14|9|COMPLETING|None|0|0|
EOF"""


def test_states_of_slurm(commands: Path) -> None:
    command(commands, "squeue", SQUEUE)
    command(commands, "scancel", "")
    command(commands, "scontrol", 'echo "Requeue is disabled" >&2; exit 1')
    queue = SlurmQueue(SlurmConfig())
    keys = [f"disco-1.{index}" for index in range(5)] + ["disco-2.0"]
    states = queue.states(keys)
    assert states == {
        "disco-1.0": JobState(id="12_0", phase=Phase.RUNNING, word="RUNNING", requeues=2),
        "disco-1.1": JobState(id="12_1", phase=Phase.QUEUED, word="PENDING", reason="Resources"),
        "disco-1.2": JobState(id="12_2", phase=Phase.ENDED, word="FAILED", reason="exit code 137", requeues=1),
        "disco-1.3": JobState(id="12_3", phase=Phase.CANCELLED, word="CANCELLED"),
        "disco-2.0": JobState(id="13", phase=Phase.ENDED, word="OUT_OF_MEMORY", reason="OutOfMemory"),
    }
    assert str(states["disco-1.2"]) == "FAILED (exit code 137)"
    assert "--name=disco-1,disco-2" in called(commands)[-1]
    queue.cancel(keys)
    assert called(commands)[-1] == ["scancel", "12_0", "12_1"]
    with pytest.raises(QueueError, match=r"^Slurm: Requeue is disabled$"):
        queue.requeue("disco-1.2", Path("disco-1.2.json"))
    assert called(commands)[-1] == ["scontrol", "requeue", "12_2"]
    with pytest.raises(QueueError, match=r"^Slurm has forgotten job disco-1.4$"):
        queue.requeue("disco-1.4", Path("disco-1.4.json"))


def test_a_job_of_an_array_never_means_the_whole_array(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_JOB_ID", "12"), ("SLURM_ARRAY_JOB_ID", "12"), ("SLURM_ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(name, value)
    assert _own_id() == "12_3"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    assert _own_id() == "12"


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QueueError, match="Slurm is not here: there is no command sbatch"):
        SlurmQueue(SlurmConfig())


class Client:
    """The interface of ray.job_submission.JobSubmissionClient that is used."""

    def __init__(self, address: str) -> None:
        if "nowhere" in address:
            raise ConnectionError("Failed to connect to Ray\nand more")
        self.jobs: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []

    def submit_job(self, **options: Any) -> None:
        if options["submission_id"].endswith(".2"):
            raise RuntimeError("Request failed with status code 500")
        self.asked.append(options)
        status = SimpleNamespace(value="PENDING")
        details = SimpleNamespace(submission_id=options["submission_id"], status=status, message="Waits. For room.")
        self.jobs[options["submission_id"]] = details

    def list_jobs(self) -> list[Any]:
        return [*self.jobs.values(), SimpleNamespace(submission_id=None, status=None, message=None)]

    def stop_job(self, job: str) -> None:
        self.jobs[job].status.value = "STOPPED"


@pytest.fixture
def _ray(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("ray.job_submission")
    module.JobSubmissionClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.job_submission", module)


@pytest.mark.usefixtures("_ray")
def test_ray() -> None:
    queue = RayQueue(RayConfig(processes=3, cpus=2, memory=1, address="http://here:1"))
    client: Client = queue._client  # type: ignore[assignment]
    queue.submit("disco-1", [Path("/o/disco-1.0.json"), Path("/o/disco-1.1.json")])
    assert client.asked[0]["entrypoint"].endswith("-m disco.sweep.engines.task /o/disco-1.0.json")
    assert (client.asked[0]["entrypoint_num_cpus"], client.asked[0]["entrypoint_memory"]) == (6, 2**30)
    assert client.asked[0]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    pending = JobState(id="disco-1.0", phase=Phase.QUEUED, word="PENDING", reason="Waits")
    assert queue.states(["disco-1.0", "disco-9.0"]) == {"disco-1.0": pending}
    client.jobs["disco-1.0"].status.value = "FAILED"
    for count in (1, 2):
        queue.requeue("disco-1.0", Path("/o/disco-1.0.json"))
        again = f"disco-1.0.r{count}"
        state = JobState(id=again, phase=Phase.QUEUED, word="PENDING", reason="Waits", requeues=count)
        assert queue.states(["disco-1.0"]) == {"disco-1.0": state}
    queue.cancel(["disco-1.0"])
    assert queue.states(["disco-1.0"])["disco-1.0"].phase == Phase.CANCELLED
    assert client.jobs["disco-1.1"].status.value == "PENDING"
    with pytest.raises(QueueError, match=r"^Ray has forgotten job disco-9\.0$"):
        queue.requeue("disco-9.0", Path("/o/disco-9.0.json"))
    with pytest.raises(QueueError, match=r"^Ray refused a job: Request failed with status code 500$"):
        queue.submit("disco-2", [Path(f"/o/disco-2.{index}.json") for index in range(3)])
    assert {client.jobs[f"disco-2.{index}"].status.value for index in (0, 1)} == {"STOPPED"}
    with pytest.raises(QueueError, match=r"^no Ray cluster answers at http://nowhere: Failed to connect to Ray$"):
        RayQueue(RayConfig(address="http://nowhere"))


def test_status_joins_records_and_scheduler(commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(commands, "squeue", SQUEUE)
    configs = [TrainConfig(model=MODEL, data=DATA, batch=64, horizon=640, seed=seed) for seed in range(4)]
    write_plan(Study("s", tuple(configs)), tmp_path)
    first, second, third, fourth = (config.id for config in configs)
    jobs = {"disco-1.0": (first,), "disco-1.1": (second,), "disco-1.2": (third,)}
    write_queued(tmp_path, Queued("slurm", {"partition": "p"}, jobs))
    assert main(["sweep", "status", str(tmp_path), "--json"]) == 0
    runs = {run["run"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert [runs[run]["state"] for run in (first, second, third, fourth)] == ["running", "queued", "waiting", "waiting"]
    assert (runs[first]["job"], runs[first]["scheduler"], runs[first]["requeues"]) == ("12_0", "RUNNING", 2)
    assert runs[second]["reason"] == "Resources"
    assert runs[third]["scheduler"] == "FAILED"
    command(commands, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert main(["sweep", "status", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    assert "Unable to contact slurm controller; the states of 3 jobs are unknown" in printed.err
    assert {run["state"] for run in json.loads(printed.out)["runs"]} == {"waiting"}


def test_cancel_of_a_sweep_that_does_not_run_or_runs_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "cancel", str(tmp_path)]) == 2
    config = TrainConfig(model=MODEL, data=DATA, batch=64, horizon=640)
    write_plan(Study("s", (config,)), tmp_path)
    assert main(["sweep", "cancel", str(tmp_path)]) == 0
    assert "study s: nothing to stop, 1 runs left" in capsys.readouterr().out
    with locked(tmp_path / LOCK):
        (tmp_path / LOCK).write_text("1\n")  # as a process of another machine has written
        assert main(["sweep", "cancel", str(tmp_path)]) == 2
    assert "process 1 on another machine trains the sweep" in capsys.readouterr().err
