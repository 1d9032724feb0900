"""Text for a terminal: lines of a given width and tables of strings."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disco.runs.units import UNKNOWN

WIDTH = 96
"""Columns of running text."""
LIMITS = (40, 30, 22, 16)
"""Characters at which the cells of a table break between words, the first that suits a narrow terminal."""
Row = Mapping[str, str]


def terminal_width() -> int | None:
    """Columns of the terminal; None where stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(line: str, indent: str = "") -> str:
    """A sentence in lines, those after the first a little further in."""
    return textwrap.fill(
        line, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def grid(rows: Sequence[Row], title: str = "", width: int | None = None) -> str:
    """Rows that share their keys as a table; columns without any value are left out.

    Args:
        rows: Texts by column.
        title: A line above.
        width: Columns of the terminal; where they are too few, cells break into lines. None: a row is a line, however
            long, which suits grep.
    """
    columns = [key for key in (rows[0] if rows else ()) if any(row[key] not in ("", UNKNOWN) for row in rows)]
    cells = {column: [row[column] for row in rows] for column in columns}
    table, most = _table(cells)
    for limit in LIMITS if width is not None else ():
        if most <= (width or 0):
            break
        table, most = _table({_folded(name, limit): [_folded(t, limit) for t in of] for name, of in cells.items()})
    console = Console(file=StringIO(), width=most, color_system=None)
    console.print(table)
    assert isinstance(console.file, StringIO)
    lines = (line.rstrip() for line in console.file.getvalue().splitlines())
    return "\n".join((*((title,) if title else ()), *(line for line in lines if line)))


def _table(cells: Mapping[str, Sequence[str]]) -> tuple[Table, int]:
    """By column, and the width that it takes."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in cells:
        table.add_column(name, no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))
    return table, Console(width=10_000).measure(table).maximum


def _folded(text: str, limit: int) -> str:
    """Text in lines, an interval on one of its own."""
    parts = text.replace(" [", "\n[").replace(" .. ", "..").split("\n")
    return "\n".join(textwrap.fill(part, limit, break_long_words=False, break_on_hyphens=False) for part in parts)
