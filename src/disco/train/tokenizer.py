"""Tokenizers: bytes, BPE trained on the text, or a Hugging Face tokenizer.json. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from disco.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Coder:
    """A tokenizer that may yet have to be trained."""

    name: str
    """Says all that the tokens depend on besides the text."""
    ready: Callable[[Iterator[str]], Tokenizer | None]
    """Takes the text to train on, gives the tokenizer; None stands for bytes."""


def coder_of(name: str, special: Sequence[str] = ()) -> Coder:
    """The tokenizer with a configured name; one that is trained gets the ``special`` tokens among its own.

    Raises:
        UserError: a file that is no tokenizer.
    """
    if name == "bytes":
        return Coder(name, lambda _: None)
    import tokenizers

    if name.startswith("bpe:"):
        size = int(name.removeprefix("bpe:"))
        return Coder(f"{name} tokenizers {tokenizers.__version__}", lambda text: _train_bpe(text, size, special))
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {name}: {error.strerror}") from None
    tokenizer = parse(content, name)
    digest = hashlib.sha256(content).hexdigest()
    return Coder(f"{digest} tokenizers {tokenizers.__version__}", lambda _: tokenizer)


def parse(content: bytes, name: str) -> Tokenizer:
    """The tokenizer in the bytes of a tokenizer.json called ``name``, without its limits of length.

    Raises:
        UserError: it is none.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{name} is not a Hugging Face tokenizer.json: {_one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _train_bpe(text: Iterator[str], size: int, special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with ``size`` tokens, of which 256 are the bytes; the same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2, show_progress=False,
        special_tokens=list(special),
    )  # fmt: skip
    tokenizer.train_from_iterator(text, trainer)
    if tokenizer.get_vocab_size() < size:
        raise UserError(
            f"the text yields only {tokenizer.get_vocab_size():,} BPE tokens, not bpe:{size}; ask for fewer"
        )
    return tokenizer


def encode(tokenizer: Tokenizer | None, text: str) -> NDArray[Any]:
    """Token ids of a text.

    Raises:
        UserError: the tokenizer cannot encode it.
    """
    if tokenizer is None:
        return np.frombuffer(text.encode(), np.uint8)
    with _clear_errors():
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


def encode_each(tokenizer: Tokenizer | None, texts: Sequence[str]) -> list[NDArray[Any]]:
    """Token ids of each text, those of ``encode`` but faster (no positions in the text are computed).

    Raises:
        UserError: the tokenizer cannot encode one.
    """
    if tokenizer is None:
        return [encode(None, text) for text in texts]
    with _clear_errors():
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.uint32) for item in encoded]


def vocabulary(tokenizer: Tokenizer | None) -> int:
    """One more than the largest token id."""
    return 256 if tokenizer is None else 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def smallest_dtype(vocab: int) -> str:
    """Name of the smallest unsigned integer that holds every token id."""
    return np.min_scalar_type(vocab - 1).name


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizer cannot encode the text: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
