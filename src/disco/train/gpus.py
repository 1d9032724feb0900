"""The GPUs of this machine. torch is asked in a process of its own: no torch here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from disco.errors import UserError

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""One of these files is there if torch may find a GPU of NVIDIA: its driver's, or that of Linux within Windows."""

QUESTION = """
import json, torch

def free(index):
    try:
        return torch.cuda.mem_get_info(index)[0]
    except RuntimeError:  # full, or another process has it for itself
        return None

print(json.dumps([free(index) for index in range(torch.cuda.device_count())]))
"""
"""The last line of the answer: bytes that are free on each GPU, null where it cannot be used."""


class Gpu(NamedTuple):
    """A GPU that this process may use."""

    name: str
    """As ``CUDA_VISIBLE_DEVICES`` takes it."""
    memory: int
    """Bytes that are free."""


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can use, of those in ``CUDA_VISIBLE_DEVICES`` if it is set.

    Raises:
        UserError: there is a driver, but torch does not start or answer; with its last line.
    """
    if not any(Path(driver).exists() for driver in DRIVERS):
        return ()
    done = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True)
    try:
        free: list[int | None] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        why = ((done.stderr or done.stdout).strip().splitlines() or [""])[-1]
        raise UserError(f"torch cannot say what GPUs are here (exit code {done.returncode}): {why}") from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(len(free))] if visible is None else visible.split(",")
    pairs = zip(names, free, strict=False)
    return tuple(Gpu(name.strip(), memory) for name, memory in pairs if memory is not None)
