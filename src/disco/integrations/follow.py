"""Trackers follow run records: new lines of metrics.jsonl go to them, from a process of its own. No torch.

The record is the source, and each tracker says itself how far it is. So whatever was killed, whoever wrote the record
and on which machine, the next follower goes on where the last one stopped: nothing twice, nothing left out. A tracker
that fails costs a warning; the record goes on, and a later follower catches up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from disco.errors import UserError
from disco.integrations.trackers import TRACKERS, Head, Line, Tracker, chosen
from disco.runs.lock import BusyError, locked
from disco.runs.reader import read_summary, run_folders
from disco.runs.schema import CONFIG, METRICS, Metric

POLL_SECONDS = 1.0
"""Between two looks at the records."""
RETRY_SECONDS = 60.0
"""After a tracker has failed."""
FINISH_SECONDS = 60.0
"""How long a command waits for its follower to send the rest."""
HANDOVER_SECONDS = 10.0
"""How long the last look waits for the follower of a command that was killed."""


class _Followed:
    """One run and one tracker."""

    def __init__(self, folder: Path, name: str, where: str) -> None:
        self.folder, self.name, self.where = folder, name, where
        self.tracker: Tracker | None = None
        self.read = 0
        """Bytes of the record whose lines the tracker has."""
        self._held = ExitStack()

    def advance(self, wait: float) -> None:
        """Sends what is new; ends the run in the tracker when it has ended in its record.

        Args:
            wait: seconds to wait for another process that sends it.

        Raises:
            BusyError: another process sends it.
            Exception: whatever the tracker raises.
        """
        summary = read_summary(self.folder)  # before the lines: then they are all there
        lines, end = self._new()
        if lines:
            tracker = self.tracker = self.tracker or self._open(wait)
            behind = [line for line in lines if line[Metric.STEP] > tracker.last]
            if behind:
                tracker.log(behind)
        self.read = end
        if summary is not None:
            self.close(summary)

    def _open(self, wait: float) -> Tracker:
        self._held.enter_context(locked(self.folder / f"{self.name}.lock", wait))
        config = json.loads((self.folder / CONFIG).read_bytes())["config"]
        return TRACKERS[self.name](Head(self.folder.resolve(), config), self.where)

    def _new(self) -> tuple[list[Line], int]:
        """Complete lines behind ``read``, and where they end.

        A run that was resumed has cut its record, which may have grown beyond ``read`` since: then what is there does
        not begin with a line, and all of it is read again.
        """
        path = self.folder / METRICS
        size = path.stat().st_size if path.exists() else 0
        if size == self.read:
            return [], size
        for begin in (self.read if size > self.read else 0, 0):
            with path.open("rb") as file:
                file.seek(begin)
                text = file.read()
            text = text[: text.rfind(b"\n") + 1]
            lines = [_line(line) for line in text.splitlines()]
            if begin == 0 or not lines or lines[0] is not None:
                break
        return [line for line in lines if line is not None], begin + len(text)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Closes the tracker, if it is open."""
        tracker, self.tracker = self.tracker, None
        try:
            if tracker is not None:
                tracker.close(summary)
        finally:
            self._held.close()

    def drop(self) -> None:
        """After a failure: everything is read again next time."""
        self.read = 0
        with suppress(Exception):
            self.close()


def _line(text: bytes) -> Line | None:
    """A line of metrics; None if it is none, which the reader of records reports."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get(Metric.STEP), int | float) else None


class Follower:
    """Sends the runs in ``paths``, also those that come into being, to trackers.

    Args:
        paths: run folders, or folders of them.
        trackers: tracker -> where, see ``trackers.chosen``.
        warn: told once of each tracker that fails.
    """

    def __init__(self, paths: Sequence[Path], trackers: Mapping[str, str], warn: Callable[[str], None]) -> None:
        self.paths, self.trackers, self.warn = paths, trackers, warn
        self._followed: dict[tuple[Path, str], _Followed] = {}
        self._rests: dict[str, float] = {}
        """When a tracker that has failed is tried again."""

    def poll(self, last: bool = False) -> bool:
        """Sends what is new; the last time also to trackers that have failed before. Returns whether all is sent."""
        failed: set[str] = set()
        complete = True
        for folder in self._folders():
            for name, where in self.trackers.items():
                if name in failed or (time.monotonic() < self._rests.get(name, 0.0) and not last):
                    complete = False
                    continue
                followed = self._followed.setdefault((folder, name), _Followed(folder, name, where))
                try:
                    followed.advance(HANDOVER_SECONDS if last else 0.0)
                except BusyError:
                    complete = False
                except Exception as error:  # of a tracker's library: anything
                    complete = False
                    failed.add(name)
                    self._fail(name, error)
        return complete

    def close(self) -> None:
        """Closes all trackers; runs that have not ended stay open for the next follower."""
        for followed in self._followed.values():
            try:
                followed.close()
            except Exception as error:
                self._fail(followed.name, error)

    def _folders(self) -> list[Path]:
        found: list[Path] = []
        for path in self.paths:
            with suppress(UserError):  # no run yet
                found += run_folders(path)
        return found

    def _fail(self, name: str, error: Exception) -> None:
        for (_, other), followed in self._followed.items():
            if other == name:
                followed.drop()
        if name not in self._rests:
            self.warn(f"{name}: {_reason(name, error)}")
        self._rests[name] = time.monotonic() + RETRY_SECONDS


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return f"the package {name} is not installed: pip install 'disco-scion[trackers]'"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def send(paths: Sequence[Path], track: str, follow: bool = False) -> int:
    """Sends the records in ``paths`` to trackers; with ``follow`` until Ctrl-C. Returns the number of runs.

    Raises:
        UserError: no runs, no such tracker, one that fails, or another process that sends the same runs.
    """
    folders = [folder for path in paths for folder in run_folders(path)]

    def fail(reason: str) -> None:
        raise UserError(reason)

    follower = Follower(paths, chosen(track), _warn if follow else fail)
    try:
        complete = follower.poll(last=True)
        while follow:
            time.sleep(POLL_SECONDS)
            follower.poll()
    except KeyboardInterrupt:
        follower.poll(last=True)
    finally:
        follower.close()
    if not complete and not follow:
        raise UserError("another process sends these runs to the same tracker; it will do the rest")
    return len(folders)


def _warn(text: str) -> None:
    print(f"disco: warning: {text} (records are complete without)", file=sys.stderr, flush=True)


@contextmanager
def following(path: Path, track: str) -> Iterator[None]:
    """Within the block, and until all is sent, trackers follow the runs in ``path``; nothing happens without ``track``.

    They do so in a process of their own, which neither a slow tracker nor the death of this process disturbs. Of a run
    on many devices only the first process has one.

    Args:
        path: a run's folder or a folder of runs, which need not exist yet.
        track: trackers, such as ``tensorboard,wandb:my-project``.

    Raises:
        UserError: no such tracker.
    """
    if not track or os.environ.get("RANK", "0") != "0":
        yield
        return
    chosen(track)
    command = [sys.executable, "-m", "disco.integrations.follow", str(path), track]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        try:
            if process.wait(timeout=FINISH_SECONDS):
                _warn(f"what sends to {track} ended early; disco runs track {path} --to {track} does the rest")
        except subprocess.TimeoutExpired:
            _warn(f"{track} takes long; process {process.pid} sends the rest by itself")


def main() -> None:
    """``following``'s process: arguments are its own. It ends some time after its standard input."""
    import signal

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
