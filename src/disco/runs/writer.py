"""Writes the record of one run so that whatever is killed, the record can be read and continued. No torch.

A line of metrics leaves the process as soon as it is written; config and summary appear whole or not at all. A
checkpoint stores ``RunWriter.offset``; on resume the lines after it, which the killed process had written, are cut off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from disco.errors import UserError
from disco.files import replacing, unwritable
from disco.runs.schema import CONFIG, METRICS, SCHEMA_VERSION, SUMMARY, Outcome


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces ``path`` by ``content`` as JSON in one step, durably: readers see the old file or the new one, whole.

    Raises:
        UserError: the file cannot be written.
        ValueError: ``content`` holds a number that is not finite.
    """
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


class RunWriter:
    """The record of one run, as it grows. ``start``, then ``resume`` if there is a checkpoint, ``append``, ``finish``.

    Without ``resume`` the metrics begin empty, whatever an earlier attempt left behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._metrics: FileIO | None = None

    def start(self, document: Mapping[str, Any]) -> None:
        """Makes the folder and writes config.json; rewrites it when a run is continued to a longer horizon.

        Raises:
            UserError: the folder cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        write_json(self.folder / CONFIG, document)

    def resume(self, offset: int) -> None:
        """Truncates the metrics to ``offset`` bytes and removes the summary: the run is unfinished again.

        Raises:
            UserError: the metrics cannot be written, or are shorter than ``offset``: lines that the checkpoint relies
                on are lost.
        """
        self.close()
        try:
            metrics = (self.folder / METRICS).open("ab", buffering=0)
        except OSError as error:
            raise unwritable(self.folder / METRICS, error) from error
        size = metrics.tell()
        if size < offset:
            metrics.close()
            raise UserError(
                f"{self.folder / METRICS} has {size} bytes but its checkpoint needs {offset}: "
                f"lines were lost; delete {self.folder} to start the run over"
            )
        (self.folder / SUMMARY).unlink(missing_ok=True)
        metrics.truncate(offset)
        metrics.seek(offset)
        self._metrics = metrics

    def append(self, line: Mapping[str, float]) -> None:
        """Adds one line. Values that are not finite are left out: missing is missing.

        Raises:
            UserError: it cannot be written; a part of it may be there, which the next ``resume`` cuts off.
        """
        if self._metrics is None:
            self.resume(0)
        assert self._metrics is not None
        measured = {str(key): value for key, value in line.items() if math.isfinite(value)}
        left = json.dumps(measured, sort_keys=True, allow_nan=False).encode() + b"\n"
        try:
            while left:
                left = left[self._metrics.write(left) :]
        except OSError as error:
            raise unwritable(self.folder / METRICS, error) from error

    @property
    def offset(self) -> int:
        """Bytes of metrics so far, all of them on disk when this returns; what a checkpoint stores."""
        self._sync()
        return self._metrics.tell() if self._metrics is not None else 0

    def _sync(self) -> None:
        if self._metrics is not None and not self._metrics.closed:
            try:
                os.fsync(self._metrics.fileno())
            except OSError as error:
                raise unwritable(self.folder / METRICS, error) from error

    def finish(self, outcome: Outcome, reason: str = "", **fields: Any) -> None:
        """Writes summary.json, once, after all metrics are on disk; ``fields`` such as step, tokens, parent.

        Numbers that are not finite are left out.
        """
        self._sync()
        known = {k: v for k, v in fields.items() if not isinstance(v, float) or math.isfinite(v)}
        header = {"schema": SCHEMA_VERSION, "id": self.folder.name, "outcome": str(outcome), "reason": reason}
        write_json(self.folder / SUMMARY, header | known)

    def close(self) -> None:
        """Closes the metrics file. Only ``resume`` opens it again."""
        if self._metrics is not None:
            self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
