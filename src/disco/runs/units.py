"""How numbers are shown: learning rates, batches and norms as powers of two, counts in short. No torch."""

from __future__ import annotations

import math

UNKNOWN = "–"
"""Where there is no number."""


def power(value: float | None, digits: int = 2) -> str:
    """A positive number as a power of two: 0.03125 -> "2^-5", 0.0221 -> "2^-5.5"; a dash where there is none."""
    return two_to(math.log2(value), digits) if value is not None and 0 < value < math.inf else UNKNOWN


def two_to(log2: float, digits: int = 2) -> str:
    """The same from the logarithm: -5.5 -> "2^-5.5"; a dash for NaN."""
    return f"2^{round(log2, digits) + 0.0:g}" if math.isfinite(log2) else UNKNOWN  # + 0.0: no -0


def exact(value: float) -> str:
    """A number such that different ones look different: 1024 -> "2^10", 1536 -> "1,536", 0.3 -> "0.3"."""
    octaves = round(math.log2(value), 2) if value > 0 else math.nan
    return two_to(octaves) if math.isclose(2**octaves, value, rel_tol=1e-12) else f"{value:,.12g}"


def short(count: float) -> str:
    """A count with three digits: 950 -> "950", 2_097_152 -> "2.1M"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """Seconds as "45s", "3m20s" or "2h05m"; "?" where they are unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
