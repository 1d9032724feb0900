"""Tables of runs that were made elsewhere, as the commands take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disco.cli._options import Tables
from disco.runs.ingest import Ingested, ingest
from disco.runs.sources import read_tables


def from_tables(paths: Sequence[Path], tables: Tables) -> Ingested:
    """The tables, checked and in the units of this project."""
    source = ", ".join(path.name for path in paths)
    table = read_tables(paths, tables.join, tables.on)
    return ingest(table, tables.maps, tables.preset, tables.form, source)


def said(ingested: Ingested) -> list[str]:
    """What to tell about a table: rows that were dropped, by reason, and what was assumed."""
    dropped = [f"{count} of {ingested.rows} rows dropped: {reason}" for reason, count in ingested.dropped.items()]
    return [f"{ingested.source}: {text}" for text in (*dropped, *ingested.notes)]
