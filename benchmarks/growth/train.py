"""Trains every run of the split, as cohorts: those to fit first, then those of the goal, then the others.

    python -m benchmarks.growth.train FOLDER

Stopped and started again it goes on where it was. About 105 Mi tokens: half an hour of one core.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from benchmarks.growth.split import GOAL, SPLIT, Entry, prepared

from disco.errors import UserError
from disco.sweep.cohorts import group
from disco.train.loop import train_cohort

MEMORY = 2**31


def main(folder: Path) -> None:
    """Trains into ``folder / "runs"``."""
    torch.set_num_threads(1)
    runs = prepared(folder)
    committed = {line["id"] for line in json.loads(SPLIT.read_text(encoding="utf-8"))}
    if committed != {config.id for _, config in runs}:
        raise UserError(f"{SPLIT} was written for other data or another Python; write it again before training")
    for part in ("fit", "goal", "others"):
        own = [config for entry, config in runs if _part(entry) == part]
        for cohort in group(own, lambda _: 0, (), workers=1, memory=MEMORY):
            start = time.monotonic()
            first = cohort.runs[0]
            ended = train_cohort(cohort.runs, folder / "runs", compiled=cohort.compiled)
            took, tokens = time.monotonic() - start, sum(config.horizon for config in cohort.runs)
            print(f"{part} d{first.model.width} B {first.batch} D {first.horizon}: {len(ended)} runs, {took:.0f} s, "
                  f"{tokens / took / 1e3:.0f}k tokens/s, {sorted(map(str, ended.values()))}", flush=True)  # fmt: skip


def _part(entry: Entry) -> str:
    return entry.part if entry.part == "fit" else "goal" if entry.kind in GOAL else "others"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
