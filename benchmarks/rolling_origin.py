"""Rolling origin on a published table: the largest horizon of each model size, predicted from the smaller ones.

    python benchmarks/rolling_origin.py FOLDER/steplaw_dense.csv

Prints the regret in nats against the best run of the left-out grid, of each of our stages, of carrying the last optimum
over, and of every published rule (Step Law's own is in-sample: it was fitted to this table).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import polars as pl

from disco.fit import Rolling, rolling_origin

SEQUENCE = 2048
"""Tokens per sequence in Step Law's runs; its column bs counts sequences."""


def columns(path: Path) -> dict[str, np.ndarray]:
    """Step Law's table as columns for a fit; every (N, D) is a run of its own, since its schedule depends on D."""
    table = pl.read_csv(path)
    return {
        "model": table["N"].cast(pl.String).to_numpy(),
        "parameters": table["N"].to_numpy().astype(float),
        "batch": table["bs"].to_numpy() * SEQUENCE,
        "lr": table["lr"].to_numpy(),
        "tokens": table["D"].to_numpy(),
        "loss": table["smooth loss"].to_numpy(),
        "run": np.arange(len(table)),
    }


def show(result: Rolling) -> None:
    """One line per method, one column per left-out horizon."""
    cells = list(dict.fromkeys((f.model, f.tokens) for f in result.forecasts))
    head = "".join(f"{float(m):>11.2g}/{t:.2g}" for m, t in cells)
    print(f"{'regret, milli-nats; N / D:':28}{head}{'mean':>9}{'nearest':>9}  note")
    for method in result.methods:
        own = {(f.model, f.tokens): f for f in result.forecasts if f.method == method}
        prices = [own[cell].regret for cell in cells]
        values = "".join(f"{1000 * p.nats:>16.2f}{'*' if p.outside else ' '}" if p else f"{'none':>17}" for p in prices)
        nearest = np.mean([p.nearest if p else math.inf for p in prices])
        note = next((f.note for f in own.values() if f.note), "")
        print(f"{method:28}{values}{1000 * result.mean(method):>9.2f}{1000 * nearest:>9.2f}  {note}")
    print("* outside the measured grid: regret of the nearest run")
    print(f"lowest of ours: {result.best}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="steplaw_dense.csv")
    show(rolling_origin(columns(parser.parse_args().table), dataset="step-law"))


if __name__ == "__main__":
    main()
