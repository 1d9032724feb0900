"""What a folder of prepared tokens holds: its shards, their checksums, and what they were made with. No torch.

<folder>/index.json         written last: the folder is complete
<folder>/shard-000000.bin   token ids, little-endian, nothing else
<folder>/tokenizer.json     unless the tokens are bytes
<folder>/verified.json      sizes and times of shards whose checksums are known to be right
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from disco.errors import UserError
from disco.files import replacing

FORMAT = 1
"""Version of index.json; another one is not read."""

INDEX, VERIFIED, TOKENIZER = "index.json", "verified.json", "tokenizer.json"

Stamps = dict[str, list[int]]
"""File -> size, time of modification, time of change, as of when its checksum was right."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of tokens."""

    file: str
    """Path, from the folder of the index."""
    tokens: int
    sha256: str
    """Of all its bytes."""
    offset: int = 0
    """Bytes before the first token."""
    documents: int | None = None
    """Documents that end in it; None where that is unknown."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Tokens in shards, one after the other."""

    vocab: int
    dtype: str
    shards: tuple[Shard, ...]
    tokenizer: str | None = None
    """As in DataConfig, a file without its folder; None where that is unknown."""
    tokenizer_sha256: str | None = None
    """Of tokenizer.json; None for bytes or where that is unknown."""
    boundary: str | None = None
    """Text or special token that ends every document; None where that is unknown."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def digest(self) -> str:
        """Hash of the tokens and of how they are cut into shards, whatever the names and places of the files."""
        hasher = hashlib.sha256(f"{self.vocab} {self.dtype}\n".encode())
        for shard in self.shards:
            hasher.update(f"{shard.offset} {shard.tokens} {shard.sha256}\n".encode())
        return hasher.hexdigest()

    @property
    def stored(self) -> np.dtype[Any]:
        """Type of a token in the files."""
        return np.dtype(self.dtype).newbyteorder("<")

    def bytes_of(self, shard: Shard) -> int:
        """Size of a shard's file."""
        return shard.offset + shard.tokens * self.stored.itemsize


def write(folder: Path, index: Index) -> None:
    """Writes index.json, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    content = {"format": FORMAT, "digest": index.digest, "tokens": index.tokens, **dataclasses.asdict(index)}
    with replacing(folder / INDEX) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def load(folder: Path) -> Index:
    """Reads index.json.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise UserError(f"{path} was made by another version of Disco; prepare the data again")
        digest, _ = content.pop("digest"), content.pop("tokens")
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        index = Index(shards=shards, **content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; let disco data prepare finish first") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged; delete it and run disco data prepare again") from None
    if index.digest != digest:
        raise UserError(f"{path} is damaged: its digest is not that of its shards; run disco data prepare again")
    return index


def stamp(path: Path) -> list[int]:
    """Changes whenever the file does, but for a fault of the disk.

    Raises:
        OSError: no such file.
    """
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def stamps(path: Path) -> Stamps:
    """The stamps in a file; none if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def checksum(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(
    folder: Path, index: Index, known: Mapping[str, list[int]], progress: Callable[[int], None] | None = None
) -> Stamps:
    """Compares the checksums of all shards, but for files that have not changed since they were ``known`` to be right.

    Hashing needs no Python, so threads share the work.

    Returns:
        The stamps of all shards.

    Raises:
        UserError: shards are missing, cut or damaged.
    """

    def fault(shard: Shard) -> str:
        path = folder / shard.file
        try:
            result[shard.file] = stamp(path)
            if result[shard.file] == known.get(shard.file):
                return ""
            right = result[shard.file][0] == index.bytes_of(shard) and checksum(path) == shard.sha256
            return "" if right else f"{path} is corrupt"
        except OSError as error:
            return f"{path}: {error.strerror}"

    result: Stamps = {}
    damaged = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for number, found in enumerate(pool.map(fault, index.shards), start=1):
            damaged += [found] if found else []
            if progress is not None:
                progress(number)
    if damaged:
        more = f" and {len(damaged) - 3:,} more" if len(damaged) > 3 else ""
        raise UserError(
            f"shards are damaged: {', '.join(damaged[:3])}{more}; run the same disco data prepare again, which makes "
            "only these"
        )
    return result
