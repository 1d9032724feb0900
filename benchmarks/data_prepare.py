"""How fast does ``disco data prepare`` turn text into tokens, next to ``tokenizers`` alone, and in how much memory?

    python benchmarks/data_prepare.py [--megabytes 200] [--workers 1] [--rounds 3] [--tokenizer bpe:16384]
                                       [--folder DIR]

The text is that of the installed packages: sources, headers, documentation. Arms take turns, each in a process of its
own with as many threads as there are workers:

    prepare     ``disco data prepare`` from start to end: reads files, encodes, hashes, writes, syncs
    fast        ``Tokenizer.encode_batch_fast`` on the same texts in memory, 128 at a time, nothing else
    plain       ``Tokenizer.encode_batch``, likewise

Rates are in megabytes of text per second, by the clock and by CPU time (all processes). Memory is the largest sum of
what the processes of ``prepare`` hold at once, mapped pages shared between them counted for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = {".py", ".pyi", ".h", ".rst", ".md", ".txt", ".json", ".js"}

ALONE = """
import json, sys, time
from tokenizers import Tokenizer

from disco.train import documents
from disco.train.shards.worker import cut

folder, name = sys.argv[1:]
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
encode = getattr(tokenizer, name)
texts = []
for piece in documents.pieces(documents.files([folder + "/text"]), "text"):
    texts += [piece] if piece is documents.SEPARATOR else cut(piece)
wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
for start in range(0, len(texts), 128):
    tokens += sum(map(len, encode(texts[start : start + 128], add_special_tokens=False)))
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "tokens": tokens}))
"""


def documents_of_packages() -> Iterator[str]:
    """Texts of the installed packages and of Python itself, in an order that depends on their names only."""
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        for path in sorted(Path(root).rglob("*")):
            inside = path.relative_to(root).parts
            if (
                path.suffix in SUFFIXES
                and path.is_file()
                and (root.endswith("packages") or "site-packages" not in inside)
            ):
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text and "\0" not in text:
                    yield text


def write_texts(folder: Path, size: int) -> int:
    """Writes at least ``size`` bytes of text as .jsonl (half of it), .txt and .parquet files; returns how many.

    Raises:
        RuntimeError: the packages have less text than that.
    """
    import polars

    folder.mkdir(parents=True)
    texts, total, row = documents_of_packages(), 0, []
    with (folder / "a.jsonl").open("w") as lines, (folder / "b.txt").open("w") as flat:
        for text in texts:
            part = total * 4 // size
            if part < 2:
                lines.write(json.dumps({"text": text}) + "\n")
            elif part == 2:
                flat.write(text + "\n")
            elif part == 3:
                row.append(text)
            else:
                break
            total += len(text.encode())
    polars.DataFrame({"text": row}).write_parquet(folder / "c.parquet")
    if total < size:
        raise RuntimeError(f"the installed packages have {total:,} bytes of text, not {size:,}")
    return total


class Memory:
    """The largest sum of resident memory, in bytes, that a process and its children have had at once."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        try:
            children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (self._pid, *children)]
        except (OSError, IndexError):
            return 0
        return sum(pages) * resource.getpagesize()

    def stop(self) -> int:
        """Ends watching; the peak."""
        self._ended.set()
        self._thread.join()
        return self.peak


def prepare(folder: Path, tokenizer: str, workers: int, shard_bytes: str = "2^24") -> dict[str, float]:
    """One run of ``disco data prepare``: seconds, tokens, bytes of memory."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "disco", "data", "prepare", str(folder / "text"), "--out", str(out), "--json"]
    command += ["--tokenizer", tokenizer, "--workers", str(workers), "--shard-bytes", shard_bytes]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    memory = Memory(process.pid)
    printed, _ = process.communicate()
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "tokens": json.loads(printed)["tokens"], "memory": memory.stop()}


def alone(folder: Path, name: str, workers: int) -> dict[str, float]:
    """One run of a method of ``tokenizers`` on the same documents: seconds, tokens."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", ALONE, str(folder), name]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    result: dict[str, float] = json.loads(printed)
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Prints a table and returns it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="bpe:16384")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = write_texts(folder / "text", options.megabytes * 10**6)
        trained = prepare(folder, options.tokenizer, options.workers)  # also the form with a tokenizer to train
        shutil.copy(folder / "out" / "tokenizer.json", folder / "tokenizer.json")
        print(f"{size:,} bytes, {trained['tokens']:,} tokens; with training: {trained['wall']:.1f} s, "
              f"{trained['memory'] / 1e6:.0f} MB of memory")  # fmt: skip
        rates: dict[str, list[tuple[float, float]]] = {"prepare": [], "fast": [], "plain": []}
        memory = trained["memory"]
        for _ in range(options.rounds):
            made = prepare(folder, str(folder / "tokenizer.json"), options.workers)
            memory = max(memory, made["memory"])
            fast = alone(folder, "encode_batch_fast", options.workers)
            plain = alone(folder, "encode_batch", options.workers)
            for arm, run in (("prepare", made), ("fast", fast), ("plain", plain)):
                rates[arm].append((size / run["wall"] / 1e6, size / run["cpu"] / 1e6))
                print(
                    f"{arm:8} {rates[arm][-1][0]:6.2f} MB/s {rates[arm][-1][1]:6.2f} MB/CPU s {run['tokens']:,}",
                    flush=True,
                )
        result: dict[str, Any] = {"bytes": size, "memory": memory}
        for arm in ("fast", "plain"):
            for which, unit in enumerate(("wall", "cpu")):
                ratios = [
                    ours[which] / theirs[which] for ours, theirs in zip(rates["prepare"], rates[arm], strict=True)
                ]
                result[f"prepare/{arm} {unit}"] = statistics.median(ratios)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
