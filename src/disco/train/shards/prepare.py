"""Turns text of any size into a folder of shards: in parallel, in little memory, and whatever kills it. No torch.

Besides what ``index`` describes, the folder holds

    plan.json       what it is made from; another plan is not continued in it
    progress.jsonl  the shards that are finished, a line for each

A shard is a function of the plan alone. Its file appears whole, then its line; so what a killed process leaves is
finished by the next one, to the same bytes, with any number of workers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import selectors
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from disco.errors import UserError
from disco.files import replacing
from disco.runs.lock import LOCK, locked
from disco.train.documents import SEPARATOR
from disco.train.shards import index as index_file
from disco.train.shards.index import FORMAT, INDEX, TOKENIZER, VERIFIED, Index, Shard
from disco.train.shards.plan import Unit, identities, units
from disco.train.tokenizer import coder_of, parse, smallest_dtype, vocabulary

PLAN, PROGRESS = "plan.json", "progress.jsonl"

SAMPLED = 256
"""Units, at most, that a tokenizer is trained on a part of."""

Progress = Callable[[int, int, int], None]
"""Called with shards finished, shards in all, tokens so far."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to prepare; all of it changes the tokens."""

    source: tuple[str, ...]
    """As in DataConfig, or data sets ``hf:NAME`` (see ``hub``)."""
    tokenizer: str = "bytes"
    """As in DataConfig; BPE is trained on a sample."""
    text_field: str = "text"
    boundary: str = SEPARATOR
    """Ends every document: a blank line, or a special token of the tokenizer."""
    shard_bytes: int = 2**26
    """Bytes of the sources for one shard, about."""
    sample: int = 2**25
    """Characters of text to train BPE on."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("no source; name a folder, files, or hf:NAME")
        if not re.fullmatch(r"bytes|bpe:\d+|.*\.json", self.tokenizer):
            raise UserError(f"a tokenizer is bytes, bpe:SIZE or a tokenizer.json, got {self.tokenizer!r}")
        if self.tokenizer.startswith("bpe:") and int(self.tokenizer.removeprefix("bpe:")) <= 256:
            raise UserError(f"bpe:SIZE needs a SIZE above 256, got {self.tokenizer!r}")
        if self.tokenizer == "bytes" and self.boundary != SEPARATOR:
            raise UserError(f"bytes have no special token {self.boundary!r}; use another tokenizer or leave it out")
        for name, value in (("shard bytes", self.shard_bytes), ("sample", self.sample)):
            if value < 1:
                raise UserError(f"{name} must be 1 or more, got {value}")

    @property
    def special(self) -> tuple[str, ...]:
        """Special tokens that the tokenizer must have."""
        return () if self.boundary == SEPARATOR else (self.boundary,)


def prepare_folder(request: Request, folder: Path, workers: int = 1, progress: Progress | None = None) -> Index:
    """Makes the shards of ``request`` that ``folder`` does not hold yet, intact.

    Args:
        request: the text and how it becomes tokens.
        folder: where the shards go, in which nobody else may write meanwhile.
        workers: processes, each with one thread.
        progress: called after every shard.

    Raises:
        UserError: bad text or tokenizer, a folder made from something else or in use, a full disk. What is finished by
            then stays and is used by the next call.
    """
    sources = identities(request.source)
    planned = list(units(sources, request.shard_bytes))
    if not planned:
        raise UserError(f"{', '.join(request.source)}: all files are empty")
    tokenizer = coder_of(request.tokenizer).name
    wanted = {**dataclasses.asdict(request), "format": FORMAT, "source": sources, "tokenizer": tokenizer}
    try:
        with locked(folder / LOCK):
            for file in folder.glob(".*.tmp"):  # of processes that were killed
                file.unlink(missing_ok=True)
            if (folder / PLAN).exists():
                tokenizer_sha256 = _old_plan(folder, wanted)
            else:
                tokenizer_sha256 = _new_plan(folder, wanted, request, planned, workers)
            shards = _make(request, folder, planned, workers, progress)
            return _complete(request, folder, shards, tokenizer_sha256)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; make room or choose another") from None


def _complete(request: Request, folder: Path, shards: list[Shard], tokenizer_sha256: str | None) -> Index:
    path = folder / TOKENIZER
    vocab = vocabulary(parse(path.read_bytes(), str(path)) if tokenizer_sha256 else None)
    if not any(shard.tokens for shard in shards):
        raise UserError(f"{', '.join(request.source)}: there is no text")
    index = Index(
        vocab=vocab,
        dtype=smallest_dtype(vocab),
        shards=tuple(shards),
        tokenizer=Path(request.tokenizer).name,
        tokenizer_sha256=tokenizer_sha256,
        boundary=request.boundary,
    )
    with replacing(folder / VERIFIED) as file:
        known = {shard.file: index_file.stamp(folder / shard.file) for shard in shards}
        file.write(json.dumps(known).encode())
    index_file.write(folder, index)
    return index


# The plan --------------------------------------------------------------------------------------------------------


def _old_plan(folder: Path, wanted: dict[str, Any]) -> str | None:
    """The digest of the tokenizer.json in ``folder``, which was planned as ``wanted``.

    Raises:
        UserError: it holds another plan, or its tokenizer is damaged.
    """
    try:
        plan = json.loads((folder / PLAN).read_bytes())
        digest: str | None = plan.pop("tokenizer_sha256")
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{folder / PLAN} is damaged; prepare the data in a new folder") from None
    different = [key for key in wanted if plan.get(key) != wanted[key]]
    if different:
        raise UserError(
            f"{folder} holds data made with another {' and '.join(different)}; choose another folder, or delete it"
        )
    path = folder / TOKENIZER
    if digest and (not path.exists() or index_file.checksum(path) != digest):
        raise UserError(f"{path} is damaged; bring it back or prepare the data in a new folder")
    return digest


def _new_plan(
    folder: Path, wanted: dict[str, Any], request: Request, planned: Sequence[Unit], workers: int
) -> str | None:
    """Writes the tokenizer and then the plan, and forgets what another plan left; returns the tokenizer's digest.

    Raises:
        UserError: the tokenizer cannot be trained, or has no such token as ends the documents; a full disk.
    """
    for left in (PROGRESS, INDEX, TOKENIZER):
        (folder / left).unlink(missing_ok=True)
    digest: str | None = None
    if request.tokenizer != "bytes":
        units = [unit.to_json() for unit in planned[:: -(-len(planned) // SAMPLED)]]
        job = {"tokenizer": request.tokenizer, "special": request.special, "sample": request.sample, "units": units}
        with _Worker(_settings(request, folder), threads=workers) as worker:  # its memory is free again afterwards
            worker.take(job)
            digest = worker.reply()["tokenizer_sha256"]
    with replacing(folder / PLAN) as file:
        file.write(json.dumps({**wanted, "tokenizer_sha256": digest}).encode())
    return digest


def _settings(request: Request, folder: Path) -> dict[str, str]:
    """Of workers."""
    return {"folder": str(folder), "text_field": request.text_field, "boundary": request.boundary}


# The shards ------------------------------------------------------------------------------------------------------


def _make(
    request: Request, folder: Path, planned: Sequence[Unit], workers: int, progress: Progress | None
) -> list[Shard]:
    known = _finished(folder / PROGRESS)
    with replacing(folder / PROGRESS) as file:  # without a last line that was cut
        file.writelines(_line(shard) for shard in known.values())
    names = [f"shard-{number:06d}.bin" for number in range(len(planned))]
    done: dict[str, Shard] = {}
    jobs = (
        {
            "file": name,
            "units": [unit.to_json()],
            "known": dataclasses.asdict(known[name]) if name in known else None,
        }
        for name, unit in zip(names, planned, strict=True)
    )
    with (folder / PROGRESS).open("ab") as journal:
        for reply in _work(_settings(request, folder), jobs, min(workers, len(planned))):
            shard = Shard(**reply["shard"])
            done[shard.file] = shard
            if shard.file not in known:
                journal.write(_line(shard))
                journal.flush()
                os.fsync(journal.fileno())
            elif reply["made"]:
                warnings.warn(f"{folder / shard.file} was lost or damaged; made it again", stacklevel=4)
            if progress is not None:
                progress(len(done), len(names), sum(shard.tokens for shard in done.values()))
    return [done[name] for name in names]


def _line(shard: Shard) -> bytes:
    return json.dumps(dataclasses.asdict(shard)).encode() + b"\n"


def _finished(path: Path) -> dict[str, Shard]:
    found: dict[str, Shard] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            shard = Shard(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[shard.file] = shard
    return found


# The workers -----------------------------------------------------------------------------------------------------


def _work(settings: dict[str, str], jobs: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """Yields the replies to ``jobs`` as they come."""
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(count):
            worker = stack.enter_context(_Worker(settings))
            selector.register(worker.output, selectors.EVENT_READ, worker)
            worker.take(next(jobs))
        while selector.get_map():
            for key, _ in selector.select():
                reply = key.data.reply()
                job = next(jobs, None)
                if job is None:
                    selector.unregister(key.fileobj)
                else:
                    key.data.take(job)
                yield reply


class _Worker:
    """A process that runs ``worker.main``."""

    def __init__(self, settings: dict[str, str], threads: int = 1) -> None:
        count = dict.fromkeys(("RAYON_NUM_THREADS", "POLARS_MAX_THREADS", "OMP_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "disco.train.shards.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **count},
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout
        self.take(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._input.close()
        self.output.close()

    def take(self, content: dict[str, Any]) -> None:
        """Sends settings or a job."""
        try:
            self._input.write(json.dumps(content).encode() + b"\n")
            self._input.flush()
        except BrokenPipeError:
            self._died()

    def reply(self) -> dict[str, Any]:
        """Waits for the answer to the job.

        Raises:
            UserError: the job could not be done, or the worker was killed.
        """
        line = self.output.readline()
        if not line:
            self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _died(self) -> NoReturn:
        code = self._process.wait()
        if code < 0:
            raise UserError(f"a worker was killed by signal {-code} (out of memory?); the same command continues")
        raise RuntimeError(f"a worker ended with exit code {code}")
