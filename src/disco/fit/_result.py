"""Frozen results to JSON types and back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Self


class Result:
    """Base of the frozen result dataclasses: ``to_dict`` and ``from_dict`` are inverses.

    In the dictionary a number that could not be estimated is None; in memory it is NaN.
    """

    def to_dict(self) -> dict[str, Any]:
        """Dictionary of JSON types (no NaN, no infinity, no tuples)."""
        result: dict[str, Any] = _plain(self)
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuilds the result; keys this version does not know are ignored."""
        result: Self = _build(cls, values)
        return result


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _build(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        return None if value is None else _build(arguments[0], value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind) if f.name in value]
        return typing.cast(type, kind)(**{name: _build(hints[name], value[name]) for name in names})
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_build(item_kind, item) for item_kind, item in zip(kinds, value, strict=True))
    if origin is dict:
        return {key: _build(arguments[1], item) for key, item in value.items()}
    if kind is float:
        return math.nan if value is None else float(value)
    return value
