"""Cuts the sources into units, each of which becomes a shard: a function of the files and the size asked for only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disco import corpus
from disco.errors import UserError
from disco.train import documents
from disco.train.documents import LINE, PIECE, Span
from disco.train.shards import hub


@dataclass(frozen=True)
class Unit:
    """The text of one shard: parts of files, or of a data set of the hub."""

    parts: tuple[Span | hub.Part, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """JSON types; ``from_json`` is the inverse."""
        return [part.to_json() if isinstance(part, hub.Part) else _span_to_json(part) for part in self.parts]

    @classmethod
    def from_json(cls, content: list[dict[str, Any]]) -> Unit:
        """The unit that ``to_json`` described."""
        return cls(tuple(hub.Part(**part) if "source" in part else _span_from_json(part) for part in content))

    def read(self, text_field: str) -> Iterator[str]:
        """The text, as ``documents.read``."""
        for part in self.parts:
            yield from part.read(text_field) if isinstance(part, hub.Part) else documents.read(part, text_field)


def _span_to_json(span: Span) -> dict[str, Any]:
    return {"path": str(span.path), "start": span.start, "stop": span.stop}


def _span_from_json(content: dict[str, Any]) -> Span:
    return Span(Path(content["path"]), content["start"], content["stop"])


def identities(source: Iterable[str]) -> dict[str, list[int]]:
    """What tells whether a source has changed: sizes and times of files, the number of parts of a data set.

    Raises:
        UserError: a source that cannot be used, or is named twice; see ``documents.files``.
    """
    found: dict[str, list[int]] = {}
    names = list(source)
    local = [name for name in names if not name.startswith(hub.PREFIX)]
    for path in documents.files(local) if local else ():
        stat = path.stat()
        found[str(path.resolve())] = [stat.st_size, stat.st_mtime_ns]
    for name in (name for name in names if name.startswith(hub.PREFIX)):
        if name in found:
            raise UserError(f"{name} is named twice; the training text must not repeat")
        found[name] = [hub.parts(name)]
    return found


def units(found: dict[str, list[int]], size: int) -> Iterator[Unit]:
    """The units of what ``identities`` found, in order, each of about ``size`` bytes of its files.

    A part of a data set of the hub is a unit, however large.

    Raises:
        UserError: a file that cannot be read.
    """
    waiting: list[Span | hub.Part] = []
    total = 0.0
    for part, weight in _parts(found, size):
        if waiting and total + weight > size:
            yield Unit(tuple(waiting))
            waiting, total = [], 0.0
        waiting.append(part)
        total += weight
    if waiting:
        yield Unit(tuple(waiting))


def _parts(found: dict[str, list[int]], size: int) -> Iterator[tuple[Span | hub.Part, float]]:
    """Parts of all sources and their bytes; a part of a data set is alone in its unit."""
    for name, identity in found.items():
        if name.startswith(hub.PREFIX):
            yield from ((hub.Part(name, number, identity[0]), math.inf) for number in range(identity[0]))
        else:
            spans = _spans(Path(name), identity[0], size)
            yield from ((span, identity[0] / len(spans)) for span in spans)


def _spans(path: Path, bytes_: int, size: int) -> list[Span]:
    """A file in equal parts that end with a line (or a row, or at least a character); none of an empty file."""
    count = -(-bytes_ // size)
    if count <= 1 or path == corpus.PATH:
        return [Span(path)] if bytes_ else []
    try:
        if path.suffix.lower() == ".parquet":
            total = documents.rows(path)
            cuts = [number * total // count for number in range(1, count)]
        else:
            whole_lines = path.suffix.lower() == ".jsonl"
            with path.open("rb") as file:
                cuts = []
                for number in range(1, count):
                    file.seek(number * bytes_ // count)
                    cuts.append(file.tell() + _to_a_cut(file.readline(LINE if whole_lines else PIECE), whole_lines))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    starts = [0, *sorted(set(cuts) - {0, bytes_})]
    return [Span(path, start, stop) for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def _to_a_cut(line: bytes, whole_lines: bool) -> int:
    """Bytes up to where a text can be cut: after the line, or before the next character if it has no end in sight."""
    if whole_lines or line.endswith(b"\n"):
        return len(line)
    return next((number for number, byte in enumerate(line[:4]) if byte & 0xC0 != 0x80), 0)
