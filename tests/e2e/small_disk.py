"""A small file system of its own, whose size can be changed: what a full disk is made of."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A tmpfs that is mounted at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kilobytes: int) -> None:
        """Gives it another size; no smaller than what is in it."""
        _run(*self._sized(kilobytes))

    def _sized(self, kilobytes: int) -> list[str]:
        return ["mount", "-o", f"remount,size={kilobytes}k", "tmpfs", str(self.path)]

    @property
    def used(self) -> int:
        """Kilobytes in use."""
        state = os.statvfs(self.path)
        return (state.f_blocks - state.f_bfree) * state.f_frsize // 1024

    def fill(self) -> None:
        """Changes the size so that nothing is free, whoever writes meanwhile."""
        while subprocess.run(self._sized(self.used), capture_output=True).returncode:
            continue


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[SmallDisk]:
    """A tmpfs at ``path``, which is made; the test fails, with the reason, where nothing can be mounted."""
    path.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path))
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"a small disk needs root (or unshare -Urm): {done.stderr.strip()}", pytrace=False)
