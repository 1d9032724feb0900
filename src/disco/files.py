"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from disco.errors import NoSpaceError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` in one step, durably, when the block ends without an error.
    Its folder must exist.

    Raises:
        UserError: it cannot be written; a NoSpaceError if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        cause: BaseException | None = error
        if isinstance(error, RuntimeError):  # of torch.save, after the cause
            cause = error.__context__
        if isinstance(cause, OSError):
            raise unwritable(path, cause) from error
        raise


def unwritable(path: Path, error: OSError) -> UserError:
    """What to raise when ``path`` cannot be written."""
    if error.errno in FULL:
        return NoSpaceError(f"cannot write {path}: {error.strerror}; make room, then give the same command again")
    return UserError(f"cannot write {path}: {error.strerror or error}; choose another place")


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
