"""At which numbers of tokens a run is a result, and which evaluations give it; for writer and reader. No torch."""

from __future__ import annotations

from collections.abc import Iterator

WINDOW = 64
"""The window of a horizon of s steps is s - 2d, s - d, s with d = max(1, s // WINDOW)."""

SHORTEST = 4
"""Least tokens of a horizon over held-out tokens: evaluation then costs little against training."""


def window(step: int) -> tuple[int, ...]:
    """The steps whose held-out losses give the loss and noise of a horizon of ``step`` steps."""
    apart = max(1, step // WINDOW)
    return tuple(at for at in (step - 2 * apart, step - apart, step) if at > 0)


def powers_of_two(batch: int, valid_tokens: int, most: int) -> Iterator[int]:
    """The horizons (tokens) of any run at a constant rate: powers of two up to ``most`` that the batch divides and that
    are at least ``SHORTEST`` times the held-out tokens.
    """
    for power in range(most.bit_length()):
        tokens = 2**power
        if SHORTEST * valid_tokens <= tokens <= most and tokens % batch == 0:
            yield tokens
