"""``disco data prepare`` and ``disco data check``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from disco.cli import _show
from disco.runs.units import duration, short
from disco.train.documents import SEPARATOR
from disco.train.shards.index import Index, load, verify
from disco.train.shards.prepare import Progress, Request, prepare_folder

LINE_SECONDS = 10.0


def prepare(
    source: Sequence[str], out: Path, tokenizer: str, text_field: str, boundary: str | None, sizes: Mapping[str, int],
    workers: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Makes a folder of tokens."""
    request = Request(
        source=tuple(source),
        tokenizer=tokenizer,
        text_field=text_field,
        boundary=SEPARATOR if boundary is None else boundary,
        **sizes,
    )
    with _progress("shards made") as progress:
        index = prepare_folder(request, out, workers or len(os.sched_getaffinity(0)), progress)
    return _summary(out, index, as_json)


def check(folder: Path, as_json: bool) -> int:
    """Verifies a folder of tokens."""
    index = load(folder)
    with _progress("shards verified") as progress:
        verify(folder, index, {}, lambda done: progress(done, len(index.shards), index.tokens))
    return _summary(folder, index, as_json)


def _summary(folder: Path, index: Index, as_json: bool) -> int:
    documents = sum(shard.documents or 0 for shard in index.shards)
    if as_json:
        _show.event(
            "result", folder=folder, digest=index.digest, tokens=index.tokens, vocab=index.vocab,
            dtype=index.dtype, shards=len(index.shards), documents=documents,
        )  # fmt: skip
    else:
        print(
            f"{index.tokens:,} tokens of {index.vocab:,} kinds ({index.tokenizer}) from {documents:,} documents "
            f"in {len(index.shards):,} shards: {folder}"
        )
    return 0


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A bar on a terminal, else a line every ten seconds; on standard error."""
    begun = time.monotonic()

    def text(done: int, total: int, tokens: int) -> str:
        left = (time.monotonic() - begun) / done * (total - done)
        return f"{done}/{total} {what}, {short(tokens)} tokens" + (f", {duration(left)} left" if done < total else "")

    if not sys.stderr.isatty():
        yield _lines(text)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting")
        yield lambda done, total, tokens: bar.update(
            task, completed=done, total=total, description=text(done, total, tokens)
        )


def _lines(text: Callable[[int, int, int], str]) -> Progress:
    last = time.monotonic()

    def progress(done: int, total: int, tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS or done == total:
            last = time.monotonic()
            print(text(done, total, tokens), file=sys.stderr, flush=True)

    return progress
