"""Text from the embedded corpus and from .txt, .jsonl and .parquet files, read a piece at a time. No torch.

A document is a text file, a line of a .jsonl file or a row of a .parquet file. Each is followed by a blank line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from disco import corpus
from disco.errors import UserError

SEPARATOR = "\n\n"
"""Ends every document."""

PIECE = 2**20
"""Characters of a text file that are held at once; pieces end at the end of a line where they can."""

ROWS = 2**12
"""Rows of a .parquet file that are held at once."""


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
        try:
            for piece in _embedded() if path == corpus.PATH else _READERS[path.suffix.lower()](path, text_field):
                empty = empty and not piece.strip()
                yield piece
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        if empty:
            raise UserError(f"{path} is empty: it holds no text")


def _embedded() -> Iterator[str]:
    for _, text in corpus.documents():
        yield text
        yield SEPARATOR


def _text_file(path: Path, _: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            while piece := file.read(PIECE) + file.readline(PIECE):
                if "\0" in piece:
                    raise UserError(f"{path} is binary: it holds NUL bytes; data must be UTF-8 text")
                yield piece
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it or leave it out") from None
    yield SEPARATOR


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield _record_text(line, text_field)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: {error}") from None
                yield SEPARATOR


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


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import polars

    try:
        table = polars.scan_parquet(path, glob=False)
        columns = table.collect_schema()
        if text_field not in columns:
            raise UserError(f"{path} has no column {text_field!r}; the columns are {', '.join(columns)}")
        if columns[text_field] != polars.String:
            raise UserError(f"{path}: column {text_field!r} is not text but {columns[text_field]}")
        height = table.select(polars.len()).collect().item()
        for start in range(0, height, ROWS):
            texts = table.select(text_field).slice(start, ROWS).collect()[text_field]
            if texts.null_count():
                row = start + texts.is_null().to_list().index(True) + 1
                raise UserError(f"{path}: row {row} has no {text_field!r}")
            for text in texts:
                yield text
                yield SEPARATOR
    except polars.exceptions.PolarsError:
        raise UserError(f"{path} is not a readable .parquet file") from None


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _text_file,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
