"""What a sweep shows while it runs: a bar on a terminal, plain lines in a log, JSON lines for machines. No torch."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from disco.runs.units import duration, short

LINE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where a sweep stands. Tokens are those that the sweep's runs train on, in all and so far."""

    runs: int
    ended: int
    running: int
    diverged: int
    pruned: int = 0
    failed: int
    tokens: int
    done: int
    tokens_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        counts = {"diverged": self.diverged, "pruned": self.pruned, "failed": self.failed}
        trouble = "".join(f", {n} {word}" for word, n in counts.items() if n)
        speed = f", {short(self.tokens_per_second)} tokens/s" if math.isfinite(self.tokens_per_second) else ""
        left = f", {duration(self.seconds_left)} left" if self.ended < self.runs else ""
        return f"{self.ended}/{self.runs} runs{trouble}{speed}{left}"


class Display(Protocol):
    """Shows the progress of a sweep."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, snapshot: Snapshot) -> None:
        """Called a few times a second."""

    def ended(self, run: str, outcome: str, reason: str) -> None:
        """A run ended."""

    def say(self, text: str) -> None:
        """Anything else worth a line."""


class Lines:
    """Plain lines: the state every ten seconds, and what went wrong when it did."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._last = -math.inf
        self._state: Snapshot | None = None
        self._written: Snapshot | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state is not None and self._state != self._written:
            self._write(self._state)

    def update(self, snapshot: Snapshot) -> None:
        """One line every ten seconds."""
        self._state = snapshot
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last, self._written = time.monotonic(), snapshot
            self._write(snapshot)

    def ended(self, run: str, outcome: str, reason: str) -> None:
        """One line for a run that did not finish."""
        if outcome != "finished":
            self.say(f"run {run} {outcome}: {reason}")

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self.stream, flush=True)

    def _write(self, snapshot: Snapshot) -> None:
        self.say(str(snapshot))


class JsonLines(Lines):
    """The same for machines: {"event": "progress" | "ended" | "note", ...} on stdout, and every run's end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream or sys.stdout)

    def ended(self, run: str, outcome: str, reason: str) -> None:
        """One line for every run."""
        self._event("ended", run=run, outcome=outcome, reason=reason)

    def say(self, text: str) -> None:
        """A note."""
        self._event("note", text=text)

    def _write(self, snapshot: Snapshot) -> None:
        numbers = asdict(snapshot).items()
        self._event("progress", **{key: value for key, value in numbers if math.isfinite(value)})

    def _event(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self.stream, flush=True)


class Bar:
    """A progress bar for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("starting")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, snapshot: Snapshot) -> None:
        """Moves the bar."""
        text = str(snapshot)
        self._progress.update(self._task, completed=snapshot.done, total=snapshot.tokens, description=text)

    def ended(self, run: str, outcome: str, reason: str) -> None:
        """One line above the bar for a run that failed; diverged ones are counted in it."""
        if outcome == "failed":
            self.say(f"run {run} failed: {reason}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)


def display(as_json: bool = False) -> Display:
    """The display for where the output goes."""
    if as_json:
        return JsonLines()
    return Bar() if sys.stderr.isatty() else Lines()
