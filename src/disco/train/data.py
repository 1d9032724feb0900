"""Tokens: made once and kept in a cache, then read in blocks, in an order that never repeats. No torch.

``prepare`` turns text into tokens; ``TokenStream`` cuts them into blocks, for training and for validation.

The cache (every part of it appears complete or not at all; a lock lets one process at a time write):

    <cache>/<digest>/tokens.bin      token ids, little-endian
    <cache>/<digest>/tokens.json     {"digest", "vocab", "dtype", "tokens"}
    <cache>/<digest>/tokenizer.json  unless the tokens are bytes
    <cache>/sources/<key>.json       {"digest"} of the text and tokenizer with this key, to know them at sight

Tokens that are there already, in a folder that ``disco data prepare`` made or in .bin files, are not copied: see
``shards.tokens``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from disco.errors import UserError
from disco.runs.lock import LOCK, locked
from disco.train import documents
from disco.train.config import DataConfig, TrainConfig
from disco.train.order import Permutation, Without, splitmix64
from disco.train.shards.index import INDEX, Index
from disco.train.shards.tokens import ShardedTokens, adopt, adopted, holds_tokens
from disco.train.tokenizer import Coder, coder_of, encode, smallest_dtype, vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
"""Version of the cache; another one is not read."""


def prepare(config: DataConfig, cache: Path, source: Sequence[str] = ()) -> DataConfig:
    """Tokenises the text unless ``cache`` holds its tokens, and fills in ``digest`` and ``vocab``.

    ``source``, if given, takes the place of the configured one. A source that holds tokens already is left where it is;
    its checksums are verified unless its files are those that were verified before.

    The digest depends on the text and the tokenizer only, not on where they are. A second call knows the source files
    by their sizes and times, reads no text, and verifies the checksum of the tokens. If ``config.digest`` is given and
    its tokens are in the cache, the sources need not be there any more. Several processes may call it at once, and it
    may be killed.

    Raises:
        UserError: text or tokenizer that cannot be used (see ``documents``), a cache that cannot be written, or a
            ``config.digest`` that is not the one of this text.
    """
    config = dataclasses.replace(config, source=tuple(source)) if source else config
    known = _known(cache / config.digest) if config.digest and not source else None
    if known is not None:
        return dataclasses.replace(config, vocab=known.vocab)
    try:
        if holds_tokens(config.source):
            with locked(cache / LOCK, wait=math.inf):
                found = adopt(config, cache)
        else:
            found = _tokenised(config, cache)
    except OSError as error:
        raise UserError(f"cannot write the cache {cache}: {error.strerror or error}; choose another folder") from None
    if config.digest not in ("", found.digest):
        raise UserError(
            f"the text or its tokenizer has changed: digest {found.digest[:12]}, expected {config.digest[:12]}; "
            "bring the old text back or start a new run"
        )
    return found


def _tokenised(config: DataConfig, cache: Path) -> DataConfig:
    paths = documents.files(config.source)
    coder = coder_of(config.tokenizer)
    key = _key(config, coder, paths)
    found = _find(cache, key)
    if found is None:
        (cache / "sources").mkdir(parents=True, exist_ok=True)
        with locked(cache / LOCK, wait=math.inf):
            found = _find(cache, key) or _build(config, coder, paths, cache, key)
    return dataclasses.replace(config, digest=found.digest, vocab=found.vocab)


def _known(folder: Path) -> _Tokens | Index | None:
    """What an earlier call left in ``folder``, if it is intact."""
    return _intact(folder) or adopted(folder)


# The cache ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """What tokens.json says."""

    digest: str
    vocab: int
    dtype: str
    tokens: int

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def hasher(self) -> hashlib._Hash:
        """Hash of the tokens before the first one."""
        return hashlib.sha256(f"{self.vocab} {self.dtype}\n".encode())


def _key(config: DataConfig, coder: Coder, paths: list[Path]) -> str:
    """Stands for the sources: changes whenever a file, its size or one of its times does, or the tokenizer."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    parts = [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]
    content = json.dumps([FORMAT, coder.name, config.text_field, parts])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _find(cache: Path, key: str) -> _Tokens | None:
    """The tokens of the sources with this key, if they are there and their checksum is right."""
    try:
        digest = json.loads((cache / "sources" / f"{key}.json").read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return None
    return _intact(cache / digest)


def _intact(folder: Path) -> _Tokens | None:
    try:
        found = _Tokens(**json.loads((folder / "tokens.json").read_text()))
        with (folder / "tokens.bin").open("rb") as file:
            digest = hashlib.file_digest(file, lambda: found.hasher).hexdigest()
    except (OSError, ValueError, TypeError):
        return None
    return found if digest == found.digest == folder.name else None


def _build(config: DataConfig, coder: Coder, paths: list[Path], cache: Path, key: str) -> _Tokens:
    """Tokenises into a folder of its own and moves it into place. The caller holds the lock."""
    temporary = cache / "unfinished"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        tokenizer = coder.ready(documents.pieces(paths, config.text_field))
        if tokenizer is not None:
            (temporary / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        made = _write(tokenizer, documents.pieces(paths, config.text_field), temporary / "tokens.bin")
        (temporary / "tokens.json").write_text(json.dumps(dataclasses.asdict(made)))
        folder = cache / made.digest
        if not _intact(folder):
            if folder.exists():
                warnings.warn(f"{folder} was damaged; made it again", stacklevel=4)
                shutil.rmtree(folder)
            temporary.rename(folder)
        entry = cache / "unfinished.json"
        entry.write_text(json.dumps({"digest": made.digest}))
        entry.replace(cache / "sources" / f"{key}.json")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return made


def _write(tokenizer: Tokenizer | None, text: Iterator[str], path: Path) -> _Tokens:
    vocab = vocabulary(tokenizer)
    made = _Tokens(digest="", vocab=vocab, dtype=smallest_dtype(vocab), tokens=0)
    count, hasher = 0, made.hasher
    with path.open("wb") as file:
        for piece in text:
            ids = encode(tokenizer, piece).astype(made.stored)
            hasher.update(ids.tobytes())
            file.write(ids.tobytes())
            count += ids.size
    return dataclasses.replace(made, digest=hasher.hexdigest(), tokens=count)


# The stream --------------------------------------------------------------------------------------------------------


class TokenStream:
    """The tokens of prepared data, cut into blocks of ``context`` tokens and one more for the last target.

    Blocks share no token. Some, evenly spread over the text, are held out: the same ones for all seeds and batches. The
    others are trained on once each, in an order that depends on the digest, the context and the seed; every batch size
    and any number of data ranks take the same blocks in the same order, so the number of tokens trained on says where
    a run stands. With ``repeat`` above 1 as many passes follow each other, each in an order of its own.

    Attributes:
        context: tokens in a block.
        vocab: number of distinct tokens.
        train_tokens: tokens that can be trained on without repeating.
        valid_tokens: tokens held out: those asked for, rounded up to whole blocks.
        repeat: passes over ``train_tokens`` that may be made.
    """

    def __init__(self, config: DataConfig, cache: Path, *, context: int, seed: int, repeat: int = 1) -> None:
        """Opens the tokens that ``prepare`` left in ``cache``.

        Raises:
            UserError: the data are not prepared, or too short to hold ``valid_tokens`` out and train on the rest.
        """
        if not config.digest:
            raise UserError("the data are not prepared: call disco.train.data.prepare first")
        folder = cache / config.digest
        self._source: _Few | _Many = (_Many if (folder / INDEX).exists() else _Few)(folder, context + 1)
        found, blocks, held = self._source, self._source.blocks, -(-config.valid_tokens // context)
        if blocks <= held:
            raise UserError(
                f"the data have {found.tokens:,} tokens, {blocks:,} blocks of {context:,}: too few to hold "
                f"{config.valid_tokens:,} tokens out and train on the rest; use more text or lower data.valid_tokens"
            )
        self.context, self.vocab, self.repeat = context, found.vocab, repeat
        self.train_tokens, self.valid_tokens = (blocks - held) * context, held * context
        self._held = (2 * np.arange(held) + 1) * blocks // (2 * held)  # the middles of equal stretches
        self._key = f"{config.digest} {context} {seed}"
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def batch(
        self, step: int, batch_tokens: int, *, rank: int = 0, ranks: int = 1
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and targets of optimizer step ``step`` (0, 1, ...), each [batch_tokens / context / ranks, context].

        Data rank ``rank`` of ``ranks`` gets its part; the parts of all ranks, one after the other, are the batch.

        Raises:
            UserError: the text ends before this step does, or the batch is no multiple of the context and ranks.
        """
        if batch_tokens <= 0 or batch_tokens % self.context:
            raise UserError(f"batch must be a multiple of the context {self.context:,}, got {batch_tokens:,} tokens")
        rows = batch_tokens // self.context
        if rows % ranks:
            raise UserError(f"a batch of {rows:,} sequences cannot be split over {ranks:,} data ranks alike")
        first = step * rows
        end = (first + rows) * self.context
        if end > self.usable_tokens:
            raise UserError(
                f"step {step:,} of {batch_tokens:,} tokens ends at {end:,} tokens, past the {self.usable_tokens:,} "
                f"that can be trained on {self.manner}; use more text or a shorter horizon"
            )
        share = rows // ranks
        return self._take(self._blocks(first + rank * share, share))

    def valid_blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Held-out tokens and targets, each [valid_tokens / context, context], in the order of the text."""
        return self._take(self._held)

    @property
    def usable_tokens(self) -> int:
        """Tokens that can be trained on."""
        return self.train_tokens * self.repeat

    @property
    def manner(self) -> str:
        """How often they may be trained on, in words."""
        return "without repeating" if self.repeat == 1 else f"in {self.repeat:,} passes"

    def passes(self, tokens: int) -> float:
        """Passes over the training text that ``tokens`` are; above 1, text is repeated."""
        return tokens / self.train_tokens

    def _take(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        taken = self._source.read(blocks)
        return taken[:, :-1].astype(np.int64), taken[:, 1:].astype(np.int64)

    def _blocks(self, first: int, count: int) -> NDArray[np.int64]:
        """``count`` blocks from place ``first`` on of the order of training, all passes in a row."""
        size = self.train_tokens // self.context
        number, start = divmod(first, size)
        stop = min(size, start + count)
        blocks = self._order(number)(np.arange(start, stop))
        left = count - (stop - start)
        return np.concatenate([blocks, self._blocks(first + count - left, left)]) if left else blocks

    def _order_of(self, number: int) -> Order:
        """The order of the blocks in pass ``number`` (0, 1, ...)."""
        return self._source.order(self._key + (f" {number}" if number else ""), self._held)


Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Places in the order of training -> blocks."""


class _Few:
    """The blocks of a file of the cache: few enough to sort."""

    def __init__(self, folder: Path, length: int) -> None:
        try:
            found = _Tokens(**json.loads((folder / "tokens.json").read_text()))
            tokens = np.memmap(folder / "tokens.bin", found.stored, mode="r", shape=found.tokens)
        except (OSError, ValueError, TypeError):
            raise UserError(f"{folder} holds no complete tokens: call disco.train.data.prepare again") from None
        self.vocab, self.tokens, self.blocks = found.vocab, found.tokens, found.tokens // length
        self._content = tokens[: self.blocks * length].reshape(self.blocks, length)

    def read(self, blocks: NDArray[np.int64]) -> NDArray[Any]:
        return self._content[blocks]

    def order(self, key: str, held: NDArray[np.int64]) -> Order:
        start = hashlib.sha256(key.encode()).digest()[:8]
        order = np.argsort(splitmix64(int.from_bytes(start, "little"), self.blocks))
        return order[~np.isin(order, held)].__getitem__


class _Many:
    """The blocks of shards, which may be too many to hold their order."""

    def __init__(self, folder: Path, length: int) -> None:
        self._tokens, self._length = ShardedTokens(folder), length
        index = self._tokens.index
        self.vocab, self.tokens, self.blocks = index.vocab, index.tokens, index.tokens // length

    def read(self, blocks: NDArray[np.int64]) -> NDArray[Any]:
        return self._tokens.read(blocks * self._length, self._length)

    def order(self, key: str, held: NDArray[np.int64]) -> Order:
        return Without(Permutation(self.blocks, key), held)


def check(config: TrainConfig, stream: TokenStream) -> None:
    """Makes sure, before training, that the data last for the run.

    Raises:
        UserError: the batch or the horizon is larger than what can be trained on.
    """
    most = stream.usable_tokens
    have = f"the data have {most:,} tokens to train on {stream.manner}"
    if config.batch > most:
        raise UserError(f"the batch of {config.batch:,} tokens is larger than the data: {have}; use a smaller batch")
    if config.horizon > most:
        longest = most // config.batch * config.batch
        raise UserError(
            f"the horizon of {config.horizon:,} tokens is longer than the data: {have} "
            f"({stream.valid_tokens:,} more are held out); use a horizon of at most {longest:,} or more text"
        )
