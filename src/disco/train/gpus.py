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

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these files is there if torch may find a GPU: NVIDIA's driver, AMD's, or that of Linux within Windows."""

QUESTION = """
import json, torch
print(json.dumps([torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]))
"""


class Gpu(NamedTuple):
    """A GPU that this process may use."""

    name: str
    """As ``CUDA_VISIBLE_DEVICES`` takes it."""
    memory: int
    """Bytes that are free."""


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch finds, of those in ``CUDA_VISIBLE_DEVICES`` if it is set.

    Raises:
        UserError: there is a driver, but torch does not start; with its last line.
    """
    if not any(Path(driver).exists() for driver in DRIVERS):
        return ()
    done = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [""])[-1]
        raise UserError(f"torch cannot say what GPUs are here (exit code {done.returncode}): {why}")
    free: list[int] = json.loads(done.stdout)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(len(free))] if visible is None else visible.split(",")
    return tuple(Gpu(name.strip(), memory) for name, memory in zip(names, free, strict=False))
