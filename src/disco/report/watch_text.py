"""A check of a run as text: in full, and in one line for a run that is followed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from disco.guide import Check
from disco.guide._bands import LOSS, named
from disco.guide._faults import Seen
from disco.report.text import wrapped
from disco.runs.units import counted, power, two_to


def render_check(check: Check) -> str:
    """All that a check says."""
    return "\n".join((*_head(check), *_quantities(check), *_ahead(check), *_back(check)))


def line(check: Check) -> str:
    """Tokens, loss and norm now, the norm at the end, the distance from the target's rate, and the verdict with its
    reason."""
    parts = [_far(check), f"loss {_loss(check.loss)}", f"norm {power(check.norm)}"]
    if check.forecast is not None:
        parts.append(f"at the end {two_to(check.forecast.log2)}")
    if check.octaves is not None:
        parts.append(f"rate {check.octaves.octaves:+.2f} octaves off")
    why = f": {check.reasons[0]}" if check.verdict != "on course" and check.reasons else ""
    return f"{', '.join(parts)}: {check.verdict}{why}"


def _head(check: Check) -> Iterator[str]:
    verdict = check.verdict if check.verdict == "on course" else check.verdict.upper()
    ended = f" (the run has {check.ended})" if check.ended else ""
    yield f"{verdict} after {_far(check)}{ended}"
    for reason in check.reasons:
        yield wrapped(reason, "  ")


def _far(check: Check) -> str:
    if not check.tokens:
        return "0 tokens"
    share = f" ({check.tokens / check.horizon:.1%})" if check.horizon > 0 else ""
    return f"{counted(check.tokens)} tokens{share}"


def _quantities(check: Check) -> Iterator[str]:
    seen = {each.quantity: each for each in check.seen}
    if LOSS not in seen and math.isfinite(check.loss):
        yield f"  {'loss':16}{_loss(check.loss):>9}"
    if "output" not in seen and math.isfinite(check.norm):
        yield f"  {'output norm':16}{power(check.norm):>9}"
    for name, each in seen.items():
        yield _quantity(name, each)


def _quantity(name: str, each: Seen) -> str:
    show = _loss if name == LOSS else two_to
    band = f"planned {show(each.expected)}, band {show(each.low)} .. {show(each.high)}"
    return f"  {named(name):16}{show(each.value):>9}  {band}{'  OUTSIDE' if each.outside else ''}"


def _ahead(check: Check) -> Iterator[str]:
    found = check.forecast
    if found is None:
        return
    ends = f"90%: {two_to(found.low)} .. {two_to(found.high)}"
    yield f"  {'norm, end':16}{two_to(found.log2):>9}  {ends}, by {found.source}"
    if check.target is not None:
        target = check.target
        ends = f"90%: {two_to(target.low)} .. {two_to(target.high)}"
        yield f"  {target_name(check):16}{two_to(target.log2):>9}  {ends}, by the {check.target_by}"
    if check.octaves is not None:
        off = check.octaves
        yield f"  {'rate off by':16}{off.octaves:>+9.2f}  90%: {off.low:+.2f} .. {off.high:+.2f} octaves"
    if check.cost is not None and check.cost_interval is not None:
        low, high = check.cost_interval
        yield f"  {'going on costs':16}{check.cost:>9.2g}  90%: {low:.2g} .. {high:.2g} nats ({check.rests_on})"
    elif check.rests_on:
        yield wrapped(check.rests_on, "  ")


def _back(check: Check) -> Iterator[str]:
    found = check.correction
    if found is None:
        return
    if found.lr is None or found.batch is None:
        yield wrapped(found.why, "  ")
        return
    yield wrapped(f"learning rate from now on: {power(found.lr)} ({found.lr:.4g}), {found.why}", "  ")
    yield wrapped(f"or, at the same rate, batches of {power(found.batch)} tokens ({found.batch:,.0f})", "  ")


def target_name(check: Check) -> str:
    """What the norm to end with is: that of the planned rate need not be the best."""
    return "planned norm" if check.target_by == "planned rate" else "best norm"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
