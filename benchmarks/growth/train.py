"""Trains every run of the split, as cohorts, those to fit first: ``python -m benchmarks.growth.train /work/growth``.

Stopped and started again it goes on where it was. About 210 Mi tokens: an hour of one core.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.growth.split import SPLIT, prepared
from disco.errors import UserError
from disco.sweep.cohorts import group
from disco.train.loop import train_cohort

MEMORY = 2**31
ORDER = ("fit", "test")


def main(folder: Path) -> None:
    """Trains into ``folder / "runs"``."""
    torch.set_num_threads(1)
    runs = prepared(folder)
    committed = {line["id"] for line in json.loads(SPLIT.read_text(encoding="utf-8"))}
    if committed != {config.id for _, config in runs}:
        raise UserError(f"{SPLIT} was written for other data or another Python; write it again before training")
    for part in ORDER:
        own = [config for entry, config in runs if entry.part == part]
        for cohort in group(own, lambda _: 0, (), workers=1, memory=MEMORY):
            start = time.monotonic()
            first = cohort.runs[0]
            ended = train_cohort(cohort.runs, folder / "runs", compiled=cohort.compiled)
            took, tokens = time.monotonic() - start, sum(config.horizon for config in cohort.runs)
            print(f"{part} d{first.model.width} B {first.batch} D {first.horizon}: {len(ended)} runs, {took:.0f} s, "
                  f"{tokens / took / 1e3:.0f}k tokens/s, {sorted(map(str, ended.values()))}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
