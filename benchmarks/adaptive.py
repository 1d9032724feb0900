"""Adaptive studies against full grids: tokens, the optimum, and what a wrong one costs.

    python benchmarks/adaptive.py FOLDER [--studies NAME ...] [--steps adaptive grid report] [--workers N] [--again]

Three studies over two corpora, the embedded one and the source of Python's standard library. Step "adaptive" trains the
adaptive study, "grid" the full grid (11 rates in steps of sqrt(2) around the optimum that the adaptive study found, 6
batches, the same horizons), "report" compares them. Both keep their records in FOLDER/NAME, where they share runs: what
is there is not trained again, and an adaptive study sees of a run only the horizons that it asked for. ``--again``
decides the rounds of an adaptive study anew, with the records there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from disco.fit import Cell, Surface, fit_table, surface
from disco.runs.reader import read_run
from disco.runs.schema import DATA
from disco.runs.table import columns
from disco.sweep.adaptive.rounds import ROUNDS, Entry, read_rounds, run_rounds
from disco.sweep.engines.local import Result, run_study
from disco.sweep.progress import Lines
from disco.sweep.study import Study, build_study
from disco.train.data import prepare

BATCHES = [2**k for k in range(8, 14)]
STUDIES: dict[str, dict[str, Any]] = {
    "scion-32": {"width": 32, "optimizer": {"name": "scion"}, "text": "corpus", "rates": (-5, -1), "last": 2**20},
    "momentum-16": {
        "width": 16, "optimizer": {"name": "scion", "momentum": 0.9}, "text": "stdlib", "rates": (-5, -1),
        "last": 2**19,
    },
    "adamw-32": {"width": 32, "optimizer": {"name": "adamw"}, "text": "stdlib", "rates": (-10, -6), "last": 2**19},
}  # fmt: skip
"""Models of two layers, optimizers, corpora, log2 of the first batch's rates, and the longest horizon in tokens."""
REACH = 2.5
"""Octaves of the grid to either side of the optimum, in half octaves."""


def table(name: str, folder: Path, **sections: Any) -> dict[str, Any]:
    """The content of a study file."""
    own = STUDIES[name]
    source = "corpus" if own["text"] == "corpus" else str(standard_library(folder))
    base = {
        "horizon": own["last"], "batch": 256, "optimizer": own["optimizer"],
        "model": {"width": own["width"], "depth": 2, "head_size": 16, "context": 128},
        "data": {"source": source, "valid_tokens": own["last"] // 64},
    }  # fmt: skip
    return {"name": name, "base": base, **sections}


def standard_library(folder: Path) -> Path:
    """The modules of Python's standard library as one text file."""
    path = folder / "stdlib.txt"
    if not path.exists():
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        path.write_text("\n\n".join(module.read_text(encoding="utf-8", errors="replace") for module in modules))
    return path


def adaptive(name: str, folder: Path) -> Study:
    """The adaptive study."""
    low, high = STUDIES[name]["rates"]
    axes = {"batch": BATCHES, "lr": [f"2^{rate}" for rate in range(low, high + 1)]}
    return build_study(table(name, folder, axes=axes, adaptive=True), partial(prepare, cache=folder / name / DATA))


def grid(name: str, folder: Path) -> Study:
    """The full grid, around the optima of all batches that the adaptive study expects."""
    axes = []
    for batch, rate in last_answer(folder / name)["ridge"].items():
        centre, steps = round(2 * rate), round(2 * REACH)
        axes.append(
            {"batch": int(batch), "lr": [f"2^{half / 2:g}" for half in range(centre - steps, centre + steps + 1)]}
        )
    return build_study(table(name, folder, axes=axes), partial(prepare, cache=folder / name / DATA))


def last_answer(out: Path) -> dict[str, Any]:
    """What the adaptive study in ``out`` found."""
    (answer,) = read_rounds(out)[-1].answers.values()
    return dict(answer)


def train(study: Study, out: Path, workers: int) -> Result:
    """Trains what is not done; a run that has gone on further for the grid is done."""
    return run_study(study, out, workers=workers, show=Lines())


def said(entry: Entry) -> None:
    """Prints a round."""
    print(f"round {entry.round}, after {entry.spent:,} tokens", *entry.lines, sep="\n  ", flush=True)


def compare(name: str, folder: Path) -> dict[str, Any]:
    """The adaptive study against the full grid."""
    out = folder / name
    journal, full = read_rounds(out), grid(name, folder)
    answer = last_answer(out)
    batch, rate, last = answer["batch"], answer["rate"], STUDIES[name]["last"]
    data = columns([read_run(out / config.id) for config in full.configs])
    data = {key: values[data["tokens"] <= last] for key, values in data.items()}
    fit = fit_table(data)
    cells = {cell.batch: cell for cell in fit.cells if cell.tokens == last}
    cell = cells[batch]
    error = None if cell.lr.interval is None else (cell.lr.interval[1] - cell.lr.interval[0]) / (2 * 1.645)
    whole = surface(data["lr"], data["batch"], data["tokens"], np.where(data["diverged"], math.nan, data["loss"]),
                    run=data["run"], bootstraps=100)  # fmt: skip
    best = min(cells.values(), key=lambda c: c.lowest.loss)
    asked = [(entry.round, order) for entry in journal for order in entry.orders]
    arrived = min(number for number, order in asked if order["tokens"] == last)
    reached = {order["run"]: max(o["tokens"] for _, o in asked if o["run"] == order["run"]) for _, order in asked}
    lowest = next(c.id for c in full.configs if (c.batch, c.optimizer.lr) == (best.batch, 2**best.lowest.lr))
    early = any(order["run"] == lowest and number < arrived for number, order in asked)
    own = columns([read_run(out / run) for run in reached])
    seen = own["tokens"] <= np.array([reached[run] for run in own["run"]])
    fitted = fit_table({key: values[seen] for key, values in own.items()}).cell(*cell_key(cell))
    surfaces = whole.optimum(last, batch)
    return {
        "study": name,
        "tokens": journal[-1].spent, "grid tokens": full.tokens, "ratio": full.tokens / journal[-1].spent,
        "rounds": len(journal), "runs": len(reached), "last line": journal[-1].lines,
        "batch": batch, "rate": rate, "interval": [answer.get("low"), answer.get("high")],
        "disco fit of its runs": [fitted.lr.x, fitted.lr.interval, fitted.lr.flags] if fitted else None,
        "grid's rate at that batch": [cell.lr.x, cell.lr.interval, cell.lr.flags], "its standard error": error,
        "surface's rate at that batch": [surfaces.lr, surfaces.lr_interval],
        "octaves off the grid's": rate - cell.lr.x, "octaves off the surface's": rate - surfaces.lr,
        "regret": regret(whole, batch, rate, last),
        "lowest run of the grid": [best.batch, best.lowest.lr],
        "its share of tokens in the adaptive study": reached.get(lowest, 0) / last,
        "dropped it": early and reached[lowest] < last,
        "optima of the grid": {b: [c.lr.x, c.loss, list(c.lr.flags)] for b, c in cells.items()},
        "noise": cell.run_noise.sd if cell.run_noise else None,
    }  # fmt: skip


def cell_key(cell: Cell) -> tuple[str, str, int, int]:
    """Family, model, batch and tokens."""
    return cell.family, cell.model, cell.batch, cell.tokens


def regret(whole: Surface, batch: int, rate: float, last: int) -> list[float]:
    """Loss of a choice over the least loss of the study's batches, less 1, on the surface; and its standard error, from
    the resamples of whole runs."""

    def of(values: tuple[float, ...]) -> float:
        there = dataclasses.replace(whole, values=values, draws=())
        best = [float(there.loss(2 ** there.optimum(last, b).lr, b, last)) for b in BATCHES]
        return float(there.loss(2**rate, batch, last)) / min(best) - 1

    return [of(whole.values), float(np.std([of(draw) for draw in whole.draws], ddof=1))]


def main() -> None:
    """Runs the steps that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--steps", nargs="+", default=["adaptive", "grid", "report"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    workers = args.workers or len(os.sched_getaffinity(0))
    for name in args.studies:
        out = args.folder / name
        if "adaptive" in args.steps:
            if args.again:
                (out / ROUNDS).unlink(missing_ok=True)
            run_rounds(adaptive(name, args.folder), out, lambda plan, out=out: train(plan, out, workers), said)
        if "grid" in args.steps:
            train(grid(name, args.folder), out, workers)
    if "report" in args.steps:
        print(json.dumps([compare(name, args.folder) for name in args.studies], indent=1))


if __name__ == "__main__":
    main()
