"""Which norms are logged: every layer's own, and those of input and output that the paper compares. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from disco.groups import layer_name
from disco.runs.schema import norm_key

EXTRA: Mapping[str, Sequence[str]] = {"input": ("rms_to_rms", "rms_to_inf"), "output": ("rms_to_rms", "one_to_rms")}
"""Layer group -> norms beside its own (arXiv:2510.03871, figure 10)."""


class Measures(Protocol):
    """What a probe asks: an optimizer that can tell the norms of its parameters."""

    param_groups: list[dict[str, object]]

    def norms(
        self, which: str | None = None, of: str = "weights", groups: Sequence[str] | None = None
    ) -> dict[str, float]: ...


class Probe:
    """Asks an optimizer for the norms to log.

    Args:
        optimizer: ``disco.Scion`` or any other with its ``norms`` method and ``group`` labels.
        extra: layer group -> names of norms to log beside the assigned ones.
        of: of what: "weights", "updates", "momentum".
    """

    def __init__(
        self, optimizer: Measures, extra: Mapping[str, Sequence[str]] = EXTRA, of: Sequence[str] = ("weights",)
    ) -> None:
        self._optimizer = optimizer
        self._extra = extra
        self._of = of

    def measure(self) -> dict[str, float]:
        """Metric key -> norm, see ``disco.runs.schema.norm_key``."""
        result: dict[str, float] = {}
        for of in self._of:
            for group in self._optimizer.param_groups:
                label, own = str(group["group"]), str(group["norm"])
                for which in (own, *self._extra.get(label, ())):
                    values = self._optimizer.norms(which, of, groups=[label])
                    result |= {norm_key(which, layer_name(name), of): value for name, value in values.items()}
        return result
