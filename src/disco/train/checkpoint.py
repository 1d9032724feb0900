"""Checkpoints for exact resume: written whole or not at all, read without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from disco.errors import UserError
from disco.files import replacing

LATEST = "latest.pt"
PREVIOUS = "previous.pt"
"""The one before the latest: the runs of a cohort save one after the other, so that it may be their last in common."""


def path_at(folder: Path, tokens: int) -> Path:
    """The kept checkpoint of the horizon ``tokens`` in a run's checkpoint folder."""
    return folder / f"{tokens}.pt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Replaces ``path`` by ``content`` (tensors, numbers, text, and containers of them) in one step, durably.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as file:
        torch.save(content, file)


def rotate(folder: Path, content: dict[str, Any]) -> None:
    """Saves ``content`` as the latest checkpoint in ``folder`` and keeps the one before.

    Raises:
        UserError: the file cannot be written.
    """
    latest = folder / LATEST
    with replacing(latest) as file:
        torch.save(content, file)
        if latest.exists():
            (folder / LATEST).replace(folder / PREVIOUS)


def load(path: Path) -> dict[str, Any] | None:
    """What ``save`` wrote, or None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        raise UserError(
            f"the checkpoint {path} is damaged ({type(error).__name__}); delete it to start the run over"
        ) from error
