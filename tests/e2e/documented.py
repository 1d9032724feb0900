"""Runs the fenced examples of a document and compares what they print with what the document shows.

    python tests/e2e/documented.py docs/choosing.md

puts the numbers of the code as it is into the document; sentences that have changed it leaves, and names.

A block "python" is run, in one namespace for the whole document; a block "text" right after it is what it prints. In a
block "console" a line "$ disco ..." is a command and the lines under it are what it prints, on both streams. A line
"..." stands for any lines. Blanks and rules of tables do not count; numbers may differ by two units in their last
digit, whole numbers not at all.
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
    """What it prints, by lines."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if example.kind == "python":
            exec(compile(example.code, "<document>", "exec"), names)
        else:
            program, *arguments = shlex.split(example.code)
            assert program == "disco", f"not a command of disco: {example.code}"
            code = main(arguments)
            assert code == 0, f"{example.code} exits with {code}: {printed.getvalue()}"
    return printed.getvalue().splitlines()


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


def same(shown: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers that are near enough."""
    if _words(shown) != _words(printed):
        return False
    return all(_near(a, b) for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True))


def _words(line: str) -> str:
    return re.sub(r"─+", "─", " ".join(NUMBER.sub("#", line).split()))


def _near(shown: str, printed: str) -> bool:
    a, b = (float(text.replace(",", "")) for text in (shown, printed))
    digits = max(len(re.sub(r"e.*", "", text).partition(".")[2]) for text in (shown, printed))
    if "e" in shown or "e" in printed:
        return abs(a - b) <= 0.2 * abs(b)
    return abs(a - b) <= (2.01 * 10.0**-digits if digits else 0)


def matched(shown: Sequence[str], printed: Sequence[str], alike: Any = same) -> tuple[dict[int, str], list[str]]:
    """Which printed line each shown one is (by index), and the shown ones that nothing matches."""
    found: dict[int, str] = {}
    rest = [line for line in printed if line.strip()]
    missing: list[str] = []
    anywhere = False
    for index, line in enumerate(shown):
        if line.strip() == CUT:
            anywhere = True
        elif line.strip():
            reach = len(rest) if anywhere else 1
            at = next((at for at, other in enumerate(rest[:reach]) if alike(line, other)), None)
            if at is None:
                near = next((other for other in rest if _words(other) == _words(line)), rest[0] if rest else "nothing")
                missing.append(f"{line.strip()}\n  but it prints: {near.strip()}")
                rest = rest[1:] if not anywhere else rest
                continue
            found[index], rest, anywhere = rest[at], rest[at + 1 :], False
    if rest and not anywhere and not missing:
        missing.append(f"it prints more than is shown: {rest[0].strip()}")
    return found, missing


def differences(document: Path, folder: Path) -> Iterator[str]:
    """Runs everything and says where the document is wrong."""
    lines = document.read_text().splitlines()
    names: dict[str, Any] = {"__name__": "__main__"}
    with workplace(document.parent, folder):
        for example in examples(lines):
            printed = run(example, names)
            for text in matched(lines[slice(*example.shown)], printed)[1]:
                yield f"{document.name}, under {example.code.splitlines()[0]!r}: {text}"


def rewrite(document: Path, folder: Path) -> list[str]:
    """Puts the printed lines in place of the shown ones that have the same words; returns what it could not place."""
    lines = document.read_text().splitlines()
    names: dict[str, Any] = {"__name__": "__main__"}
    left = []
    with workplace(document.parent, folder):
        for example in examples(lines):
            start, end = example.shown
            found, missing = matched(
                lines[start:end], run(example, names), lambda a, b: bool(_words(a) == _words(b))
            )
            for index, line in found.items():
                lines[start + index] = line.rstrip()
            left += missing
    document.write_text("\n".join(lines) + "\n")
    return left


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as temporary:
            for problem in rewrite(path, Path(temporary)):
                print(f"{path}: {problem}", file=sys.stderr)
