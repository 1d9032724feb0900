"""Coverage of the interval of a cell's optimum, its width, and the flags of cells whose optimum is off the grid.

python -m benchmarks.coverage.cell [--replicates 1000]

"attainable" is the width of an estimator that knows the shape and scale of the curve and the noise, and uses all
points, the steep far ones too, which tell a local fit nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from benchmarks.coverage.generator import HELD_OUT, SHAPES, bowl, scan
from benchmarks.coverage.report import section

from disco.fit import optimum
from disco.fit._noise import Noise

GRIDS = ((1.0, 5), (1.0, 7), (1.0, 9), (0.5, 7), (0.5, 11))
"""Spacing in octaves, points."""
NOISES = (0.05, 0.2, 0.5)
"""In units of the curvature (nats per octave squared). Step Law's scans: 0.07 to 0.72 (5% to 95%), median 0.25."""


@dataclass(frozen=True)
class Setting:
    shape: tuple[str, float]
    grid: tuple[float, int]
    noise: float
    seeds: int = 1
    freedom: int = 20
    """Of the noise from outside; 0: none is given."""
    diverged: float = math.inf


@dataclass
class Count:
    """What happened over the replicates of some settings."""

    replicates: int = 0
    usable: int = 0
    covered: int = 0
    value: int = 0
    widths: list[float] | None = None
    attainable: list[float] | None = None

    def add(self, other: Count) -> None:
        self.replicates += other.replicates
        self.usable += other.usable
        self.covered += other.covered
        self.value += other.value
        self.widths = (self.widths or []) + (other.widths or [])
        self.attainable = (self.attainable or []) + (other.attainable or [])

    @property
    def row(self) -> list[str]:
        n = max(self.usable, 1)
        return [
            f"{self.covered / n:.3f}", f"{self.value / n:.3f}", f"{self.usable / max(self.replicates, 1):.2f}",
            f"{np.median(self.widths or [math.nan]):.2f}", f"{np.median(self.attainable or [math.nan]):.2f}",
        ]  # fmt: skip


COLUMNS = ("coverage of x", "of y", "with an optimum", "median width (octaves)", "attainable")


def run(setting: Setting, replicates: int, seed: int = 0) -> Count:
    """Replicates of one setting: the optimum at least one spacing inside the grid, the steep flank on either side."""
    rng = np.random.default_rng([seed, 7])
    spacing, points = setting.grid
    inside = max((points - 1) / 2 - 1, 0.5) * spacing
    count = Count(replicates, widths=[], attainable=[])
    for index in range(replicates):
        truth = float(rng.uniform(-inside, inside))
        curve = bowl(*setting.shape)
        made = scan(rng, curve, truth, spacing, points, setting.noise, setting.seeds, index % 2 == 1, setting.diverged)
        known = None
        if setting.freedom:
            known = Noise(setting.noise * math.sqrt(rng.chisquare(setting.freedom) / setting.freedom), setting.freedom)
        found = optimum(made.x, made.y, noise=known)
        if found.usable and found.interval and found.y_interval:
            count.usable += 1
            count.covered += found.interval[0] <= truth <= found.interval[1]
            count.value += found.y_interval[0] <= 0 <= found.y_interval[1]
            count.widths.append(found.interval[1] - found.interval[0])
            count.attainable.append(made.attainable)
    return count


def edges(grid: tuple[float, int], noise: float, replicates: int, seed: int = 0) -> tuple[float, float, float]:
    """Share of cells flagged as an edge: optimum 0.75 to 1.5 spacings beyond the grid; 1 spacing or more inside it;
    half a spacing or more inside it. One spacing is an octave or more of cost against the noise, see ``NOISES``."""
    rng = np.random.default_rng([seed, 8])
    spacing, points = grid
    half = (points - 1) / 2
    shares = []
    for low, high in ((half + 0.75, half + 1.5), (0, half - 1), (half - 1, half - 0.5)):
        flagged = 0
        for index in range(replicates):
            name, ratio = SHAPES[index % len(SHAPES)]
            truth = float(rng.choice([-1, 1]) * rng.uniform(low, high)) * spacing
            made = scan(rng, bowl(name, ratio), truth, spacing, points, noise, mirrored=bool(rng.integers(2)))
            found = optimum(made.x, made.y, noise=Noise(noise, 20))
            flagged += any("edge" in flag for flag in found.flags)
        shares.append(flagged / replicates)
    return shares[0], shares[1], shares[2]


def settings(freedom: int = 20) -> Iterable[Setting]:
    return (Setting(shape, grid, noise, freedom=freedom) for grid in GRIDS for noise in NOISES for shape in SHAPES)


def _table(counts: dict[Setting, Count], by: str) -> list[list[str]]:
    groups: dict[str, Count] = {}
    for setting, count in counts.items():
        groups.setdefault(str(getattr(setting, by)), Count()).add(count)
    return [[name, *count.row] for name, count in groups.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=1000)
    replicates = parser.parse_args().replicates
    for freedom in (20, 0):
        counts = {setting: run(setting, replicates) for setting in settings(freedom)}
        title = f"Optimum of a cell, noise {'pooled, 20 degrees of freedom' if freedom else 'from its own points only'}"
        rows = [row for by in ("shape", "grid", "noise") for row in _table(counts, by)]
        total = Count()
        for count in counts.values():
            total.add(count)
        section(title, ("settings", *COLUMNS), [*rows, ["all", *total.row]], f"{replicates} replicates a setting")
        full = [[f"{s.grid}", f"{s.noise}", f"{s.shape}", *count.row] for s, count in counts.items()]
        section(f"{title}: every setting", ("grid", "noise", "shape", *COLUMNS), full)
    held_out = {
        setting: run(setting, replicates, seed=100)
        for freedom in (20, 0)
        for shape in HELD_OUT
        for grid in GRIDS
        for noise in NOISES
        for setting in [Setting(shape, grid, noise, freedom=freedom)]
    }
    rows = [row for by in ("freedom", "shape", "noise") for row in _table(held_out, by)]
    note = f"{replicates} replicates a setting; freedom: degrees of freedom of the noise that is given, 0: none"
    section("Optimum of a cell, shapes that the constants were not chosen on", ("settings", *COLUMNS), rows, note)
    more = [
        Setting(shape, (1.0, 7), 0.2, seeds=seeds, freedom=freedom, diverged=diverged)
        for shape in (("exponential", 1.5), ("pieces", 2.0))
        for seeds, freedom, diverged in ((3, 20, math.inf), (3, 0, math.inf), (1, 20, 1.6), (1, 0, 1.6))
    ]
    rows = [[f"{s.shape}", f"{s.seeds}", f"{s.freedom}", f"{s.diverged}", *run(s, replicates).row] for s in more]
    head = ("shape", "seeds", "freedom", "diverged above", *COLUMNS)
    section("Seeds and diverged runs, 7 points by octaves, noise 0.2", head, rows)
    rows = [
        [f"{grid}", f"{noise}", *(f"{share:.3f}" for share in edges(grid, noise, replicates))]
        for grid in GRIDS for noise in NOISES
    ]  # fmt: skip
    head = ("grid", "noise", "0.75 to 1.5 spacings outside", "1 or more inside", "0.5 to 1 inside")
    section("Share of cells flagged as an edge", head, rows)


if __name__ == "__main__":
    main()
