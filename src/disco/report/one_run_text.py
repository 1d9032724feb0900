"""A learning rate from one run as text."""

from __future__ import annotations

import math
from collections.abc import Iterator

from disco.guide import OneRun
from disco.guide._one_run import Probe
from disco.report.text import grid, wrapped
from disco.runs.units import counted, power, power_range


def render_one_run(found: OneRun, width: int | None = None) -> str:
    """All that it says but its warnings.

    Args:
        found: Of ``disco.guide.one_run``.
        width: As for ``text.grid``.
    """
    return "\n".join(
        (*_head(found), "", grid([_row(each) for each in found.probes], "Probes", width), "", *_foot(found))
    )


def _head(found: OneRun) -> Iterator[str]:
    low, high = found.lr.interval or (math.nan, math.nan)
    yield f"{counted(found.tokens)} tokens at a batch of {counted(found.batch)}, from one run"
    yield f"  learning rate     {power(found.lr.value):>9}  {found.lr.value:>10.4g}  90%: {power(low)} .. {power(high)}"
    yield wrapped(found.lr.why, "      ")
    yield f"  output norm, end  {power_range(found.norm.log2, (found.norm.low, found.norm.high)):>9}"
    parts = f"±{found.from_norm:.2f} octaves by the best norm, ±{found.from_growth:.2f} by the forecast of the norm"
    cost = "" if found.cost is None else f"; expected to cost {found.cost:.2g} nats"
    yield wrapped(f"Error of the rate: {parts}{cost}. The probes took {100 * found.share:.2g}% of the run's tokens.")


def _row(probe: Probe) -> dict[str, str]:
    return {
        "tokens": counted(probe.tokens),
        "lr": power(probe.lr),
        "best norm at path": power(probe.path),
        "ahead (octaves)": f"{probe.ahead:+.1f}",
        "norm per path": f"{probe.slope:.2f}",
        "lr of the run": power(2.0**probe.log2_lr),
        "by": probe.source,
    }


def _foot(found: OneRun) -> Iterator[str]:
    yield wrapped(f"Forecast by {found.probes[0].source}: {found.probes[0].reason}.")
    yield wrapped(f"Assumed, not tested: {'; '.join(found.assumes)}.")
