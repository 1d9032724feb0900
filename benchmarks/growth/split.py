"""Which runs the growth of norms is fitted to, and which it has to forecast: decided before any of them was trained.

    python -m benchmarks.growth.split FOLDER       (writes benchmarks/growth/split.json)

Every run has a part ("fit" or "test"), a kind, and a configuration. The rates are ``offset`` octaves from
2^-3 (B / 1024)^(1/2), about the best ones at 2^20 tokens. The horizons were halved from those first committed, for want
of time, when the first 15 runs were under way and before any of them was looked at.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from disco.runs.schema import DATA
from disco.train.config import TrainConfig, from_dict, to_dict
from disco.train.data import prepare

SPLIT = Path(__file__).with_name("split.json")
GOAL = ("seed", "rate between", "rate beyond", "batch", "width x4", "code, bytes", "code, bpe")
"""Kinds of held-out runs that the goal of issue 7 names; the others are told apart, and apart from them."""
CODE_BYTES = 2**24
VALID = 2**13


@dataclass(frozen=True)
class Entry:
    """One run of the split."""

    part: str
    kind: str
    batch: int
    """log2, and so is the horizon."""
    offset: float
    horizon: int = 0
    """0: 2^19 tokens, 2^20 for batches of 2^12 and more."""
    width: int = 32
    seed: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup: int = 0
    """log2 of tokens; 0: none."""
    decay: float = 0.0
    optimizer: str = "scion"
    corpus: str = "corpus"
    """"corpus" (the embedded text) or "code" (the standard library of the interpreter)."""
    tokenizer: str = "bytes"
    output: float = 0.0
    """log2 of the ratio of the output layer, and so is that of hidden layers."""
    hidden: float = 0.0

    @property
    def rate(self) -> float:
        """Base learning rate."""
        return float(2 ** (-3 + 0.5 * (self.batch - 10) + self.offset))

    def config(self, folder: Path) -> TrainConfig:
        """The run, its data not yet prepared; ``folder`` holds the text of the standard library."""
        steepest = self.optimizer == "scion"
        source = "corpus" if self.corpus == "corpus" else str(code(folder))
        optimizer: dict[str, Any] = {"name": self.optimizer, "lr": self.rate, "weight_decay": self.weight_decay}
        if steepest:
            ratios = {"output": 2.0**self.output, "hidden": 2.0**self.hidden}
            optimizer |= {"momentum": self.momentum, "ratios": ratios}
        found: TrainConfig = from_dict(TrainConfig, {
            "model": {"width": self.width, "depth": 2, "head_size": 16, "context": 128},
            "data": {"source": [source], "tokenizer": self.tokenizer, "valid_tokens": VALID},
            "optimizer": optimizer,
            "schedule": {"warmup": 2**self.warmup if self.warmup else 0, "decay": self.decay},
            "batch": 2**self.batch,
            "horizon": 2 ** (self.horizon or (20 if self.batch >= 12 else 19)),
            "seed": self.seed,
        })  # fmt: skip
        return found


def code(folder: Path) -> Path:
    """The Python sources of the standard library as one text, made once."""
    path = folder / "stdlib.txt"
    if not path.exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(file for file in library.rglob("*.py") if "site-packages" not in file.parts)
        text = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
        path.write_bytes(text.encode()[:CODE_BYTES].decode(errors="ignore").encode())
    return path


def fit_runs() -> Iterator[Entry]:
    """The study: two widths, three batches, five rates; and a few runs of each setting that the model knows."""
    for batch in (8, 10, 12):
        for offset in (-2, -1, 0, 1, 2):
            for seed in (0, 1):
                yield Entry("fit", "plain", batch, offset, seed=seed)
        for offset in (-1.5, 0, 1.5):
            yield Entry("fit", "width", batch, offset, width=16)
        for offset in (-2, -1, 0, 1):
            yield Entry("fit", "momentum", batch, offset, momentum=0.9)
        yield Entry("fit", "weight decay", batch, 1, weight_decay=2**-6)
    for batch in (8, 10):
        for offset in (0, 1):
            yield Entry("fit", "schedule", batch, offset, warmup=15, decay=0.25)


def test_runs() -> Iterator[Entry]:
    """What it has to forecast."""
    for batch in (8, 10, 12):
        for seed in (2, 3):
            for offset in (-1, 0, 1):
                yield Entry("test", "seed", batch, offset, seed=seed)
        for offset in (-1.5, -0.5, 0.5, 1.5):
            yield Entry("test", "rate between", batch, offset, seed=4)
        for offset in (-3, 3):
            yield Entry("test", "rate beyond", batch, offset, seed=4)
        for offset in (-1, 0, 1):
            yield Entry("test", "code, bytes", batch, offset, seed=5, corpus="code")
    for batch in (9, 11, 13):
        for offset in (-1, 0, 1):
            yield Entry("test", "batch", batch, offset, seed=6)
    for batch in (9, 11):
        for offset in (-1, 0, 1):
            yield Entry("test", "width x4", batch, offset, width=128, seed=7)
            yield Entry("test", "momentum", batch, offset - 0.5, momentum=0.9, seed=9)
        for offset in (0, 1):
            yield Entry("test", "code, bpe", batch, offset, seed=8, corpus="code", tokenizer="bpe:1024")
            yield Entry("test", "weight decay", batch, offset, weight_decay=2**-7, seed=10)
            yield Entry("test", "weight decay", batch, offset, weight_decay=2**-5, seed=10)
            yield Entry("test", "schedule", batch, offset, warmup=16, decay=0.5, seed=11)
            yield Entry("test", "schedule", batch, offset, warmup=14, decay=0.125, seed=11)
            yield Entry("test", "horizon x4", batch, offset - 1, horizon=21, seed=12)
        yield Entry("test", "momentum, others", batch, -0.5, momentum=0.8, seed=13)
        yield Entry("test", "momentum, others", batch, -0.5, momentum=0.95, seed=13)
        yield Entry("test", "ratios", batch, 0, hidden=-3, seed=14)
        yield Entry("test", "ratios", batch, 0, output=-1, seed=14)
        for offset in (-6, -5, -4):
            yield Entry("test", "adam", batch, offset, optimizer="adam", seed=15)


def prepared(folder: Path) -> list[tuple[Entry, TrainConfig]]:
    """Every run with its data made ready, in ``folder / "runs"``."""
    known: dict[tuple[str, str], Any] = {}
    found = []
    for entry in (*fit_runs(), *test_runs()):
        config = entry.config(folder)
        key = (entry.corpus, entry.tokenizer)
        if key not in known:
            known[key] = prepare(config.data, folder / "runs" / DATA)
        found.append((entry, replace(config, data=known[key])))
    return found


def main(folder: Path) -> None:
    """Writes the split."""
    runs = prepared(folder)
    assert len({config.id for _, config in runs}) == len(runs)
    lines = [
        json.dumps({"id": config.id, **asdict(entry), "lr": f"2^{math.log2(entry.rate):g}",
                    "tokens": config.horizon, "data_digest": config.data.digest[:12]})
        for entry, config in runs
    ]  # fmt: skip
    SPLIT.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    assert all(to_dict(config)["data"]["digest"] for _, config in runs)
    for part in ("fit", "test"):
        own = [config for entry, config in runs if entry.part == part]
        print(f"{part}: {len(own)} runs, {sum(config.horizon for config in own) / 2**20:.0f} Mi tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
