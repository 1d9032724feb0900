"""How numbers are shown: learning rates, batches and norms as powers of two, counts in short. No torch."""

from __future__ import annotations

import math


def power(value: float) -> str:
    """A positive number as a power of two: 0.03125 -> "2^-5", 0.0221 -> "2^-5.5"."""
    return f"2^{round(math.log2(value), 2):g}"


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
