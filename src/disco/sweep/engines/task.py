"""What a job of a cluster does: trains one cohort, ``python -m disco.sweep.engines.task <jobs>/<key>.json``.

It appends to <key>.jsonl the messages that a worker sends (``sweep/worker.py``), "ready" at each start, and prints to
<key>.log. Told to stop by a signal it leaves the runs with checkpoints. Where it has several processes, ``torchrun.py``
has what they do.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disco.sweep.engines.torchrun import SIGNALS, STANDALONE, launch
from disco.sweep.worker import StoppedError, Train, attempt


def perform(
    order: Path, train: Train | None = None, node: int = 0, rendezvous: Sequence[str] = STANDALONE
) -> list[int]:
    """Trains what ``order`` says.

    Args:
        order: <key>.json, what a worker is told, "threads", the number for torch, and "processes" on each of "nodes".
        train: what trains, in this process; ``train.loop.train_cohort`` if not given.
        node: which of the job's nodes this is.
        rendezvous: how the torchruns of several find each other.

    Returns:
        The signals that stopped it; none if it came to its end.

    Raises:
        RuntimeError: one of several processes died.
    """
    stop, received = threading.Event(), []

    def told(number: int, _: object) -> None:
        received.append(number)
        stop.set()

    for number in SIGNALS:
        signal.signal(number, told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with order.with_suffix(f".{node}.log" if node else ".log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    content = json.loads(order.read_bytes())
    if train is None and content["nodes"] * content["processes"] > 1:
        return received if launch(order, content["processes"], rendezvous, stop) else []
    if train is None:
        import torch

        from disco.train.loop import train_cohort

        torch.set_num_threads(content["threads"])
        train = train_cohort
    with order.with_suffix(".jsonl").open("ab", buffering=0) as messages:

        def reply(event: str, **fields: Any) -> None:
            messages.write(json.dumps({"event": event, **fields}).encode() + b"\n")

        reply("ready")
        try:
            attempt(train, content, reply, stop)
            return []
        except StoppedError:
            reply("stopped")
            return received


if __name__ == "__main__":
    perform(Path(sys.argv[1]))
