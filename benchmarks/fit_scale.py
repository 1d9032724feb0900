"""How long does it take, and how much memory, to load and fit 2,000 runs of 200 evaluations each?

    python benchmarks/fit_scale.py --runs 2000 --evaluations 200 --bootstraps 1000

Writes made-up run records (a bowl of the loss in learning rate and batch with noise along each run, norms of six
layers) into a temporary folder by a process of its own, then in this process, with one thread: reads them
(``disco.runs.reader``), cuts the horizons (``disco.runs.table``), fits the table once, and fits it with bootstraps over
whole runs. Times are of the wall clock and of the CPU; "peak" is the largest resident size of this process so far. The
last line is CPU time over that of one fit. With ``--table`` the same runs as one Parquet series are read,
checked and converted too (``disco.runs.ingest``).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = ("tok_embeddings", "layers.0.wq", "layers.0.wo", "layers.0.w1", "layers.0.w2", "output")
GROUPS = {"input": LAYERS[:1], "hidden": LAYERS[1:5], "output": LAYERS[5:], "vector": ()}
BATCHES, MODELS, LAST, VALID = tuple(2**k for k in range(9, 14)), (32, 48, 64, 96), 2**23, 2**15


def make(folder: Path, runs: int, evaluations: int) -> None:
    """The records: seeds x learning rates of octaves x batches x models."""
    rng = np.random.default_rng(0)
    made, seed = 0, 0
    while made < runs:
        for width in MODELS:
            for batch in BATCHES:
                for rate in range(-9, 1):
                    if made < runs:
                        _write(folder, width, batch, rate, seed, evaluations, rng)
                        made += 1
        seed += 1


def _write(
    folder: Path, width: int, batch: int, rate: float, seed: int, evaluations: int, rng: np.random.Generator
) -> None:
    name = f"d{width}b{batch}r{-rate}s{seed}"
    config = {
        "batch": batch, "horizon": LAST, "seed": seed, "model": {"width": width, "depth": 2},
        "optimizer": {"name": "scion", "lr": 2.0**rate, "ratios": {}}, "data": {"valid_tokens": VALID},
    }  # fmt: skip
    document = {"schema": 1, "id": name, "config": config, "parameters": 24 * width**2, "groups": GROUPS}
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(document))
    steps = _steps(batch, evaluations)
    noise = np.cumsum(rng.normal(0, 0.001, len(steps)))
    octave = np.log2(np.maximum(steps, 1) * batch) - 20
    off = rate - (-4 + 0.6 * (math.log2(batch) - 11) - 0.5 * octave)
    least = 1.0 + 0.8 * 2 ** (-0.2 * octave) + 0.2 * (32 / width) ** 0.7
    loss = least + 0.06 * off**2 + 0.02 * (math.log2(batch) - 11 - 0.5 * octave) ** 2 + noise
    lines = []
    for step, value, away in zip(steps.tolist(), loss.tolist(), off.tolist(), strict=True):
        norms = {f"norm/weights/rms_to_rms/{layer}": 2 ** (5 + 0.8 * away) for layer in LAYERS}
        norms |= {f"norm/weights/rms_to_inf/{LAYERS[-1]}": 2 ** (6 + 0.8 * away)}
        line = {"step": step, "tokens": step * batch, "path": step * 2.0**rate, "loss/valid": value}
        line |= norms | {"loss/train": value, "time/wall": step * 0.01}
        lines.append(json.dumps(line, sort_keys=True) + "\n")
    (folder / name / "metrics.jsonl").write_text("".join(lines))
    summary = {"schema": 1, "id": name, "outcome": "finished", "reason": "", "step": int(steps[-1]), "tokens": LAST}
    (folder / name / "summary.json").write_text(json.dumps(summary))


def _steps(batch: int, evaluations: int) -> np.ndarray:
    """The windows of all horizons, and others evenly in log until there are enough."""
    steps = {0}
    for power in range(int(math.log2(4 * VALID)), int(math.log2(LAST)) + 1):
        at = 2**power // batch
        steps |= {at - 2 * max(1, at // 64), at - max(1, at // 64), at}
    count = evaluations
    while len(steps) < evaluations:
        steps |= {round(2**x) for x in np.linspace(0, math.log2(LAST // batch), count)}
        count += evaluations
    extra = sorted(steps - {0})
    while len(steps) > evaluations:  # those of no window
        extra = [step for step in extra if step in steps]
        windows = {at - k * max(1, at // 64) for p in range(17, 24) for at in (2**p // batch,) for k in (0, 1, 2)}
        steps.discard(next(step for step in extra if step not in windows))
    return np.array(sorted(steps))


def measured(what: str, function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and its CPU seconds, which are printed with the wall time and the peak of memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:28} {wall:8.2f} s  cpu {cpu:8.2f} s  peak {peak:6.0f} MB", flush=True)
    return result, cpu


def series(runs: Any, path: Path) -> None:
    """The runs as a table of somebody else's."""
    import polars as pl

    parts = [
        pl.DataFrame(
            {
                "name": run.id,
                "seed": run.config["seed"],
                "size": run.parameters,
                "bs": run.config["batch"] // 128,
                "peak_lr": run.config["optimizer"]["lr"],
                "iter": run.metrics["step"],
                "val": run.column("loss/valid"),
                "wnorm": run.norm("output", "rms_to_inf"),
            }
        )
        for run in runs
    ]
    pl.concat(parts).write_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--bootstraps", type=int, default=1000, help="0: leave this part out")
    parser.add_argument("--table", action="store_true", help="convert the same runs from one table too")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.runs, args.evaluations)
        return

    from disco.fit import fit_table
    from disco.runs.convert import to_runs
    from disco.runs.ingest import ingest
    from disco.runs.reader import read_runs
    from disco.runs.sources import read_tables
    from disco.runs.table import columns

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = [sys.executable, __file__, "--runs", str(args.runs), "--evaluations", str(args.evaluations)]
        subprocess.run([*own, "--make", name], check=True)
        read, reading = measured(f"read {args.runs} records", lambda: read_runs(folder))
        lines = {len(run.metrics["step"]) for run in read.runs}
        assert (len(read.runs), read.problems, lines) == (args.runs, (), {args.evaluations})
        table, cutting = measured("cut the horizons", lambda: columns(read.runs))
        fit, once = measured(f"fit {len(table['lr'])} rows once", lambda: fit_table(table))
        assert fit.cells
        if args.bootstraps:
            again = f"with {args.bootstraps} bootstraps"
            _, often = measured(again, lambda: fit_table(table, bootstraps=args.bootstraps))
            print(f"over one fit: {often / once:.1f}; with the loading: {(reading + cutting + often) / once:.1f}")
        if args.table:
            path = folder / "series.parquet"
            series(read.runs, path)
            maps = ["run=name", "step=iter", "batch=bs*128", "loss=val", "lr=peak_lr", "norm=wnorm", "parameters=size"]
            ingested, _ = measured("read and check one table", lambda: ingest(read_tables([path]), maps))
            runs, _ = measured("convert it to runs", lambda: to_runs(ingested))
            assert len(runs) == args.runs
            measured("cut the horizons", lambda: columns(runs))


if __name__ == "__main__":
    main()
