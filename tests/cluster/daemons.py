"""A Slurm and a Ray cluster on this machine, with ports and folders of their own. Missing packages are installed.

Both fail (pytest.fail) with the reason where they cannot start.
"""

import getpass
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
CONF = """
ClusterName=disco
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Seen(NamedTuple):
    """A job as the scheduler showed it."""

    job: str
    state: str
    requeues: int


class _Daemons:
    """Processes in the foreground, ended in the reverse order."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="disco-"))
        self.folder.chmod(0o755)  # munge insists
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.environment = dict(os.environ)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        raise NotImplementedError

    def _daemon(self, *command: str, name: str = "") -> int:
        """Starts a process; returns its id."""
        name = name or command[0]
        log = self._stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        self._stack.callback(_end, process)
        return process.pid

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
                pytest.fail(f"{what} did not start within {START_SECONDS:g} seconds\n{logs}", pytrace=False)
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        """What a command answers."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""


class Slurm(_Daemons):
    """munged, slurmctld and slurmd with one node of one core, so that one of two jobs has to wait.

    Args:
        settings: more lines of slurm.conf.
    """

    def __init__(self, *settings: str) -> None:
        super().__init__()
        self.settings = settings

    def _start(self) -> None:
        if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
            _run("apt-get", "update", "-qq")
            _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge")
        if importlib.util.find_spec("submitit") is None:
            _pip("submitit")
        folder, self.host = self.folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        settings = {"host": self.host, "user": getpass.getuser(), "folder": folder, "cpus": 1}
        conf = CONF.format(controller=_port(), node=_port(), **settings)
        (folder / "slurm.conf").write_text("\n".join((conf, *self.settings, "")))
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / file}" for option, file in files.items()]
        self._daemon("munged", "--foreground", *options, f"--log-file={folder / 'munge.log'}")
        self._until((folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        self._stack.callback(self._clear)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%T") == "idle", "Slurm")

    def _clear(self) -> None:
        """Ends all jobs, whose processes would otherwise outlive the daemons."""
        deadline = time.monotonic() + START_SECONDS
        while (left := self.ask("squeue", "-h", "-o", "%A").split()) and time.monotonic() < deadline:
            self.ask("scancel", *left)
            time.sleep(0.2)

    def jobs(self) -> list[Seen]:
        """All jobs that Slurm knows."""
        lines = self.ask("squeue", "-h", "--array", "--states=all", "-O", "JobArrayID:|,State:|,RestartCnt:|")
        return [Seen(job, state, int(count)) for job, state, count, _ in (line.split("|") for line in lines.split())]


class Ray(_Daemons):
    """A head and a second node of one core each, with the job server that comes with ray[default]."""

    def _start(self) -> None:
        if importlib.util.find_spec("ray") is None:
            _pip("ray[default]")
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]  # `ray`, wherever it is
        port, dashboard = _port(), _port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
        common = ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
        head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        own = [f"--ray-client-server-port={_port()}", f"--temp-dir={self.folder}/ray"]
        agent = f"--dashboard-agent-listen-port={_port()}"
        self._daemon(*command, "start", *head, *own, *common, agent, name="head")
        self._until(lambda: self.nodes() == 1, "the head of Ray")
        agent = f"--dashboard-agent-listen-port={_port()}"
        self._second = self._daemon(*command, "start", f"--address=127.0.0.1:{port}", *common, agent, name="second")
        self._until(lambda: self.nodes() == 2, "the second node of Ray")

    def lose_node(self) -> None:
        """Kills everything on the second node, as when the machine is lost."""
        import psutil

        node = psutil.Process(self._second)
        for process in [node, *node.children(recursive=True)]:
            process.kill()

    def nodes(self) -> int:
        """Nodes that are alive."""
        from ray.util.state import list_nodes

        try:
            return len(list_nodes(self.address, filters=[("state", "=", "ALIVE")], timeout=5))
        except Exception:  # not yet: several kinds of errors, of several libraries
            return 0

    def jobs(self) -> list[Seen]:
        """All jobs that Ray knows; the attempts at one are jobs of their own."""
        from ray.job_submission import JobSubmissionClient

        found = JobSubmissionClient(self.address).list_jobs()
        attempts = [(str(job.submission_id).partition(".r"), str(job.status.value)) for job in found]
        return [Seen(job, state, int(number or 0)) for (job, _, number), state in attempts]


def _port() -> int:
    """A port that is free, outside of those that Ray's workers take."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port > 20000:
            return port


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(*command: str) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines: Sequence[str] = (done.stderr or done.stdout).strip().splitlines()[-3:]
        pytest.fail(f"{' '.join(command)} failed: {' '.join(lines)}", pytrace=False)


def _pip(requirement: str) -> None:
    _run(sys.executable, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), requirement)
