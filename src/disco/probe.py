"""Which norms are logged: every layer's own, those of input and output that the paper compares, and the size of the
momentum. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from disco.base import parameter_names
from disco.groups import layer_name
from disco.runs.schema import MOMENTUM, Metric, norm_key
from disco.scion import Scion

T = TypeVar("T")

EXTRA: Mapping[str, Sequence[str]] = {"input": ("rms_to_rms", "rms_to_inf"), "output": ("rms_to_rms", "one_to_rms")}
"""Layer group -> norms beside its own (arXiv:2510.03871, figure 10)."""


class Measures(Protocol):
    """What a probe asks: an optimizer that can tell the norms of its parameters."""

    param_groups: list[dict[str, Any]]

    def norms(
        self, which: str | None = None, of: str = "weights", groups: Sequence[str] | None = None
    ) -> dict[str, float]: ...


class Probe:
    """Asks an optimizer for the norms to log.

    Args:
        optimizer: ``disco.Scion`` or any other with its ``norms`` method and ``group`` labels.
        extra: layer group -> names of norms to log beside the assigned ones.
        of: of what: "weights", "updates", "momentum".
        size: whether the size of the momentum (``schema.MOMENTUM``) is logged too. It tells something where gradients
            are neither clipped nor scaled.
    """

    def __init__(
        self,
        optimizer: Measures,
        extra: Mapping[str, Sequence[str]] = EXTRA,
        of: Sequence[str] = ("weights",),
        size: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._asked = extra, of, size

    def measure(self) -> dict[str, float]:
        """Metric key -> norm, see ``disco.runs.schema.norm_key``."""
        result: dict[str, float] = {}
        for which, of, label in _questions(self._optimizer, *self._asked):
            result |= _by_key(self._optimizer.norms(which, of, groups=[label]), which, of)
        return _without_idle(result)


def measure_each(optimizer: Scion, extra: Mapping[str, Sequence[str]] = EXTRA) -> list[dict[str, float]]:
    """What ``Probe(optimizer, size=True).measure()`` gives, for each run of a cohort; parameters are [runs, ...]."""
    result: dict[str, list[float]] = {}
    for which, of, label in _questions(optimizer, extra, ("weights",), size=True):
        norms = optimizer.norms_each(which, of, groups=[label])
        result |= _by_key({name: values.tolist() for name, values in norms.items()}, which, of)
    lines = zip(*result.values(), strict=True)
    return [_without_idle(dict(zip(result, values, strict=True))) for values in lines]


def layers(optimizer: Measures) -> dict[str, list[str]]:
    """Layer group -> its layers: parameter names without a final ".weight"."""
    result: dict[str, list[str]] = {}
    for index, group in enumerate(optimizer.param_groups):
        result.setdefault(str(group["group"]), []).extend(map(layer_name, parameter_names(group, index)))
    return result


def largest(line: Mapping[str, float], layers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``norm/<group>/<norm>`` -> that of the group's largest layer, of the norms of weights in a line of metrics."""
    group_of = {layer: group for group, own in layers.items() for layer in own}
    prefix, result = f"{Metric.NORM}weights/", dict[str, float]()
    for key, value in line.items():
        if key.startswith(prefix):
            which, layer = key.removeprefix(prefix).split("/", 1)
            name = f"{Metric.NORM}{group_of[layer]}/{which}"
            result[name] = max(value, result.get(name, value))
    return result


def _questions(
    optimizer: Measures, extra: Mapping[str, Sequence[str]], quantities: Sequence[str], size: bool
) -> Iterator[tuple[str, str, str]]:
    """(norm, of what, layer group) of everything that is logged."""
    for of in quantities:
        for group in optimizer.param_groups:
            label, own = str(group["group"]), str(group["norm"])
            for which in (own, *extra.get(label, ())):
                yield which, of, label
    labels = dict.fromkeys(str(group["group"]) for group in optimizer.param_groups if size)
    for label in labels:
        if label != "vector":
            yield *MOMENTUM, label


def _without_idle(line: dict[str, float]) -> dict[str, float]:
    """Without the momentum before the first step: its buffer, if there is one, is empty."""
    idle = norm_key(MOMENTUM[0], "", MOMENTUM[1])
    return {key: value for key, value in line.items() if value or not key.startswith(idle)}


def _by_key(norms: Mapping[str, T], which: str, of: str) -> dict[str, T]:
    return {norm_key(which, layer_name(name), of): value for name, value in norms.items()}
