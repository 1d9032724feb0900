"""Makes shards, one at a time, in a process of its own that ends with the one that started it. No torch.

JSON lines: the first one on standard input holds the arguments of ``Maker``, each further one a job, which is answered
by a line on standard output: ``{"file", "units", "known"}`` with one unit by ``{"shard", "made"}``, ``{"tokenizer",
"special", "sample", "units"}`` by ``{"tokenizer_sha256"}``, and any by ``{"error"}``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disco.errors import UserError
from disco.files import replacing
from disco.train.documents import SEPARATOR
from disco.train.shards.index import TOKENIZER, Shard, checksum
from disco.train.shards.plan import Unit
from disco.train.tokenizer import coder_of, encode, encode_each, parse, smallest_dtype, vocabulary

WHOLE = 2**17
"""Characters of a document that are encoded at once; a longer one is cut after a line where it can be."""

BATCH = 2**19
"""Characters that are encoded between two writes."""


class Maker:
    """Turns text into shards."""

    def __init__(self, folder: Path, text_field: str, boundary: str) -> None:
        """
        Args:
            folder: where the shards go; without a tokenizer.json in it tokens are bytes.
            text_field: field of records that holds the text.
            boundary: SEPARATOR, or the special token that ends every document.
        """
        path = folder / TOKENIZER
        self.folder, self.text_field = folder, text_field
        self.tokenizer = parse(path.read_bytes(), str(path)) if path.exists() else None
        self._dtype = np.dtype(smallest_dtype(vocabulary(self.tokenizer))).newbyteorder("<")
        if boundary == SEPARATOR:
            self._end = encode(self.tokenizer, SEPARATOR)
        else:
            assert self.tokenizer is not None
            self._end = np.array([self.tokenizer.token_to_id(boundary)])

    def make(self, file: str, unit: Unit, known: Shard | None) -> tuple[Shard, bool]:
        """The shard of a unit, and whether it had to be made: not so if it is ``known`` and its file is intact.

        Raises:
            UserError: bad text; a shard that cannot be written; a text that gives other tokens than it gave before.
        """
        path = self.folder / file
        if known is not None and path.exists() and checksum(path) == known.sha256:
            return known, False
        size, documents, hasher = 0, 0, hashlib.sha256()
        with replacing(path) as output:
            for ids, ended in self._tokens(unit):
                content = ids.astype(self._dtype).tobytes()
                hasher.update(content)
                output.write(content)
                size += len(content)
                documents += ended
            tokens = size // self._dtype.itemsize
            shard = Shard(file=file, tokens=tokens, sha256=hasher.hexdigest(), documents=documents)
            if known not in (None, shard):
                raise UserError(f"the text of {file} is not what it was; prepare it in a new folder")
        return shard, True

    def _tokens(self, unit: Unit) -> Iterator[tuple[NDArray[Any], int]]:
        """Yields tokens and how many documents ended."""
        waiting: list[str | None] = []  # None is the end of a document
        characters = 0
        for piece in unit.read(self.text_field):
            for part in [None] if piece is SEPARATOR else cut(piece):
                waiting.append(part)
                characters += len(part or "") + 1
                if characters >= BATCH:
                    yield self._encode(waiting)
                    waiting, characters = [], 0
        yield self._encode(waiting)

    def _encode(self, parts: list[str | None]) -> tuple[NDArray[Any], int]:
        encoded = iter(encode_each(self.tokenizer, [part for part in parts if part is not None]))
        ids = [self._end if part is None else next(encoded) for part in parts]
        return np.concatenate(ids) if ids else self._end[:0], parts.count(None)


def write_tokenizer(folder: Path, name: str, special: Sequence[str], text: Iterator[str]) -> str:
    """Makes the tokenizer ``name``, trained on ``text`` if it has to be, and writes it; its SHA-256.

    Raises:
        UserError: too little text; no ``special`` token; a full disk.
    """
    tokenizer = coder_of(name, special).ready(text)
    assert tokenizer is not None
    for token in special:
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{name} has no token {token!r} to end documents with")
    content = tokenizer.to_str().encode()
    with replacing(folder / TOKENIZER) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def _sample(units: Sequence[Unit], text_field: str, size: int) -> Iterator[str]:
    """``size`` characters, as many from each unit."""
    for unit in units:
        left = -(-size // len(units))
        for piece in unit.read(text_field):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                break


def cut(text: str) -> Iterator[str]:
    """Parts of at most WHOLE characters that end with a line where they can."""
    start = 0
    while len(text) - start > WHOLE:
        end = text.rfind("\n", start, start + WHOLE) + 1 or start + WHOLE
        yield text[start:end]
        start = end
    yield text[start:]


def main() -> None:
    """Answers jobs until standard input ends, and then stops at once, whatever it is doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for libraries that print
    settings = json.loads(lines.get())
    settings["folder"] = Path(settings["folder"])
    while True:
        try:
            reply = _answer(settings, json.loads(lines.get()))
        except UserError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


def _answer(settings: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    units = [Unit.from_json(unit) for unit in job["units"]]
    if "tokenizer" in job:
        text = _sample(units, settings["text_field"], job["sample"])
        return {"tokenizer_sha256": write_tokenizer(settings["folder"], job["tokenizer"], job["special"], text)}
    known = None if job["known"] is None else Shard(**job["known"])
    shard, made = _maker(**settings).make(job["file"], units[0], known)
    return {"shard": dataclasses.asdict(shard), "made": made}


@functools.cache
def _maker(folder: Path, text_field: str, boundary: str) -> Maker:
    return Maker(folder, text_field, boundary)


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
