"""How numbers are shown: learning rates, batches and norms as powers of two, counts of tokens as powers of two where
they are such and in short otherwise, errors in the last digits. No torch."""

from __future__ import annotations

import math

UNKNOWN = "–"
"""Where there is no number."""
NEAR = 0.005
"""Octaves within which a count is shown as a power of two: horizons are rounded to whole steps."""


def power(value: float | None, digits: int = 2) -> str:
    """A positive number as a power of two: 0.03125 -> "2^-5", 0.0221 -> "2^-5.5"; a dash where there is none."""
    return two_to(math.log2(value), digits) if value is not None and 0 < value < math.inf else UNKNOWN


def two_to(log2: float, digits: int = 2) -> str:
    """The same from the logarithm: -5.5 -> "2^-5.5"; a dash for NaN."""
    return f"2^{round(log2, digits) + 0.0:g}" if math.isfinite(log2) else UNKNOWN  # + 0.0: no -0


def exact(value: float) -> str:
    """A number such that different ones look different: 1024 -> "2^10", 1536 -> "1,536", 2e10 -> "20B"."""
    octaves = round(math.log2(value), 2) if value > 0 else math.nan
    if math.isclose(2**octaves, value, rel_tol=1e-12):
        return two_to(octaves)
    in_short = 1e6 <= value < 1e15 and float(f"{value:.3g}") == value
    return short(value) if in_short else f"{value:,.12g}"


def counted(count: float) -> str:
    """A count of tokens: 2_097_152 -> "2^21", 3_000_000 -> "3M"; a dash where there is none."""
    if not math.isfinite(count):
        return UNKNOWN
    octaves = math.log2(max(count, 1.0))
    near = count >= 16 and abs(octaves - round(octaves)) <= NEAR
    return two_to(round(octaves)) if near else short(count)


def short(count: float) -> str:
    """A count with three digits: 950 -> "950", 2_097_152 -> "2.1M"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
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


def error_digits(value: float, error: float) -> str:
    """0.619(51): two digits of the standard error, in units of the last digit of the value."""
    if not math.isfinite(value):
        return UNKNOWN
    if not math.isfinite(error) or error <= 0:
        return f"{value:.3g}"
    if error >= 0.995:
        return f"{value:.2f}({error:.2f})"
    digits = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    return f"{value:.{digits}f}({round(error * 10**digits):d})"


def power_range(log2: float, interval: tuple[float, float] | None, digits: int = 2) -> str:
    """2^-5.52 [-5.7, -5.3]; without an interval the power alone."""
    if interval is None or not math.isfinite(log2):
        return two_to(log2, digits)
    return f"{two_to(log2, digits)} [{interval[0]:.1f}, {interval[1]:.1f}]"
