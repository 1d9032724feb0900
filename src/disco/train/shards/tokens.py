"""Reads tokens in shards: prepared folders, and the .bin files of nanoGPT and llm.c as they are. No torch.

``adopt`` leaves ``<cache>/<digest>/index.json``, an index whose files are absolute paths, and ``verified.json``: what
was verified once is read again only if its files have changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disco.errors import UserError
from disco.files import replacing
from disco.train.config import DataConfig
from disco.train.shards.index import (
    INDEX,
    TOKENIZER,
    VERIFIED,
    Index,
    Shard,
    Stamps,
    load,
    stamp,
    stamps,
    verify,
    write,
)

MAPS = 1024
"""Shards that are mapped at once; the kernel allows 65,530 of a process."""

HEADER = 256
"""int32 before the tokens of llm.c: a magic number, a version, the number of tokens (karpathy/llm.c, dev/data)."""

MAGIC = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
"""Magic number and version -> type of a token: GPT-2's and Llama 3's."""


def holds_tokens(source: Iterable[str]) -> bool:
    """Whether the sources are tokens already: a folder that was prepared, or .bin files.

    Raises:
        UserError: some are and some are not, or there is more than one prepared folder.
    """
    names = list(source)
    prepared = [name for name in names if _is_prepared(Path(name))]
    tokens = prepared + [name for name in names if name.endswith(".bin")]
    if (tokens and len(tokens) < len(names)) or (prepared and len(names) > 1):
        raise UserError(f"data.source mixes {tokens[0]}, which holds tokens, with others; name it alone")
    return bool(tokens)


def _is_prepared(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (INDEX, "plan.json"))


def adopt(config: DataConfig, cache: Path) -> DataConfig:
    """Fills in ``digest`` and ``vocab`` of tokens that are there already. The caller holds the lock on the cache.

    The vocabulary of .bin files is ``config.vocab``, or as large as their tokens need if that is 0.

    Raises:
        UserError: tokens that are missing, damaged, of an unknown form, or another tokenizer than the configured one.
    """
    folder = Path(config.source[0]).resolve()
    if not _is_prepared(folder):
        index, known = _bins([Path(name).resolve() for name in config.source], config.vocab, cache)
        tokenizer = config.tokenizer
    else:
        index = load(folder)
        tokenizer = str(folder / TOKENIZER) if index.tokenizer_sha256 else "bytes"
        if config.tokenizer not in ("bytes", index.tokenizer, tokenizer):
            raise UserError(
                f"{folder} was made with {index.tokenizer}, not {config.tokenizer}; leave the tokenizer out"
            )
        known = stamps(cache / index.digest / VERIFIED)
        known |= {str(folder / file): value for file, value in stamps(folder / VERIFIED).items()}
        shards = tuple(dataclasses.replace(shard, file=str(folder / shard.file)) for shard in index.shards)
        index = dataclasses.replace(index, shards=shards)
    target = cache / index.digest
    verified = verify(target, index, known)
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / VERIFIED) as file:
        file.write(json.dumps(verified).encode())
    write(target, index)
    return dataclasses.replace(config, digest=index.digest, vocab=index.vocab, tokenizer=tokenizer)


def adopted(folder: Path) -> Index | None:
    """What ``adopt`` left in ``folder``, if nothing has changed since."""
    if not (folder / INDEX).exists():
        return None
    index, known = load(folder), stamps(folder / VERIFIED)
    try:
        same = all(stamp(folder / shard.file) == known.get(shard.file) for shard in index.shards)
    except OSError:
        return None
    return index if same else None


# .bin files --------------------------------------------------------------------------------------------------------


def _bins(paths: Sequence[Path], vocab: int, cache: Path) -> tuple[Index, Stamps]:
    if len(set(paths)) < len(paths):
        raise UserError("a .bin file is named twice in data.source; the training text must not repeat")
    try:
        now = {str(path): stamp(path) for path in paths}
        key = hashlib.sha256(json.dumps([now, vocab]).encode()).hexdigest()[:32]
        found = cache / "sources" / f"{key}.json"
        if found.exists() and (index := adopted(cache / json.loads(found.read_bytes())["digest"])) is not None:
            return index, now
        forms = {path: _form(path) for path in paths}
        if len({dtype for dtype, _ in forms.values()}) > 1:
            raise UserError(f"{paths[0]} and others differ in how tokens are stored; name files of one data set")
        shards, largest = [], 0
        for path, (dtype, offset) in forms.items():
            shard, top = _scan(path, dtype, offset)
            shards.append(shard)
            largest = max(largest, top)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    if 0 < vocab <= largest:
        raise UserError(f"data.vocab is {vocab:,}, but the files hold the token {largest:,}; leave data.vocab out")
    index = Index(vocab=vocab or largest + 1, dtype=dtype, shards=tuple(shards))
    found.parent.mkdir(parents=True, exist_ok=True)
    with replacing(found) as file:
        file.write(json.dumps({"digest": index.digest}).encode())
    return index, now


def _form(path: Path) -> tuple[str, int]:
    """Type of the tokens of a .bin file and the bytes before them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * HEADER), "<i4", count=min(HEADER, size // 4))
    if len(header) == HEADER and (int(header[0]), int(header[1])) in MAGIC:
        dtype = MAGIC[int(header[0]), int(header[1])]
        if size != 4 * HEADER + int(header[2]) * np.dtype(dtype).itemsize:
            raise UserError(f"{path} is cut: its header names {header[2]:,} tokens; get the file again")
        return dtype, 4 * HEADER
    if size == 0 or size % 2:
        raise UserError(f"{path} is neither nanoGPT's uint16 tokens nor llm.c's: {size:,} bytes")
    return "uint16", 0


def _scan(path: Path, dtype: str, offset: int) -> tuple[Shard, int]:
    """The shard that a file is, and its largest token."""
    hasher, tokens, largest = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        hasher.update(file.read(offset))
        while content := file.read(2**24):
            hasher.update(content)
            ids = np.frombuffer(content, np.dtype(dtype).newbyteorder("<"))
            tokens, largest = tokens + ids.size, max(largest, int(ids.max()))
    return Shard(file=str(path), tokens=tokens, sha256=hasher.hexdigest(), offset=offset), largest


# Reading -----------------------------------------------------------------------------------------------------------


class ShardedTokens:
    """The tokens of all shards as one sequence, mapped into memory as far as they are read."""

    def __init__(self, folder: Path) -> None:
        """Opens what ``adopt`` or ``prepare_folder`` left in ``folder``.

        Raises:
            UserError: the index or a shard is missing, or cut.
        """
        self.index = load(folder)
        self._folder = folder
        self._ends = np.cumsum([shard.tokens for shard in self.index.shards])
        for shard in self.index.shards:
            self._check(shard)
        self._map = functools.lru_cache(maxsize=MAPS)(self._open)

    def read(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """``length`` tokens from each of ``starts``, [len(starts), length].

        Raises:
            UserError: a shard has been lost, or holds what no tokenizer gave.
        """
        result = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self._ends, starts, side="right")
        for row, start, number in zip(result, starts.tolist(), shards.tolist(), strict=True):
            filled = 0
            while filled < length:
                tokens = self._map(number)
                begin = start + filled - int(self._ends[number]) + len(tokens)
                part = tokens[begin : begin + length - filled]
                row[filled : filled + len(part)] = part
                filled += len(part)
                number += 1
        if result.size and result.max() >= self.index.vocab:
            raise UserError(
                f"{self._folder}: a shard holds the token {result.max():,}; it is corrupt, prepare it again"
            )
        return result

    def _open(self, number: int) -> NDArray[Any]:
        shard = self.index.shards[number]
        self._check(shard)
        if not shard.tokens:
            return np.empty(0, self.index.stored)
        return np.memmap(
            self._folder / shard.file, self.index.stored, mode="r", offset=shard.offset, shape=(shard.tokens,)
        )

    def _check(self, shard: Shard) -> None:
        path = self._folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read the shard {path}: {error.strerror}") from None
        if size != self.index.bytes_of(shard):
            raise UserError(f"the shard {path} is corrupt: {size:,} bytes, not {self.index.bytes_of(shard):,}")
