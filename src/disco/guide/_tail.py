"""The lines of a file that somebody else is writing. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

MARK = 256
"""Bytes before the place read up to that must still be the same."""


class Tail:
    """The complete lines of a file as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def read(self) -> tuple[list[bytes], bool]:
        """The lines since the last call, and whether those before are void: the file was cut, rewritten or unreadable.

        Of a file that was rotated, so that another of that name took or is to take its place, the lines before stay.
        """
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except FileNotFoundError:
            return [], False
        except OSError:
            void = self._offset > 0
            self._forget()
            return [], void

    def _forget(self) -> None:
        self._inode, self._offset, self._mark = -1, 0, b""

    def _read(self, file: BinaryIO) -> tuple[list[bytes], bool]:
        status = os.fstat(file.fileno())
        rotated = self._inode not in (-1, status.st_ino)
        void = not rotated and not self._same(file, status.st_size)
        if rotated or void:
            self._forget()
        self._inode = status.st_ino
        file.seek(self._offset)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-MARK:]
        return whole.splitlines(keepends=True), void

    def _same(self, file: BinaryIO, size: int) -> bool:
        """Whether what was read is still there."""
        if size < self._offset:
            return False
        file.seek(self._offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark
