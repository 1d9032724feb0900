"""Logs of somebody else's trainer with a known truth: other names and units, evaluations every 50 steps."""

import math
from pathlib import Path

import numpy as np
import polars as pl


def write_series(path: Path, last: int = 2**23, seed: int = 0) -> Path:
    """A CSV with a row per run and evaluation, batches in sequences of 128, losses in bits; one run diverges.

    At D tokens lr* = 2^(-4 + 0.6 (log2 B - 11) - 0.5 (log2 D - 20)); the norm is a function of lr and D.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for batch in (512, 1024, 2048, 4096, 8192):
        for rate in range(-9, -2):
            for step in range(50, last // batch + 1, 50):
                octave = math.log2(step * batch) - 20
                off = rate - (-4 + 0.6 * (math.log2(batch) - 11) - 0.5 * octave)
                loss = 2 - 0.1 * octave + 0.06 * off**2 + 0.02 * (math.log2(batch) - 11 - 0.5 * octave) ** 2
                lost = (batch, rate) == (512, -3) and step > 5000
                rows.append(
                    {
                        "name": f"b{batch}-lr{rate}", "_step": step, "bs": batch // 128, "log2_rate": float(rate),
                        "bits": math.nan if lost else (loss + rng.normal(0, 0.001)) / math.log(2),
                        "log2 norm": 6 + 0.8 * off,
                    }
                )  # fmt: skip
    frame = pl.DataFrame(rows)
    gap = frame.head(3).with_columns(bits=pl.lit(None, pl.Float64), _step=pl.col("_step") + 1)
    pl.concat([frame, gap.with_columns(pl.lit(None, pl.Float64).alias("log2 norm"))]).write_csv(path)
    return path
