"""The ``[axes]`` of a study file: names, lists and ranges, and their product. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from disco.train.config import GROUPS, ConfigError, TrainConfig, number

ALIASES = {
    "lr": "optimizer.lr",
    "ratios": "optimizer.ratios",
    "ratio": "optimizer.ratios",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "betas": "optimizer.betas",
    "width": "model.width",
    "depth": "model.depth",
    "placement": "model.placement",
    "residual": "model.residual",
    "depth_init": "model.depth_init",
    "warmup": "schedule.warmup",
}
"""Short names of axes; any other key of TrainConfig is written with dots, such as ``model.kv_heads``."""

NOT_AXES = {"parent", "keep", "checkpoint_seconds", "data.digest", "data.vocab"}

FARTHEST = 1000
"""Largest absolute log2 of a learning rate."""


@dataclass(frozen=True)
class Centred:
    """Learning rates around a centre that moves with the batch: centre x (batch / at_batch)^exponent.

    ``octaves`` is how far they reach to either side; they lie on the powers of ``step``, whatever the batch.
    """

    centre: float
    at_batch: float
    exponent: float
    octaves: float
    step: float

    def values(self, batch: float) -> list[float]:
        """The learning rates at ``batch`` tokens per step, ascending.

        Raises:
            ConfigError: no batch, or learning rates that no float can hold.
        """
        _above(batch, 0, "batch")
        octave = math.log2(self.step)
        centre = math.log2(self.centre) + self.exponent * (math.log2(batch) - math.log2(self.at_batch))
        if abs(centre) + self.octaves > FARTHEST:
            raise ConfigError(
                f"axes.lr: 2^{centre:g} and {self.octaves:g} octaves around it, at batch {batch:g}, is too far"
            )
        middle, reach = round(centre / octave), math.floor(self.octaves / octave + 1e-9)
        return [power_of_two(k * octave) for k in range(middle - reach, middle + reach + 1)]


@dataclass(frozen=True)
class Axis:
    """A dotted key of TrainConfig and what it takes in turn."""

    key: str
    values: tuple[Any, ...] | Centred


def read_axes(table: Mapping[str, Any], prefix: str = "") -> list[Axis]:
    """The axes of one ``[axes]`` table.

    Raises:
        ConfigError: an unknown axis or a range that makes no sense; the message names the key.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"axes must be a table such as lr = [0.1, 0.2], got {table!r}")
    axes = []
    for word, value in table.items():
        where = f"{prefix}{word}"
        if isinstance(value, Mapping) and not {"from", "to", "step", "centre"} & value.keys():
            axes += read_axes(value, where + ".")
        else:
            axes.append(Axis(_key(where), _values(value, f"axes.{where}", lr=_key(where) == "optimizer.lr")))
    return axes


def product(base: Mapping[str, Any], axes: list[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination of the axes laid over ``base``, as nested tables for ``train.config.from_dict``.

    A whole table (``optimizer = [{name = "adam", betas = [0, 0]}]``) is merged into the base's before single keys.
    """
    plain = sorted((axis for axis in axes if isinstance(axis.values, tuple)), key=lambda axis: axis.key.count("."))
    centred = [axis for axis in axes if isinstance(axis.values, Centred)]
    for point in itertools.product(*(axis.values for axis in plain if isinstance(axis.values, tuple))):
        table = _copy(base)
        for axis, value in zip(plain, point, strict=True):
            _assign(table, axis.key, value)
        if not centred:
            yield table
        for axis in centred:
            assert isinstance(axis.values, Centred)
            for value in axis.values.values(number(table.get("batch", TrainConfig.batch), "batch")):
                moved = _copy(table)
                _assign(moved, axis.key, value)
                yield moved


def _key(word: str) -> str:
    """The dotted key of TrainConfig that an axis name stands for."""
    first, _, rest = word.partition(".")
    key = ".".join(part for part in (ALIASES.get(first, first), rest) if part)
    known = list(_keys(TrainConfig)) + [f"optimizer.ratios.{group}" for group in GROUPS]
    if key not in known:
        near = difflib.get_close_matches(word, [*ALIASES, *known, *(f"ratio.{group}" for group in GROUPS)], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"short names: {', '.join(ALIASES)}"
        raise ConfigError(f"unknown key {'axes.' + word!r}; {hint}")
    return key


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = prefix + field.name
        if key not in NOT_AXES:
            yield key
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], key + ".")


def _values(value: Any, where: str, lr: bool) -> tuple[Any, ...] | Centred:
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{where} is an empty list")
        # A list for the whole table "optimizer" may give names alone.
        return tuple({"name": v} if where == "axes.optimizer" and isinstance(v, str) else v for v in value)
    if not isinstance(value, Mapping):
        return _values([value], where, lr)
    if "centre" not in value:
        return _range(_numbers(value, where, ("from", "to", "step")), where)
    if not lr:
        raise ConfigError(f"{where}: only lr has a centre that follows the batch; give a list or from, to, step")
    numbers = _numbers(value, where, ("centre", "at_batch", "exponent", "octaves", "step"))
    for key in ("centre", "at_batch"):
        _above(numbers[key], 0, f"{where}.{key}")
    if numbers["octaves"] < 0:
        raise ConfigError(f"{where}.octaves must be 0 or more, got {numbers['octaves']:g}")
    return Centred(**numbers)


def _range(numbers: Mapping[str, float], where: str) -> tuple[float, ...]:
    first, last, step = numbers["from"], numbers["to"], numbers["step"]
    _above(first, 0, f"{where}.from")
    if last < first:
        raise ConfigError(f"{where}: to ({last:g}) is below from ({first:g})")
    count = math.floor((math.log2(last) - math.log2(first)) / math.log2(step) + 1e-9) + 1
    return tuple(power_of_two(math.log2(first) + i * math.log2(step)) for i in range(count))


def _numbers(value: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> dict[str, float]:
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}"
            raise ConfigError(f"unknown key '{where}.{key}'; {hint}")
    for key in keys:
        if key not in value:
            raise ConfigError(f"{where} needs {', '.join(keys)}; {key} is missing")
    numbers = {key: _number(value[key], f"{where}.{key}") for key in keys}
    _above(numbers["step"], 1, f"{where}.step")
    return numbers


def _number(value: Any, where: str) -> float:
    """A number, a power such as "2^-5", or a root such as "sqrt2"."""
    root = re.fullmatch(r"\s*sqrt\(?(\d+)\)?\s*", value) if isinstance(value, str) else None
    return number(math.sqrt(float(root[1])) if root else value, where)


def _above(value: float, limit: float, where: str) -> None:
    if not (math.isfinite(value) and value > limit):
        raise ConfigError(f"{where} must be above {limit}, got {value:g}")


def power_of_two(exponent: float) -> float:
    """2^exponent, the same float however a range arrives there; whole numbers stay whole."""
    value: float = 2.0 ** (round(8 * exponent) / 8) if abs(8 * exponent - round(8 * exponent)) < 1e-6 else 2.0**exponent
    return float(round(value)) if value >= 1 and abs(value - round(value)) < 1e-9 * value else value


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def _assign(table: dict[str, Any], key: str, value: Any) -> None:
    first, _, rest = key.partition(".")
    if not rest and (first == "ratios" or not isinstance(value, Mapping)):
        table[first] = value
        return
    inner = table.setdefault(first, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"{first} must be a table for its axes, such as {{ name = ... }}, got {inner!r}")
    for name, item in {rest: value}.items() if rest else value.items():  # a table of settings is merged
        _assign(inner, name, item)
