"""One process at a time in a folder. The kernel frees the lock when its holder dies, however it dies. No torch."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disco.errors import UserError
from disco.files import unwritable

LOCK = "lock"
"""Name of the lock file inside a run folder or a sweep's folder. The file stays; being there means nothing."""


class BusyError(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds an exclusive ``flock`` on the file ``path``, which is made if needed and then names the holder's pid.

    Args:
        path: the lock file, by convention ``folder / LOCK``.
        wait: seconds to wait for a holder that is about to die, before giving up.

    Raises:
        BusyError: another process holds the lock (its pid is in the message).
        UserError: the file cannot be made, or the file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        _acquire(descriptor, path, time.monotonic() + wait)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise unwritable(path, error) from error
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"cannot lock {path}: {error.strerror}; use a file system with locks (docs/cluster.md)"
                ) from error
        if time.monotonic() >= deadline:
            holder = os.pread(descriptor, 20, 0).decode().strip() or "unknown"
            raise BusyError(f"{path.parent} is in use by process {holder}; wait for it or stop it")
        time.sleep(0.05)


def holder(path: Path) -> int | None:
    """Process id of who holds the lock ``path``, None if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return int(os.pread(descriptor, 20, 0) or -1)
    finally:
        os.close(descriptor)
