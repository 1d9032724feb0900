"""Whether an optimal norm transfers, in words, and what would tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

from disco.fit import Cell, Path, StudyFit
from disco.runs.units import two_to


def transfer(path: Path, fit: StudyFit) -> str:
    """Whether the optimal norm is the same along a path, with the numbers, in a sentence."""
    found = len(path.norm)
    if found < 2:
        number = "no optimum" if not found else "only one optimum"
        found_so_far = f"{number} whose best batch lies inside its grid; it takes 3."
        return f"Whether the optimal norm transfers over {path.axis} is unknown: {found_so_far}"
    spread = f"it lies between {two_to(min(path.norm))} and {two_to(max(path.norm))} ({path.condition})"
    test = path.transfer
    if test is None or test.interval is None:
        return (
            f"The optimal norm was found at {found} values of {path.axis}: {spread}. It takes 3 to test its transfer."
        )
    slope = (
        f"{test.slope:+.2f} [{test.interval[0]:+.2f}, {test.interval[1]:+.2f}] octaves per doubling of {path.axis}, "
        f"where up to ±{test.margin:.2f} would cost less than 0.01 nats"
    )
    if test.verdict == "transfers":
        return f"<b>The optimal norm transfers over {path.axis}:</b> {spread}, {slope}."
    if test.verdict == "drifts":
        return f"<b>The optimal norm drifts with {path.axis}:</b> {spread}, {slope}."
    seen = "no drift is seen, but one that matters" if test.constant else "it moves, but a drift too small to matter"
    head = f"<b>Whether the optimal norm transfers over {path.axis} cannot be told yet:</b>"
    more = needed(path, fit)
    return f"{head} {seen} is not excluded; {spread}, {slope}.{f' {more[0].upper()}{more[1:]}.' if more else ''}"


def verdict(path: Path, fit: StudyFit) -> str:
    """The test of a path in short: the verdict, its numbers, and what would tell where it cannot."""
    test = path.transfer
    if test is None or test.interval is None:
        return f"cannot tell: optima at {len(path.norm)} values of {path.axis}, and it takes 3"
    low, high = test.interval
    said = (
        f"{test.verdict}: {test.slope:+.2f} [{low:+.2f}, {high:+.2f}] octaves per doubling of {path.axis}, "
        f"±{test.margin:.2f} would not matter"
    )
    more = needed(path, fit)
    return f"{said}; {more}" if more else said


def needed(path: Path, fit: StudyFit) -> str:
    """What would turn "cannot tell" into a verdict; empty if it is one, or nothing can be said.

    An optimum takes as many runs as the cells of the path have rates; horizons of one run are not told apart.
    """
    test = path.transfer
    if test is None or test.verdict != "cannot tell" or not test.interval:
        return ""
    if test.needed is None or (test.needed.optima is None and test.needed.octaves is None):
        return "more than a thousand optima would not tell, the slope is too near to that margin" if test.needed else ""
    ways = []
    if test.needed.optima is not None:
        rates = [len(cell.points) for cell in _cells(path, fit)]
        runs = math.ceil((test.needed.optima - test.n) * sum(rates) / len(rates)) if rates else test.needed.runs
        about = f" (about {runs:,} more runs)" if runs else ""
        ways.append(f"{test.needed.optima} optima in place of {test.n}{about} over the same {path.axis}")
    if test.needed.octaves is not None:
        span = math.log2(max(path.scale) / min(path.scale))
        ways.append(f"{test.needed.octaves:.1f} doublings of {path.axis} in place of {span:.1f}")
    return f"to tell that it {test.needed.verdict} takes {' or '.join(ways)}"


def _cells(path: Path, fit: StudyFit) -> Iterator[Cell]:
    """Of the optima of a path."""
    best = {(item.model, item.tokens): item.batch for item in fit.horizons if item.family == path.family}
    for at in path.at:
        cell = fit.cell(path.family, at[0], best[at], at[1]) if at in best else None
        if cell:
            yield cell
