"""Sends run records to trackers: once, until Ctrl-C, or beside a command, from a process of its own. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from disco.errors import UserError
from disco.integrations.follower import Follower
from disco.integrations.trackers import chosen
from disco.runs.reader import run_folders

POLL_SECONDS = 1.0
"""Between two looks at the records."""
FINISH_SECONDS = 60.0
"""How long a command waits for its follower to send the rest."""
LEAVE_SECONDS = 5.0
"""The same after an error or a signal: who sent it may not wait long."""


def send(paths: Sequence[Path], track: str, follow: bool = False) -> int:
    """Sends the records in ``paths`` to trackers; with ``follow`` until Ctrl-C. Returns the number of runs.

    Raises:
        UserError: no runs, no such tracker, one that fails, a record that cannot be read, or another process that sends
            the same runs; what can be sent was.
    """
    folders = [folder for path in paths for folder in run_folders(path)]
    problems: list[str] = []
    follower = Follower(paths, chosen(track), _warn if follow else problems.append)
    complete = False
    try:
        complete = follower.poll(last=True)
        while follow:
            time.sleep(POLL_SECONDS)
            follower.poll()
    except KeyboardInterrupt:
        if not follow:
            raise
        follower.poll(last=True)
    finally:
        follower.close()
    if problems:
        raise UserError("; ".join(problems))
    if not follow and not complete:
        raise UserError("another process sends these runs to the same tracker; it will do the rest")
    return len(folders)


def _warn(text: str) -> None:
    print(f"disco: warning: {text} (records are complete without)", file=sys.stderr, flush=True)


@contextmanager
def following(path: Path, track: str) -> Iterator[None]:
    """Within the block, and until all is sent, trackers follow the runs in ``path``; nothing happens without ``track``.

    They do so in a process of their own, which neither a slow tracker nor the death of this process disturbs. Of a run
    on many devices only one process calls this.

    Args:
        path: a run's folder or a folder of runs, which need not exist yet.
        track: trackers, such as ``tensorboard,wandb:my-project``.

    Raises:
        UserError: no such tracker.
    """
    if not track:
        yield
        return
    chosen(track)
    command = [sys.executable, "-m", "disco.integrations.follow", str(path), track]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    seconds = LEAVE_SECONDS
    try:
        yield
        seconds = FINISH_SECONDS
    finally:
        process.stdin.close()
        try:
            if process.wait(timeout=seconds):
                _warn(f"what sends to {track} ended early; disco runs track {path} --to {track} does the rest")
        except subprocess.TimeoutExpired:
            _warn(f"{track} takes long; process {process.pid} sends the rest by itself")


def main() -> None:
    """``following``'s process: arguments are its own. It ends some time after its standard input."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the command, which then closes the input
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    follower = Follower([Path(sys.argv[1])], chosen(sys.argv[2]), _warn)
    while not ended.wait(POLL_SECONDS):
        follower.poll()
    follower.poll(last=True)
    follower.close()


if __name__ == "__main__":
    main()
