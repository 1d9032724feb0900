"""Learning rate over the steps of a run, and the steps at which it is measured. No torch.

One constant-rate run yields every horizon (arXiv:2510.03871 section 3), so its evaluation points must be those of a
shorter run, and more. Steps count optimizer updates made: step 0 is the initial weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from disco.runs.horizons import powers_of_two, window
from disco.train.config import TrainConfig

Shape = Literal["linear", "sqrt", "cosine"]


def factor(
    step: int, *, steps: int, warmup: float = 0, decay: float = 0, shape: Shape = "linear", minimum: float = 0.0
) -> float:
    """Learning rate of update ``step`` = 0..steps-1 over the peak rate (warmup, stable, decay).

    Args:
        step: index of the update.
        steps: updates in the run.
        warmup: updates of the linear rise; update i has (i + 1) / warmup.
        decay: updates of the fall at the end; the first of them is still at the peak, so ``minimum`` is reached only
            after the last. Where it overlaps the warmup, the lower of the two holds.
        shape: of the fall, in x = fraction of it done: 1 - x, 1 - sqrt(x) or (1 + cos(pi x)) / 2.
        minimum: factor that the fall tends to.

    Raises:
        ValueError: a step outside the run, or an unknown shape.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be in 0..{steps - 1}, got {step}")
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = max(0.0, (step - (steps - decay)) / decay) if decay else 0.0
    if shape == "linear":
        fall = 1 - done
    elif shape == "sqrt":
        fall = 1 - math.sqrt(done)
    elif shape == "cosine":
        fall = (1 + math.cos(math.pi * done)) / 2
    else:
        raise ValueError(f"shape must be linear, sqrt or cosine, got {shape!r}")
    return min(rise, minimum + (1 - minimum) * fall)


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Learning rate of update ``step`` over the configured one; without decay it does not depend on the horizon."""
    steps = config.horizon // config.batch
    decay = steps - config.branch_tokens // config.batch if config.schedule.decay else 0
    return factor(step, steps=steps, warmup=config.schedule.warmup / config.batch, decay=decay)


@dataclass(frozen=True, order=True)
class Point:
    """A step after which the run is measured: norms and training loss always, held-out loss at a ``horizon``."""

    step: int
    horizon: bool


def evaluation_points(config: TrainConfig) -> tuple[Point, ...]:
    """Where a run is measured, in the order of steps: its start, the norm curve, and the window of each horizon.

    The norm curve takes the steps 2^(k/2). The horizons are the powers of two in tokens that are multiples of the batch
    and at least four times the held-out tokens (``runs.horizons``), and the run's own end. A longer run of the same
    configuration only appends points, except that the window of the shorter run's own horizon is not its own.
    """
    last = config.horizon // config.batch
    ahead = 2 * config.horizon  # the window of the first horizon past the end may begin before it
    ends = [last, *(tokens // config.batch for tokens in powers_of_two(config.batch, config.data.valid_tokens, ahead))]
    horizons = {0}.union(*map(window, ends))
    curve = {round(2 ** (k / 2)) for k in range(2 * last.bit_length())}
    return tuple(Point(step, step in horizons) for step in sorted(horizons | curve) if step <= last)
