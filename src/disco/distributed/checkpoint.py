"""Checkpoints of sharded tensors: written by all ranks at once in the background, read under any layout.

The bytes are those of torch.distributed.checkpoint, and tools for it read them. What we read ourselves besides them is
JSON: no unpickling. A checkpoint is a folder that appears when it is complete:

    __<rank>_0.distcp       tensors, each as torch.save writes it
    __<rank>_0.distcp.sum   {"bytes", "crc32"} of the file
    .metadata               what other tools need
    index.json              {"header": what the caller adds, "tensors": where the parts of each lie, "files": sums}
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from disco.distributed.failure import timeout
from disco.errors import UserError
from disco.files import replacing, sync_folder, unwritable

INDEX = "index.json"


class Saver:
    """Writes checkpoints of this process group's ranks, one after the other, while they go on with other things.

    Every rank makes one, and calls it as the others do. The tensors are copied before ``save`` returns.
    """

    def __init__(self) -> None:
        self._group: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout())  # for the background alone
        self._running: tuple[Path, Future[Any]] | None = None

    def save(self, path: Path, tensors: Mapping[str, Tensor], header: Any, then: Callable[[], None]) -> None:
        """Begins a checkpoint, once the one before is complete.

        Args:
            path: the folder to make; one that is there is replaced.
            tensors: plain (the same on all ranks) and DTensors.
            header: JSON; the first rank's counts.
            then: called on the first rank when the checkpoint is complete, in another thread.

        Raises:
            UserError: the one before could not be written.
        """
        self.settle()
        writer = _Writer(path, header, then)
        future = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self._group)
        self._running = path, cast("Future[Any]", future)

    def settle(self) -> None:
        """Waits until what was begun is on disk.

        Raises:
            UserError: it could not be written.
        """
        if self._running is not None:
            (path, future), self._running = self._running, None
            try:
                future.result()
            except CheckpointException as error:
                why = _reason(error)
                if isinstance(why, UserError):
                    raise why from error
                if isinstance(why, OSError):
                    raise unwritable(path, why) from error
                raise UserError(f"cannot write {path}: {_line(why)}") from error


def restore(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills the tensors from the checkpoint ``path``. With a process group all of its ranks must call this.

    Raises:
        UserError: a tensor is missing there, or has another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process it is
            dcp.load(dict(tensors), storage_reader=_Reader(path), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise UserError(f"the checkpoint {path} cannot be loaded: {_line(_reason(error))}") from error


def read_header(path: Path) -> Any:
    """The caller's header, once every file is known to be as it was written.

    Raises:
        ValueError: a file is missing or damaged.
    """
    index = _index(path)
    for name, wanted in index["files"].items():
        if _sum(path / name) != wanted:
            raise ValueError(f"{name} is not as it was written")
    return index["header"]


class _Writer(dcp.FileSystemWriter):
    """Writes to a hidden folder, which the first rank renames when all have written."""

    def __init__(self, path: Path, header: Any, then: Callable[[], None]) -> None:
        self._final, self._header, self._then = path, header, then
        self._hidden = path.with_name(f".{path.name}.tmp")
        super().__init__(self._hidden)

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.wait()}:
            with replacing(self._hidden / f"{name}.sum") as file:
                file.write(json.dumps(_sum(self._hidden / name)).encode())
        return written

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        super().finish(metadata, results)
        sums = {path.stem: json.loads(path.read_bytes()) for path in sorted(self._hidden.glob("*.sum"))}
        index = {"header": self._header, "tensors": _described(metadata), "files": sums}
        with replacing(self._hidden / INDEX) as file:
            file.write(json.dumps(index).encode())
        if self._final.exists():
            before = self._hidden.with_suffix(".old.tmp")
            self._final.rename(before)
            self._hidden.rename(self._final)
            shutil.rmtree(before)
        else:
            self._hidden.rename(self._final)
        sync_folder(self._final.parent)
        self._then()


class _Reader(dcp.FileSystemReader):
    """Takes from the index what torch would unpickle from .metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        stored: dict[MetadataIndex, SimpleNamespace] = {}
        for name, tensor in _index(Path(self.path))["tensors"].items():
            properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
            chunks = []
            for part in tensor["parts"]:
                offsets, sizes = torch.Size(part["offsets"]), torch.Size(part["sizes"])
                chunks.append(ChunkStorageMetadata(offsets, sizes))
                place = {"relative_path": part["file"], "offset": part["start"], "length": part["bytes"]}
                stored[MetadataIndex(name, offsets)] = SimpleNamespace(**place, transform_descriptors=None)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(tensors, storage_data=stored, storage_meta=StorageMeta(load_id=self.load_id))


def _described(metadata: Metadata) -> dict[str, Any]:
    """Tensor -> dtype, shape, and its parts: where they are in the tensor, and where in the files."""
    described: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # nothing else is saved
        parts = []
        for chunk in tensor.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            where = {"file": place.relative_path, "start": place.offset, "bytes": place.length}
            parts.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **where})
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        described[name] = {"dtype": dtype, "shape": list(tensor.size), "parts": parts}
    return described


def _reason(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank where something did."""
    return error.failures[min(error.failures)][0]


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _index(path: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((path / INDEX).read_bytes())
    return index


def _sum(path: Path) -> dict[str, int]:
    """Length and checksum of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
        return {"bytes": os.fstat(file.fileno()).st_size, "crc32": crc}
