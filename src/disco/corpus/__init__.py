"""The embedded corpus: 14 MB of public-domain English in 118 documents. See PROVENANCE.md in this folder."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

PATH = Path(__file__).with_name("corpus.jsonl.xz")
"""One JSON object a line: {"name": "austen/emma", "text": "..."}, sorted by name."""


def documents() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of each document, sorted by name; names look like "shakespeare/hamlet"."""
    with lzma.open(PATH, "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            yield document["name"], document["text"]


def text() -> bytes:
    """The whole corpus as UTF-8, each document followed by a blank line."""
    return "".join(f"{document}\n\n" for _, document in documents()).encode()
