"""Error rates of the equivalence test of norm transfer, and whether what it says would tell does tell.

python -m benchmarks.coverage.transfer [--replicates 2000] [--studies 1008]
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from benchmarks.coverage.generator import Truth, along_runs
from benchmarks.coverage.plan import SETTINGS, made
from benchmarks.coverage.report import section

from disco.fit import NORM, StudyFit, Transfer, norm_transfer
from disco.fit._study import TOLERANCE, fit_once
from disco.fit._transfer import CORRELATION

MARGIN = 0.1
"""Octaves of norm per octave of tokens."""
SLOPES = (0.0, 1.0, 3.0)
"""True slopes, in margins."""
NORM_PER_RATE = 0.8
"""Octaves of norm per octave of learning rate in the made-up studies."""
VERDICTS = ("transfers", "drifts", "cannot tell")


def verdicts(
    slope: float, optima: int, scatter: float, replicates: int, seed: int = 0, memory: float | None = None,
    apart: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Shares of the verdicts.

    Args:
        slope: True slope, in margins.
        optima: One per octave of tokens.
        scatter: Standard deviation of an optimal norm, in octaves.
        memory: Octaves over which the correlation of the scatter halves; None: independent.
        apart: Whether the test is told that each optimum has runs of its own.
    """
    rng = np.random.default_rng([seed, 9])
    octaves = np.arange(optima, dtype=float)
    shared = range(optima) if apart else None
    said: Counter[str] = Counter()
    for _ in range(replicates):
        noise = rng.normal(size=optima) if memory is None else along_runs(rng, list(octaves), memory, 1)[0]
        norm = 6 + slope * MARGIN * octaves + scatter * noise
        said[norm_transfer(2.0**octaves, 2.0**norm, MARGIN, shared=shared).verdict] += 1
    return {name: said[name] / replicates for name in VERDICTS}


def promised(slope: float, scatter: float, replicates: int, seed: int = 0) -> tuple[int, float]:
    """Optima that would tell, by a sample with this slope and scatter, and the share of firm verdicts with them."""
    rng = np.random.default_rng([seed, 10])
    octaves = np.arange(5, dtype=float)
    noise = rng.normal(size=5)
    design = np.stack([np.ones(5), octaves], axis=1)
    noise -= design @ np.linalg.lstsq(design, noise)[0]
    noise *= scatter * np.sqrt(3 / np.sum(noise**2))  # residual standard deviation exactly scatter, slope exactly slope
    norm = 2.0 ** (6 + slope * MARGIN * octaves + noise)
    found = norm_transfer(2.0**octaves, norm, MARGIN, shared=range(5))
    if found.needed is None or found.needed.optima is None:
        raise ValueError(f"slope {slope} and scatter {scatter} tell already, or never: choose others")
    n = found.needed.optima
    spread = (octaves.mean() + (octaves - octaves.mean()) * 1.0)[np.arange(n) % 5]
    firm = 0
    for _ in range(replicates):
        norm = 2.0 ** (6 + slope * MARGIN * spread + rng.normal(0, scatter, n))
        firm += norm_transfer(2.0**spread, norm, MARGIN, shared=range(n)).verdict == found.needed.verdict
    return n, firm / replicates


def of_studies(studies: int, bootstraps: int, seed: int) -> Iterator[tuple[str, float, str]]:
    """``of_fit`` of so many studies, those of ``plan``."""
    for index in range(studies):
        round_, which = divmod(index, len(SETTINGS))
        truth, table = made(SETTINGS[which], np.random.default_rng([seed, round_, which]))
        yield from of_fit(fit_once(table, NORM, bootstraps, index), truth)


def of_fit(fit: StudyFit, truth: Truth) -> Iterator[tuple[str, float, str]]:
    """(error, true slope in margins, verdict): by ``fit_table``, with resampled runs; and by the scatter of the same
    optima, corrected for their shared runs or as the textbook has it.

    A slope of all optimal norms over log2 tokens moves the fitted one by just that, so one fit serves all slopes.
    """
    path, noise = fit.paths[0], fit.cells[0].run_noise
    own = path.transfer
    if own is None or own.interval is None:
        return
    norms = [2.0**norm for norm in path.norm]
    scatter = norm_transfer(path.scale, norms, own.margin, correlation=noise.correlation if noise else CORRELATION)
    plain = norm_transfer(path.scale, norms, own.margin, shared=range(own.n))
    octaves = math.log2(path.scale[-1] / path.scale[0]) + 1
    margin = math.sqrt(TOLERANCE / (truth.curvature / NORM_PER_RATE**2)) / octaves
    for slope in SLOPES:
        moved = slope * margin - truth.norm_tokens
        for how, found in (("resampled runs", own), ("scatter, corrected", scatter), ("scatter", plain)):
            yield how, slope, _moved(found, moved)


def _moved(found: Transfer, slope: float) -> str:
    """The verdict if all norms had so much more slope."""
    assert found.interval is not None
    low, high = found.interval[0] + slope, found.interval[1] + slope
    if -found.margin <= low and high <= found.margin:
        return "transfers"
    return "drifts" if low > found.margin or high < -found.margin else "cannot tell"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--studies", type=int, default=1008)
    parser.add_argument("--bootstraps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    replicates = arguments.replicates
    rows = []
    for memory, apart in ((None, True), (None, False), (0.5, False), (1.0, False), (2.0, False)):
        for optima in (3, 4, 6, 9):
            for slope in SLOPES:
                for scatter in (0.05, 0.2):
                    said = verdicts(slope, optima, scatter, replicates, arguments.seed, memory, apart)
                    told = "each its own" if apart else "nothing"
                    of = (str(memory or "independent"), told, str(optima), str(slope), str(scatter))
                    rows.append([*of, *(f"{share:.3f}" for share in said.values())])
    about = ("correlation halves over (octaves)", "told of the runs", "optima", "true slope (margins)", "scatter")
    note = f"{replicates} replicates a setting, one optimum per octave, scatter in octaves"
    section("Verdicts of the transfer test", (*about, *VERDICTS), rows, note)
    rows = []
    for slope, scatter in ((0.0, 0.2), (0.5, 0.2), (2.0, 0.3)):
        n, share = promised(slope, scatter, replicates, arguments.seed)
        rows.append([str(slope), str(scatter), str(n), f"{share:.3f}"])
    head = ("slope (margins)", "scatter (octaves)", "optima said to tell", "share that told")
    section("Cannot tell: the number of optima that would", head, rows, "promised: 0.8")
    counts: dict[tuple[str, float], Counter[str]] = defaultdict(Counter)
    for how, slope, verdict in of_studies(arguments.studies, arguments.bootstraps, arguments.seed):
        counts[how, slope][verdict] += 1
    show(counts, arguments.studies, arguments.bootstraps)


def show(said: dict[tuple[str, float], Counter[str]], studies: int, bootstraps: int) -> None:
    """The table of ``of_studies``."""
    rows = [
        [how, str(slope), *(f"{counts[name] / counts.total():.3f}" for name in VERDICTS)]
        for (how, slope), counts in said.items()
    ]
    note = f"{studies} studies of benchmarks/coverage/plan.py, {bootstraps} resamples of whole runs"
    section("Verdicts of the transfer test, whole studies", ("error", "true slope (margins)", *VERDICTS), rows, note)


if __name__ == "__main__":
    main()
