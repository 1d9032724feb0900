"""One training process of a local sweep: ``python -m disco.sweep.worker``.

It takes cohorts of runs, one at a time, as JSON lines on stdin, {"configs": [...], "runs": folder, "compiled": bool},
and answers with JSON lines on stdout, {"event": ...}: "ready"; "progress" (step, tokens of each run); of one run
"ended" (run, outcome) or "failed" (run, reason); at the end of a cohort "done", or "broken" (reason), "full" (reason:
the disk is, which is no fault of the runs) or "stopped".
{"stop": true} makes it leave the cohort that it is at, with checkpoints. The end of stdin means that the parent is
gone, whatever killed it: exit at once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from disco.errors import NoSpaceError, UserError
from disco.runs.schema import Outcome
from disco.train.config import TrainConfig, from_dict

Progress = Callable[[int, int], None]
Ended = Callable[[str, Outcome | UserError], None]
Reply = Callable[..., None]
"""Sends a message: its event, and its fields by name."""
Train = Callable[[list[TrainConfig], Path, Progress, Ended, bool], object]

REPORT_SECONDS = 0.5


class StoppedError(Exception):
    """Raised through the training loop's progress callback: leave the runs, checkpointed."""


class _Inbox:
    """Reads stdin in a thread, so that neither a stop nor the parent's death waits for a training step."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stop = threading.Event()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: BinaryIO) -> None:
        for line in stream:
            message = json.loads(line)
            if "stop" in message:
                self.stop.set()
                self._messages.put(None)
            else:
                self._messages.put(message)
        os._exit(0)

    def next(self) -> dict[str, Any] | None:
        """The next cohort; None once told to stop."""
        message = self._messages.get()
        return None if self.stop.is_set() else message


def serve(train: Train, commands: BinaryIO, replies: BinaryIO) -> None:
    """Trains what ``commands`` asks for until told to stop.

    Args:
        train: trains runs in a folder of runs, calls back with (step, tokens) after every step, and with each run's
            outcome; told whether to compile.
        commands: the stdin of the protocol above.
        replies: its stdout, unbuffered.
    """

    def reply(event: str, **fields: Any) -> None:
        try:
            replies.write(json.dumps({"event": event, **fields}).encode() + b"\n")
            replies.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent is gone

    inbox = _Inbox(commands)
    reply("ready")
    while order := inbox.next():
        try:
            attempt(train, order, reply, inbox.stop)
        except StoppedError:
            break
    reply("stopped")


def attempt(train: Train, order: Mapping[str, Any], reply: Reply, stop: threading.Event) -> None:
    """Trains one cohort, and tells how that goes, from "progress" to "done", "broken" or "full".

    Raises:
        StoppedError: ``stop`` was set; the runs have been left with checkpoints.
    """

    def ended(run: str, result: Outcome | UserError) -> None:
        if isinstance(result, NoSpaceError):
            raise result
        if isinstance(result, UserError):
            reply("failed", run=run, reason=_line(result))
        else:
            reply("ended", run=run, outcome=str(result))

    try:
        configs: list[TrainConfig] = [from_dict(TrainConfig, config) for config in order["configs"]]
        train(configs, Path(order["runs"]), _reporter(reply, stop), ended, order["compiled"])
        reply("done")
    except StoppedError:
        raise
    except NoSpaceError as error:
        reply("full", reason=str(error))
    except Exception as error:  # one bad run must not end the sweep: it is recorded as failed
        traceback.print_exc()
        reply("broken", reason=_line(error))


def _line(error: Exception) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _reporter(reply: Reply, stop: threading.Event) -> Progress:
    last = 0.0

    def progress(step: int, tokens: int) -> None:
        nonlocal last
        if stop.is_set():
            raise StoppedError
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last = now
            reply("progress", step=step, tokens=tokens)

    return progress


def main() -> None:
    """The worker process: stdout is for replies alone; what libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    import torch

    from disco.train.loop import train_cohort

    torch.set_num_threads(1)
    serve(train_cohort, sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
