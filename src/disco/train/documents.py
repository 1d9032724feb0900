"""Text from the embedded corpus and from .txt, .jsonl and .parquet files, read a piece at a time. No torch.

A document is a text file, a line of a .jsonl file or a row of a .parquet file. Each is followed by a blank line.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from disco import corpus
from disco.errors import UserError

SEPARATOR = "\n\n"
"""Ends every document."""

PIECE = 2**20
"""Characters of a text file that are held at once; pieces end at the end of a line where they can."""

ROWS, SLICE = 2**12, 2**22
"""Rows and bytes (compressed) of a .parquet file that are held at once, besides the row group that they are in."""

LINE = 2**28
"""Bytes of a line of a .jsonl file, at most: it is held whole."""


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes of .txt and .jsonl, rows of .parquet, from ``start`` up to ``stop`` or the end."""

    path: Path
    start: int = 0
    stop: int | None = None


def files(source: Iterable[str]) -> list[Path]:
    """The files that ``source`` names, in the order in which they are read.

    Args:
        source: "corpus", files, or folders. A folder stands for all the files with a known suffix below it, sorted by
            name; hidden ones are passed over.

    Raises:
        UserError: nothing there, no such files in a folder, an unknown suffix, or a file named twice.
    """
    found: list[Path] = []
    try:
        for name in source:
            found += _files_of(corpus.PATH if name == "corpus" else Path(name))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    path, times = Counter(path.resolve() for path in found).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path} is named {times} times in data.source; the training text must not repeat")
    return found


def _files_of(path: Path) -> list[Path]:
    kinds = ".txt, .jsonl or .parquet"
    if path.is_dir():
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in _READERS and file.is_file() and not _hidden(file.relative_to(path))
        ]
        if not inside:
            raise UserError(f"{path} holds no {kinds} files")
        return inside
    if str(path).startswith("hf:"):
        raise UserError(f"a data set of the hub is prepared first: disco data prepare {path} --out FOLDER")
    if not path.exists():
        raise UserError(f"no such file or folder: {path}; data.source names files, folders or 'corpus'")
    if path != corpus.PATH and path.suffix.lower() not in _READERS:
        raise UserError(f"{path} has an unknown suffix {path.suffix!r}; data are {kinds} files")
    return [path]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def pieces(paths: Iterable[Path], text_field: str) -> Iterator[str]:
    """Yields the text of all documents in pieces; joined together they are the documents, each with its SEPARATOR.

    Args:
        paths: what ``files`` returned.
        text_field: field of .jsonl and column of .parquet files that holds the text.

    Raises:
        UserError: a file that is empty, cannot be read, or is not what its suffix says; "file:line: why" for .jsonl.
    """
    for path in paths:
        empty = True
        for piece in read(Span(path), text_field):
            empty = empty and not piece.strip()
            yield piece
        if empty:
            raise UserError(f"{path} is empty: it holds no text")


def read(span: Span, text_field: str) -> Iterator[str]:
    """Yields the text of a part of a file as ``pieces`` does. The very object SEPARATOR marks the end of a document.

    Raises:
        UserError: as ``pieces``, but nothing for an empty part.
    """
    try:
        yield from _embedded() if span.path == corpus.PATH else _READERS[span.path.suffix.lower()](span, text_field)
    except OSError as error:
        raise UserError(f"cannot read {span.path}: {error.strerror or error}") from None


def _embedded() -> Iterator[str]:
    for _, text in corpus.documents():
        yield text
        yield SEPARATOR


class _Part(io.RawIOBase):
    """The bytes of a span."""

    def __init__(self, span: Span) -> None:
        self._file = span.path.open("rb", buffering=0)
        self._file.seek(span.start)
        self._left = span.path.stat().st_size - span.start if span.stop is None else span.stop - span.start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(memoryview(buffer)[: self._left])
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(span: Span) -> BinaryIO:
    return io.BufferedReader(_Part(span), 2**16)


def _text_file(span: Span, _: str) -> Iterator[str]:
    path, encoding = span.path, "utf-8" if span.start else "utf-8-sig"
    with io.TextIOWrapper(_open(span), encoding=encoding, newline="") as file:
        try:
            while piece := file.read(PIECE) + file.readline(PIECE):
                if "\0" in piece:
                    raise UserError(f"{path} is binary: it holds NUL bytes; data must be UTF-8 text")
                yield piece
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it or leave it out") from None
    if span.stop is None:
        yield SEPARATOR


def _json_lines(span: Span, text_field: str) -> Iterator[str]:
    with _open(span) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE), b""), start=1):
            if line.strip():
                try:
                    if len(line) == LINE:
                        raise ValueError(f"this line is longer than {LINE:,} bytes; cut the document")
                    yield _record_text(line, text_field)
                except ValueError as error:
                    raise UserError(f"{span.path}:{_lines_before(span) + number}: {error}") from None
                yield SEPARATOR


def _lines_before(span: Span) -> int:
    with _open(Span(span.path, 0, span.start)) as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(PIECE), b""))


def _record_text(line: bytes, text_field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("this line is not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("this line is not a JSON object")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r}; the fields are {', '.join(record) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {text_field!r} is not valid Unicode") from None
    return text


def _parquet(span: Span, text_field: str) -> Iterator[str]:
    import polars

    path = span.path
    try:
        table = polars.scan_parquet(path, glob=False)
        columns = table.collect_schema()
        if text_field not in columns:
            raise UserError(f"{path} has no column {text_field!r}; the columns are {', '.join(columns)}")
        if columns[text_field] != polars.String:
            raise UserError(f"{path}: column {text_field!r} is not text but {columns[text_field]}")
        total = rows(path)
        stop = total if span.stop is None else span.stop
        step = max(1, min(ROWS, SLICE * total // path.stat().st_size))
        for start in range(span.start, stop, step):
            texts = table.select(text_field).slice(start, min(step, stop - start)).collect()[text_field]
            if texts.null_count():
                row = start + texts.is_null().to_list().index(True) + 1
                raise UserError(f"{path}: row {row} has no {text_field!r}")
            for text in texts:
                yield text
                yield SEPARATOR
    except polars.exceptions.PolarsError:
        raise UserError(f"{path} is not a readable .parquet file") from None


def rows(path: Path) -> int:
    """Rows of a .parquet file.

    Raises:
        UserError: it is none.
    """
    import polars

    try:
        return int(polars.scan_parquet(path, glob=False).select(polars.len()).collect().item())
    except polars.exceptions.PolarsError:
        raise UserError(f"{path} is not a readable .parquet file") from None


_READERS: dict[str, Callable[[Span, str], Iterator[str]]] = {
    ".txt": _text_file,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
