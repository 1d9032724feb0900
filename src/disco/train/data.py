"""Tokens: made once and kept in a cache, then read in blocks, in an order that never repeats. No torch.

``prepare`` turns text into tokens; ``TokenStream`` cuts them into blocks, for training and for validation.

The cache (every part of it appears complete or not at all; a lock lets one process at a time write):

    <cache>/<digest>/tokens.bin      token ids, little-endian
    <cache>/<digest>/tokens.json     {"digest", "vocab", "dtype", "tokens"}
    <cache>/<digest>/tokenizer.json  unless the tokens are bytes
    <cache>/sources/<key>.json       {"digest"} of the text and tokenizer with this key, to know them at sight
"""

from __future__ import annotations

import dataclasses
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

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
"""Version of the cache; another one is not read."""


def prepare(config: DataConfig, cache: Path, source: Sequence[str] = ()) -> DataConfig:
    """Tokenises the text unless ``cache`` holds its tokens, and fills in ``digest`` and ``vocab``.

    ``source``, if given, takes the place of the configured one.

    The digest depends on the text and the tokenizer only, not on where they are. A second call knows the source files
    by their sizes and times, reads no text, and verifies the checksum of the tokens. If ``config.digest`` is given and
    its tokens are in the cache, the sources need not be there any more. Several processes may call it at once, and it
    may be killed.

    Raises:
        UserError: text or tokenizer that cannot be used (see ``documents``), a cache that cannot be written, or a
            ``config.digest`` that is not the one of this text.
    """
    config = dataclasses.replace(config, source=tuple(source)) if source else config
    known = _intact(cache / config.digest) if config.digest and not source else None
    if known is not None:
        return dataclasses.replace(config, vocab=known.vocab)
    paths = documents.files(config.source)
    coder = _coder_of(config.tokenizer)
    key = _key(config, coder, paths)
    try:
        found = _find(cache, key)
        if found is None:
            (cache / "sources").mkdir(parents=True, exist_ok=True)
            with locked(cache / LOCK, wait=math.inf):
                found = _find(cache, key) or _build(config, coder, paths, cache, key)
    except OSError as error:
        raise UserError(f"cannot write the cache {cache}: {error.strerror or error}; choose another folder") from None
    if config.digest not in ("", found.digest):
        raise UserError(
            f"the text or its tokenizer has changed: digest {found.digest[:12]}, expected {config.digest[:12]}; "
            "bring the old text back or start a new run"
        )
    return dataclasses.replace(config, digest=found.digest, vocab=found.vocab)


# Tokenizers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Coder:
    """A tokenizer that may yet have to be trained."""

    name: str
    """Says all that the tokens depend on besides the text."""
    ready: Callable[[Iterator[str]], Tokenizer | None]
    """Takes the text to train on, gives the tokenizer; None stands for bytes."""


def _coder_of(name: str) -> _Coder:
    if name == "bytes":
        return _Coder(name, lambda _: None)
    import tokenizers

    if name.startswith("bpe:"):
        size = int(name.removeprefix("bpe:"))
        return _Coder(f"{name} tokenizers {tokenizers.__version__}", lambda text: _train_bpe(text, size))
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {name}: {error.strerror}") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{name} is not a Hugging Face tokenizer.json: {_one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    digest = hashlib.sha256(content).hexdigest()
    return _Coder(f"{digest} tokenizers {tokenizers.__version__}", lambda _: tokenizer)


def _train_bpe(text: Iterator[str], size: int) -> Tokenizer:
    """Byte-level BPE with ``size`` tokens, of which 256 are the bytes; the same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    if tokenizer.get_vocab_size() < size:
        raise UserError(
            f"the text yields only {tokenizer.get_vocab_size():,} BPE tokens, not bpe:{size}; ask for fewer"
        )
    return tokenizer


def _encode(tokenizer: Tokenizer | None, text: str) -> NDArray[Any]:
    if tokenizer is None:
        return np.frombuffer(text.encode(), np.uint8)
    try:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizer cannot encode the text: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


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


def _key(config: DataConfig, coder: _Coder, paths: list[Path]) -> str:
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


def _build(config: DataConfig, coder: _Coder, paths: list[Path], cache: Path, key: str) -> _Tokens:
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
                warnings.warn(f"{folder} was damaged; made it again", stacklevel=3)
                shutil.rmtree(folder)
            temporary.rename(folder)
        entry = cache / "unfinished.json"
        entry.write_text(json.dumps({"digest": made.digest}))
        entry.replace(cache / "sources" / f"{key}.json")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return made


def _write(tokenizer: Tokenizer | None, text: Iterator[str], path: Path) -> _Tokens:
    vocab = 256 if tokenizer is None else 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    made = _Tokens(digest="", vocab=vocab, dtype=np.min_scalar_type(vocab - 1).name, tokens=0)
    count, hasher = 0, made.hasher
    with path.open("wb") as file:
        for piece in text:
            ids = _encode(tokenizer, piece).astype(made.stored)
            hasher.update(ids.tobytes())
            file.write(ids.tobytes())
            count += ids.size
    return dataclasses.replace(made, digest=hasher.hexdigest(), tokens=count)


# The stream --------------------------------------------------------------------------------------------------------


class TokenStream:
    """The tokens of prepared data, cut into blocks of ``context`` tokens and one more for the last target.

    Blocks share no token. Some, evenly spread over the text, are held out: the same ones for all seeds and batches. The
    others are trained on once each, in an order that depends on the digest, the context and the seed; every batch size
    takes the same blocks in the same order, so the number of tokens trained on says where a run stands.

    Attributes:
        context: tokens in a block.
        vocab: number of distinct tokens.
        train_tokens: tokens that can be trained on without repeating.
        valid_tokens: tokens held out: those asked for, rounded up to whole blocks.
    """

    def __init__(self, config: DataConfig, cache: Path, *, context: int, seed: int) -> None:
        """Opens the tokens that ``prepare`` left in ``cache``.

        Raises:
            UserError: the data are not prepared, or too short to hold ``valid_tokens`` out and train on the rest.
        """
        if not config.digest:
            raise UserError("the data are not prepared: call disco.train.data.prepare first")
        folder = cache / config.digest
        try:
            found = _Tokens(**json.loads((folder / "tokens.json").read_text()))
            tokens = np.memmap(folder / "tokens.bin", found.stored, mode="r", shape=found.tokens)
        except (OSError, ValueError, TypeError):
            raise UserError(f"{folder} holds no complete tokens: call disco.train.data.prepare again") from None

        blocks, held = found.tokens // (context + 1), -(-config.valid_tokens // context)
        if blocks <= held:
            raise UserError(
                f"the data have {found.tokens:,} tokens, {blocks:,} blocks of {context:,}: too few to hold "
                f"{config.valid_tokens:,} tokens out and train on the rest; use more text or lower data.valid_tokens"
            )
        self.context, self.vocab = context, found.vocab
        self.train_tokens, self.valid_tokens = (blocks - held) * context, held * context
        self._blocks = tokens[: blocks * (context + 1)].reshape(blocks, context + 1)
        self._held = (2 * np.arange(held) + 1) * blocks // (2 * held)  # the middles of equal stretches
        start = hashlib.sha256(f"{config.digest} {context} {seed}".encode()).digest()[:8]
        rank = _splitmix64(int.from_bytes(start, "little"), blocks)
        order = np.argsort(rank)
        self._order = order[~np.isin(order, self._held)]

    def batch(self, step: int, batch_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and targets of optimizer step ``step`` (0, 1, ...), each [batch_tokens / context, context].

        Raises:
            UserError: the text ends before this step does, or the batch is no multiple of the context.
        """
        if batch_tokens <= 0 or batch_tokens % self.context:
            raise UserError(f"batch must be a multiple of the context {self.context:,}, got {batch_tokens:,} tokens")
        rows = batch_tokens // self.context
        end = (step + 1) * rows
        if end > len(self._order):
            raise UserError(
                f"step {step:,} of {batch_tokens:,} tokens ends at {end * self.context:,} tokens, past the "
                f"{self.train_tokens:,} that can be trained on without repeating; use more text or a shorter horizon"
            )
        return self._take(self._order[end - rows : end])

    def valid_blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Held-out tokens and targets, each [valid_tokens / context, context], in the order of the text."""
        return self._take(self._held)

    def _take(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        taken = self._blocks[blocks]
        return taken[:, :-1].astype(np.int64), taken[:, 1:].astype(np.int64)


def _splitmix64(start: int, count: int) -> NDArray[np.uint64]:
    """``count`` distinct pseudo-random numbers (Steele, Lea, Flood, OOPSLA 2014), whatever the version of numpy."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def check(config: TrainConfig, stream: TokenStream) -> None:
    """Makes sure, before training, that the data last for the run.

    Raises:
        UserError: the batch or the horizon is larger than what can be trained on without repeating.
    """
    have = f"the data have {stream.train_tokens:,} tokens to train on without repeating"
    if config.batch > stream.train_tokens:
        raise UserError(f"the batch of {config.batch:,} tokens is larger than the data: {have}; use a smaller batch")
    if config.horizon > stream.train_tokens:
        longest = stream.train_tokens // config.batch * config.batch
        raise UserError(
            f"the horizon of {config.horizon:,} tokens is longer than the data: {have} "
            f"({stream.valid_tokens:,} more are held out); use a horizon of at most {longest:,} or more text"
        )
