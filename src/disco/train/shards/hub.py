"""Data sets read through the library ``datasets`` (extra ``hf``), a document at a time, nothing kept on disk. No torch.

A source is ``hf:NAME[:CONFIGURATION][@SPLIT][#REVISION]``; NAME is one of the hub or a folder, SPLIT is train unless
given. Its parts are those that the data set is stored in, usually files.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from disco.errors import UserError
from disco.train.documents import SEPARATOR

PREFIX = "hf:"
_FORM = re.compile(r"hf:(?P<path>[^:@#]+)(?::(?P<name>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<revision>.+))?")


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count`` of a data set."""

    source: str
    number: int
    count: int

    def to_json(self) -> dict[str, Any]:
        """JSON types, the arguments of the constructor."""
        return dataclasses.asdict(self)

    def read(self, text_field: str) -> Iterator[str]:
        """Yields documents, each followed by SEPARATOR.

        Raises:
            UserError: the data set cannot be read, or a document has no text.
        """
        dataset = _open(self.source).shard(num_shards=self.count, index=self.number)
        with _clear_errors(self.source):
            for row, record in enumerate(dataset, start=1):
                text = record.get(text_field)
                if not isinstance(text, str):
                    where = f"{self.source}, part {self.number + 1}, row {row}"
                    raise UserError(f"{where}: no text in {text_field!r}; the fields are {', '.join(record)}")
                yield text
                yield SEPARATOR


def parts(source: str) -> int:
    """Number of parts of a data set.

    Raises:
        UserError: it cannot be opened.
    """
    return int(_open(source).num_shards)


@functools.lru_cache(maxsize=4)
def _open(source: str) -> Any:
    match = _FORM.fullmatch(source)
    if match is None:
        raise UserError(f"a data set is named hf:NAME[:CONFIGURATION][@SPLIT][#REVISION], got {source!r}")
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{source} needs the extra 'hf': pip install 'disco-scion[lab,hf]'") from None
    with _clear_errors(source):
        return datasets.load_dataset(**{**match.groupdict(), "split": match["split"] or "train"}, streaming=True)


@contextmanager
def _clear_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the library raises whatever its many readers do
        raise UserError(f"cannot read {source}: {type(error).__name__}: {' '.join(str(error).split())}") from None
