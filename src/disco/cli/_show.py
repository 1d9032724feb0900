"""How commands print: tables through rich, JSON without NaN."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disco.report.text import grid, terminal_width
from disco.runs.reader import Runs
from disco.runs.units import UNKNOWN


def fixed(value: float | None) -> str:
    """A loss; a dash where it is unknown."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else UNKNOWN


def table(rows: Sequence[Mapping[str, str]], title: str = "") -> None:
    """Prints rows that share their keys; columns that are empty in all rows are left out."""
    print(grid(rows, title, terminal_width()), end="\n\n")


def document(content: Any) -> None:
    """Prints JSON; a number that is not finite becomes null."""
    print(json.dumps(plain(content), indent=1, allow_nan=False))


def event(name: str, **fields: Any) -> None:
    """Prints one line of JSON, after those of the progress."""
    print(json.dumps(plain({"event": name, **fields}), allow_nan=False))


def plain(value: Any) -> Any:
    """JSON types: no NaN, no tuples, no paths."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def tell(read: Runs) -> int:
    """Warns of records that are damaged, and returns the exit code of a command that did its work with the rest."""
    warn((*read.problems, *read.notes))
    return 2 if read.problems else 0


def warn(lines: Iterable[str], most: int = 10) -> None:
    """Prints warnings on stderr, not more than ``most``."""
    lines = list(lines)
    for line in lines[:most]:
        print(f"disco: warning: {line}", file=sys.stderr)
    if len(lines) > most:
        print(f"disco: warning: and {len(lines) - most} more like these", file=sys.stderr)
