"""Checkpoints for exact resume: written whole or not at all, read without unpickling code.

One process writes a file, ``latest.pt`` and ``previous.pt``; many write a folder, ``latest-<tokens>.dcp``
(``distributed.checkpoint``), of which the last two stay. ``<tokens>.pt`` and ``<tokens>.dcp`` are kept for good. Either
form is read by any number of processes. Each has a header, {"schema", "offset", "state"}: where the record and the
training loop stood.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disco.base import NormOptimizer, parameter_names
from disco.errors import UserError
from disco.files import replacing

LATEST = "latest.pt"
PREVIOUS = "previous.pt"
"""The one before the latest: the runs of a cohort save one after the other, so that it may be their last in common."""
SHARDED = ".dcp"


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


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
    if (folder / PREVIOUS).exists():
        _remove(sharded(folder))


def path_of_latest(folder: Path, tokens: int) -> Path:
    """The latest checkpoint of many processes, made at ``tokens``."""
    return folder / f"latest-{tokens}{SHARDED}"


def make_room(folder: Path) -> None:
    """Removes checkpoints that are neither kept nor the last two, after many processes have saved one."""
    made = sharded(folder)
    _remove(made[2:] + ([folder / LATEST, folder / PREVIOUS] if len(made) > 1 else []))


def sharded(folder: Path) -> list[Path]:
    """The checkpoints of many processes that are not kept for good, the latest first."""
    found = folder.glob(f"latest-*{SHARDED}")
    return sorted(found, key=lambda path: int(path.stem.partition("-")[2]), reverse=True)


def set_aside(path: Path) -> Path:
    """Takes a damaged checkpoint out of the way of good ones; returns its new name."""
    aside = path.with_name(f"{path.name}.damaged")
    _remove([aside])
    return path.rename(aside)


def clean(folder: Path) -> None:
    """Removes what processes that were killed while they saved have left in a folder and the folders in it."""
    _remove(list(folder.rglob(".*.tmp")))


def load(path: Path) -> dict[str, Any] | None:
    """What ``save`` wrote, or None if there is no such file.

    Raises:
        UserError: the file cannot be read; a DamagedError if it is damaged.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"wrong checksum of {wrong}")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # BadZipFile, and of torch RuntimeError, UnpicklingError, EOFError, ...
        raise _damaged(path, error) from error


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a checkpoint that is whole, or None if it is not there.

    Raises:
        UserError: it cannot be read; a DamagedError if it is damaged.
    """
    if not path.exists():
        return None
    if path.suffix == SHARDED:
        from disco.distributed.checkpoint import read_header as read_sharded

        try:
            content: dict[str, Any] = read_sharded(path)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error
        except OSError as error:
            raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    else:
        content = load(path) or {}
    try:
        state = {**content["state"], "losses": torch.as_tensor(content["state"]["losses"]).tolist()}
        return {"schema": content["schema"], "offset": int(content["offset"]), "state": state}
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def tensors(optimizer: NormOptimizer) -> dict[str, Tensor]:
    """Weights and optimizer state by name, to be saved, or filled by ``restore``."""
    found: dict[str, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        for name, param in zip(parameter_names(group, index), group["params"], strict=True):
            found[f"model.{name}"] = param.detach()
            found |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[param].items()}
    return found


def restore(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fills what ``tensors`` returned, plain or sharded, from a checkpoint. All processes of a program call this.

    Raises:
        UserError: the checkpoint is damaged, or of another model or optimizer.
    """
    if path.suffix == SHARDED:
        from disco.distributed.checkpoint import restore as restore_sharded

        restore_sharded(path, into)
        return
    content = load(path)
    try:
        assert content is not None
        found = _by_name(content)
        if found.keys() != into.keys():
            raise ValueError(f"of another model: {', '.join(sorted(found.keys() ^ into.keys())[:3])}")
        for name, tensor in into.items():
            fill(tensor, found[name])
    except (AssertionError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a plain one, or what this rank holds of it into a sharded one."""
    if tensor.shape != whole.shape:
        raise ValueError(f"a tensor of shape {tuple(whole.shape)} for one of {tuple(tensor.shape)}")
    if type(tensor) is Tensor:
        tensor.copy_(whole)
        return
    from disco.distributed.placements import local_parts

    for part, box in local_parts(tensor):
        part.copy_(whole[box])


def _by_name(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of one process, as ``tensors`` names them."""
    found = {f"model.{name}": weight for name, weight in content["model"].items()}
    for group in content["optimizer"]["param_groups"]:
        for name, index in zip(group["names"], group["params"], strict=True):
            state = content["optimizer"]["state"].get(index, {})
            found |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return found


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(f"the checkpoint {path} is damaged ({type(error).__name__}); delete it to start the run over")


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
