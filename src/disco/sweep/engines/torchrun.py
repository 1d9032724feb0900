"""A job of several processes: one run, trained by what torchrun starts on the nodes of the job.

On each node a launcher runs torchrun and takes the signals. The processes that train are deaf to them; they look after
every step whether the launcher has left a file in a folder of its own, so that no signal is lost or reaches only some,
however it was sent. One that sees it is enough for all to save and leave.

    python -m torch.distributed.run ... -m disco.sweep.engines.torchrun <order> <folder> <launcher's process id>
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disco.sweep.worker import Ended, Progress, Stop, StoppedError, attempt
from disco.train.config import TrainConfig

if TYPE_CHECKING:
    from disco.train.team import Team

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send when a job is to leave."""
STANDALONE = ("--standalone",)
"""Options of torchrun for a job on one node."""
STOP, STOPPED = "stop", "stopped"
"""Files in the launcher's folder: it tells the processes to stop; they have."""


def launch(order: Path, processes: int, rendezvous: Sequence[str], stop: Stop) -> bool:
    """Trains what ``order`` says with ``processes`` on this node and those that other nodes have.

    Args:
        order: <key>.json, see ``task.py``.
        processes: of this node.
        rendezvous: options by which the nodes' torchruns find each other.
        stop: says whether to save and leave.

    Returns:
        Whether they left before the end of the run, with a checkpoint.

    Raises:
        RuntimeError: a process died.
    """
    with tempfile.TemporaryDirectory(prefix="disco-") as name:
        folder = Path(name)
        process = subprocess.Popen(command(order, processes, rendezvous, folder), preexec_fn=_deaf)
        while (code := process.poll()) is None:
            if stop.is_set():
                (folder / STOP).touch()
            time.sleep(0.1)
        if code:
            raise RuntimeError(f"torchrun ended with exit code {code}")
        return (folder / STOPPED).exists()


def command(order: Path, processes: int, rendezvous: Sequence[str], folder: Path) -> list[str]:
    """The command line of torchrun on one node."""
    options = [*rendezvous, f"--nproc-per-node={processes}", "--signals-to-handle=SIGINT"]
    ours = [__name__, str(order), str(folder), str(os.getpid())]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", *ours]


def _deaf() -> None:
    """Has a new process, and all that it starts, ignore the signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Told:
    """Whether the launcher of any node has told its processes to stop, or is gone. All of them ask together."""

    team: Team

    def __init__(self, folder: Path, launcher: int) -> None:
        self._file, self._launcher = folder / STOP, launcher

    def is_set(self) -> bool:
        return self.team.agree(self._file.exists() or not _lives(self._launcher))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False


def main(order: Path, folder: Path, launcher: int) -> None:
    """One of the processes. The first one of all says what a worker says (``sweep/worker.py``).

    Raises:
        RuntimeError: a collective failed, as when another process has died; the job dies of it and is started again.
    """
    import torch

    from disco.train.loop import train_cohort
    from disco.train.team import started

    content = json.loads(order.read_bytes())
    torch.set_num_threads(content["threads"])
    told = _Told(folder, launcher)

    def train(configs: list[TrainConfig], runs: Path, progress: Progress, ended: Ended, compiled: bool) -> None:
        with started(configs[0]) as told.team:
            train_cohort(configs, runs, progress, ended, compiled, told.team)

    with Path(order.with_suffix(".jsonl") if os.environ["RANK"] == "0" else os.devnull).open("ab", 0) as messages:

        def reply(event: str, **fields: Any) -> None:
            messages.write(json.dumps({"event": event, **fields}).encode() + b"\n")

        reply("ready")
        try:
            attempt(train, content, reply, told, fatal=(RuntimeError,))
        except StoppedError:
            reply("stopped")
            (folder / STOPPED).touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
