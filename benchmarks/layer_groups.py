"""Coverage of the intervals of ``disco.fit.layer_groups`` and error rates of its flags, on losses with a known truth.

    python benchmarks/layer_groups.py [--replicates 1000]

The loss is not the fitted form: each group's bowl is lopsided (steeper above its best rate, as runs near divergence
are), the groups' rates interact, and the best rates move with the batch. Grids: one ratio at a time around 1 : 1/8 : 1
("star"), a product of two ratios ("product"), one ratio swept far off ("edge"). Noise has a part that all horizons and
rates of a batch share. About two minutes per thousand replicates and grid on one core.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from disco.fit._layer_groups import layer_groups

GROUPS = ("input", "hidden", "output")
BEST = np.array([-4.0, -7.0, -4.0])
BEND = np.array([[0.01, 0.004, 0.004], [0.004, 0.03, 0.01], [0.004, 0.01, 0.08]])
GRIDS = {
    "star": [(0, h, 0) for h in range(-5, 2)]
    + [(i, -3, 0) for i in (-2, -1, 1, 2)]
    + [(0, -3, o) for o in (-2, -1, 1, 2)],
    "product": [(i, h, 0) for i in (-2, 0, 2) for h in (-5, -4, -3, -2, -1)],
    "edge": [(i, h, 0) for i in (-2, 0, 2) for h in (-1, 0, 1, 2)],
}


def sweep(grid: str, skew: float, noise: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One replicate: half an octave between learning rates, three batches."""
    rows = np.array([
        (lr + 0.5 * (b - 11), b, *ratio)
        for ratio in GRIDS[grid] for b in (10, 11, 12) for lr in np.arange(-6.5, -1.4, 1.0)
    ])  # fmt: skip
    off = rows[:, :1] + rows[:, 2:] - BEST - 0.5 * (rows[:, 1:2] - 11)
    lopsided = off * np.sqrt(np.exp(skew * np.clip(off, -3, 3)))  # minimum stays at 0
    loss = 3 + np.einsum("ni,ij,nj->n", lopsided, BEND, lopsided) + 0.015 * (rows[:, 1] - 11) ** 2
    shared = dict(zip((10.0, 11.0, 12.0), rng.normal(0, noise / 2, 3), strict=True))
    loss += rng.normal(0, noise, len(loss)) + np.array([shared[b] for b in rows[:, 1]])
    return {
        "model": np.full(len(rows), "m"), "batch": 2 ** rows[:, 1], "lr": 2 ** rows[:, 0],
        "tokens": np.full(len(rows), 2**20), "loss": loss,
        **{f"ratio_{g}": 2 ** rows[:, 2 + k] for k, g in enumerate(GROUPS)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=1000)
    replicates = parser.parse_args().replicates
    print("grid     skew  noise  group   covered  bound  median width  error  flags")
    for grid in GRIDS:
        for skew in (0.0, 0.16, 0.3):
            for noise in (0.002, 0.01):
                rng = np.random.default_rng(0)
                found = [layer_groups(sweep(grid, skew, noise, rng)).optima[0] for _ in range(replicates)]
                for name in ("hidden", "input"):
                    truth = BEST[GROUPS.index(name)] - BEST[2]
                    groups = [item.group(name) for item in found]
                    bound = [g for g in groups if g.usable and g.interval]
                    inside = np.mean([g.interval[0] <= truth <= g.interval[1] for g in bound]) if bound else np.nan
                    width = np.median([np.ptp(g.interval) for g in bound]) if bound else np.nan
                    error = np.median([g.ratio for g in bound]) - truth if bound else np.nan
                    flags = Counter(flag for g in groups for flag in g.flags)
                    flags += Counter(flag for item in found for flag in item.flags)
                    shown = ", ".join(f"{flag} {count / replicates:.0%}" for flag, count in flags.most_common())
                    print(f"{grid:8} {skew:4.2f} {noise:6.3f}  {name:7} {inside:7.1%} {len(bound) / replicates:6.0%} "
                          f"{width:13.2f} {error:+6.2f}  {shown}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
