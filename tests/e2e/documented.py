"""Runs the fenced examples of a document and compares what they print with what the document shows.

    python tests/e2e/documented.py docs/choosing.md

puts what the code prints into the document where only numbers have changed, and names what it cannot place.

A block "python" is run, in one namespace for the whole document; a block "text" right after it is what it prints. In a
block "console" a line "$ disco ..." is a command and the lines under it are what it prints, on both streams. A line
"..." stands for any lines. Blanks, line breaks and rules of tables do not count; numbers may differ by two units in
their last digit, whole numbers not at all.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from disco.cli import main

CUT = "..."
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
Span = tuple[int, int]
"""First line and line after the last."""


@dataclass(frozen=True)
class Example:
    """Something to run and the lines of the document (numbers from 0) that show what it prints."""

    kind: str
    code: str
    shown: Span


def examples(lines: Sequence[str]) -> Iterator[Example]:
    """All of a document, in order."""
    fences = [at for at, line in enumerate(lines) if line.startswith("```")]
    blocks = [(lines[start][3:].strip(), start + 1, end) for start, end in zip(fences[::2], fences[1::2], strict=True)]
    for index, (kind, start, end) in enumerate(blocks):
        if kind == "python":
            shown = (end, end)
            if index + 1 < len(blocks):
                following, first, last = blocks[index + 1]
                if following == "text" and not "".join(lines[end + 1 : first - 1]).strip():
                    shown = (first, last)
            yield Example(kind, "\n".join(lines[start:end]), shown)
        elif kind == "console":
            commands = [at for at in range(start, end) if lines[at].startswith("$ ")]
            for at, after in zip(commands, [*commands[1:], end], strict=True):
                yield Example(kind, lines[at][2:], (at + 1, after))


def run(example: Example, names: dict[str, Any]) -> list[str]:
    """What it prints, by lines that are not blank."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if example.kind == "python":
            exec(compile(example.code, "<document>", "exec"), names)
        else:
            program, *arguments = shlex.split(example.code)
            assert program == "disco", f"not a command of disco: {example.code}"
            code = main(arguments)
            assert code == 0, f"{example.code} exits with {code}: {printed.getvalue()}"
    return [line.rstrip() for line in printed.getvalue().splitlines() if line.strip()]


@contextlib.contextmanager
def workplace(docs: Path, folder: Path) -> Iterator[None]:
    """An empty folder to run in, but for the documents."""
    (folder / "docs").symlink_to(docs.resolve())
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Piece:
    """Shown lines without a cut between them, and where they are printed."""

    shown: Span
    printed: Span | None
    """None: nowhere."""
    problem: str
    """What differs; empty if nothing does."""


def compare(shown: Sequence[str], printed: Sequence[str]) -> list[Piece]:
    """Finds the pieces of what is shown, one after the other, in what is printed."""
    cuts = [at for at, line in enumerate(shown) if line.strip() == CUT]
    spans = list(zip([0, *(at + 1 for at in cuts)], [*cuts, len(shown)], strict=True))
    words = _words(printed)
    at, pieces = 0, []
    for index, (start, end) in enumerate(spans):
        own = _words(shown[start:end])
        if not own and (cuts or not words):
            continue
        starts = range(at, len(words) - len(own) + 1)
        if index == 0:
            starts = starts[:1]
        if index == len(spans) - 1:  # to the end
            starts = starts[-1:] if index or len(own) == len(words) else range(0)
        fits = [first for first in starts if _alike(own, words[first:])]
        if not fits:
            pieces.append(Piece((start, end), None, _first_difference(own, words[at:])))
            continue
        first = max(fits, key=lambda first: (_equal(own, words[first:]), -first))
        found = words[first : first + len(own)]
        at = first + len(own)
        wrong = [f"{a} (prints {b})" for (a, _), (b, _) in zip(own, found, strict=True) if not same(a, b)]
        pieces.append(Piece((start, end), (found[0][1], found[-1][1] + 1), ", ".join(wrong)))
    return pieces


def _first_difference(own: Sequence[tuple[str, int]], others: Sequence[tuple[str, int]]) -> str:
    """Where the words part, at the place of the longest beginning that they share."""
    if not own:
        return f"it prints what is not shown: {' '.join(word for word, _ in others[:8])!r}"
    shared = {at: _shared(own, others[at:]) for at in range(len(others))}
    at = max(shared, key=lambda at: (shared[at], -at), default=0)
    n = shared.get(at, 0)
    shown, printed = (" ".join(word for word, _ in part) for part in (own[max(n - 4, 0) : n + 4], others[at + n :][:4]))
    return f"{shown!r} is shown, but from its word {min(n, 4) + 1} on it prints {printed!r}"


def _shared(own: Sequence[tuple[str, int]], others: Sequence[tuple[str, int]]) -> int:
    """How many words the two have in common from their beginnings on."""
    pairs = zip(own, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: _alike([pair[0]], [pair[1]]), pairs))


def _words(lines: Sequence[str]) -> list[tuple[str, int]]:
    """Words and the lines that they are on."""
    return [(word, at) for at, line in enumerate(lines) for word in line.split() if word.strip("─")]


def _alike(own: Sequence[tuple[str, int]], others: Sequence[tuple[str, int]]) -> bool:
    pairs = zip(own, others, strict=False)
    return len(own) <= len(others) and all(NUMBER.sub("#", a) == NUMBER.sub("#", b) for (a, _), (b, _) in pairs)


def _equal(own: Sequence[tuple[str, int]], others: Sequence[tuple[str, int]]) -> int:
    return sum(a == b for (a, _), (b, _) in zip(own, others, strict=False))


def same(shown: str, printed: str) -> bool:
    """Whether two words are the same but for the last digits of their numbers."""
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    return all(_near(a, b) for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True))


def _near(shown: str, printed: str) -> bool:
    a, b = (float(text.replace(",", "")) for text in (shown, printed))
    if "e" in shown or "e" in printed:
        return abs(a - b) <= 0.2 * abs(b)
    digits = max(len(text.partition(".")[2]) for text in (shown, printed))
    return abs(a - b) <= (2.01 * 10.0**-digits if digits else 0)


def differences(document: Path, folder: Path) -> Iterator[str]:
    """Runs everything and says where the document is wrong."""
    lines = document.read_text().splitlines()
    names: dict[str, Any] = {"__name__": "__main__"}
    with workplace(document.parent, folder):
        for example in examples(lines):
            for piece in compare(lines[slice(*example.shown)], run(example, names)):
                if piece.problem:
                    yield f"{document.name}, {example.code.splitlines()[0]!r}: {piece.problem}"


def rewrite(document: Path, folder: Path) -> list[str]:
    """Puts what is printed in place of what is shown; returns what it cannot place.

    Pieces that differ in numbers only are found by their words, others by those of their first and last lines.
    """
    lines = document.read_text().splitlines()
    names: dict[str, Any] = {"__name__": "__main__"}
    left, changes = [], []
    with workplace(document.parent, folder):
        for example in examples(lines):
            start, end = example.shown
            printed = run(example, names)
            for piece in compare(lines[start:end], printed):
                first, last = (start + at for at in piece.shown)
                place = piece.printed or _between(lines[first], lines[last - 1], printed)
                if place is None:
                    left.append(f"{example.code.splitlines()[0]!r}: {piece.problem}")
                elif piece.problem:
                    changes.append((first, last, printed[slice(*place)]))
    for first, last, new in reversed(changes):
        lines[first:last] = new
    document.write_text("\n".join(lines) + "\n")
    return left


def _between(first: str, last: str, printed: Sequence[str]) -> Span | None:
    """The printed lines from one with the words of ``first`` to the next one with those of ``last``."""

    def words(line: str) -> list[str]:
        return [NUMBER.sub("#", word) for word in line.split()]

    starts = [at for at, line in enumerate(printed) if words(line) == words(first)]
    ends = [at + 1 for at, line in enumerate(printed) if words(line) == words(last) and starts and at >= starts[0]]
    return (starts[0], ends[0]) if ends else None


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as temporary:
            for problem in rewrite(path, Path(temporary)):
                print(f"{path}: {problem}", file=sys.stderr)
