"""Error rates of the equivalence test of norm transfer, and whether what it says would tell does tell.

python -m benchmarks.coverage.transfer [--replicates 2000]
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
from benchmarks.coverage.generator import along_runs
from benchmarks.coverage.report import section

from disco.fit import norm_transfer

MARGIN = 0.1
"""Octaves of norm per octave of tokens."""


def verdicts(
    slope: float, optima: int, scatter: float, replicates: int, seed: int = 0, memory: float | None = None
) -> dict[str, float]:
    """Shares of the verdicts.

    Args:
        slope: True slope, in margins.
        optima: One per octave of tokens.
        scatter: Standard deviation of an optimal norm, in octaves.
        memory: Octaves over which the correlation of the scatter halves; None: independent.
    """
    rng = np.random.default_rng([seed, 9])
    octaves = np.arange(optima, dtype=float)
    said: Counter[str] = Counter()
    for _ in range(replicates):
        noise = rng.normal(size=optima) if memory is None else along_runs(rng, list(octaves), memory, 1)[0]
        norm = 6 + slope * MARGIN * octaves + scatter * noise
        said[norm_transfer(2.0**octaves, 2.0**norm, MARGIN).verdict] += 1
    return {name: said[name] / replicates for name in ("transfers", "drifts", "cannot tell")}


def promised(slope: float, scatter: float, replicates: int, seed: int = 0) -> tuple[int, float]:
    """Optima that would tell, by a sample with this slope and scatter, and the share of firm verdicts with them."""
    rng = np.random.default_rng([seed, 10])
    octaves = np.arange(5, dtype=float)
    noise = rng.normal(size=5)
    design = np.stack([np.ones(5), octaves], axis=1)
    noise -= design @ np.linalg.lstsq(design, noise)[0]
    noise *= scatter * np.sqrt(3 / np.sum(noise**2))  # residual standard deviation exactly scatter, slope exactly slope
    found = norm_transfer(2.0**octaves, 2.0 ** (6 + slope * MARGIN * octaves + noise), MARGIN)
    if found.needed is None or found.needed.optima is None:
        raise ValueError(f"slope {slope} and scatter {scatter} tell already, or never: choose others")
    n = found.needed.optima
    spread = (octaves.mean() + (octaves - octaves.mean()) * 1.0)[np.arange(n) % 5]
    firm = 0
    for _ in range(replicates):
        said = norm_transfer(2.0**spread, 2.0 ** (6 + slope * MARGIN * spread + rng.normal(0, scatter, n)), MARGIN)
        firm += said.verdict == found.needed.verdict
    return n, firm / replicates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=2000)
    replicates = parser.parse_args().replicates
    rows = []
    for memory in (None, 0.5, 1.0):
        for optima in (3, 4, 6, 9):
            for slope in (0.0, 1.0, 3.0):
                for scatter in (0.05, 0.2):
                    said = verdicts(slope, optima, scatter, replicates, memory=memory)
                    shares = [f"{share:.3f}" for share in said.values()]
                    rows.append([str(memory or "independent"), str(optima), str(slope), str(scatter), *shares])
    about = ("correlation halves over (octaves)", "optima", "true slope (margins)", "scatter (octaves)")
    head = (*about, "transfers", "drifts", "cannot tell")
    section("Verdicts of the transfer test", head, rows, f"{replicates} replicates a setting, one optimum per octave")
    rows = []
    for slope, scatter in ((0.0, 0.2), (0.5, 0.2), (2.0, 0.3)):
        n, share = promised(slope, scatter, replicates)
        rows.append([str(slope), str(scatter), str(n), f"{share:.3f}"])
    head = ("slope (margins)", "scatter (octaves)", "optima said to tell", "share that told")
    section("Cannot tell: the number of optima that would", head, rows, "promised: 0.8")


if __name__ == "__main__":
    main()
