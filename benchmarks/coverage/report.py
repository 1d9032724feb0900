"""Tables of the coverage benchmarks, written into results.md as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("results.md")


def section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Prints a table and replaces the section of this title in results.md."""
    lines = [
        f"## {title}",
        "",
        *([note, ""] if note else []),
        _line(head),
        _line(["---"] * len(head)),
        *map(_line, rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    old = RESULTS.read_text() if RESULTS.exists() else "# Coverage of the 90% intervals on known truth\n"
    parts = old.split("\n## ")
    kept = [part.rstrip("\n") for part in parts[1:] if part.split("\n", 1)[0] != title]
    RESULTS.write_text("\n\n## ".join([parts[0].rstrip("\n"), *kept, text.removeprefix("## ")]))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
