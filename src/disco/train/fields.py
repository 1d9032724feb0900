"""Configurations as dataclasses whose fields have their declared types, and their dictionary form. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from disco.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be run; the message says what, what was given and what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def coerce(config: Any) -> None:
    """Gives every field its declared type, so that 1 and 1.0 are one configuration and have one run id."""
    cls: type = type(config)
    for name, kind in _types(cls).items():
        object.__setattr__(config, name, _convert(kind, getattr(config, name), name))


def positive(**values: float | int | None) -> None:
    for name, value in values.items():
        ok = value is None or (math.isfinite(value) and value > 0)
        require(ok, f"{name} must be a positive number, got {value!r}")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionary (JSON types) of a configuration; ``from_dict`` is its inverse."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(config)
    return result


THOUSANDS = {"K": 3, "M": 6, "B": 9, "G": 9, "T": 12}
"""Powers of ten of a count in short."""


def number(value: Any, where: str) -> float:
    """A finite number; as text also a power, ``"2^-5"``, ``"2**-5.5"``, or a count in short, ``"20k"``, ``"10B"``.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:\^|\*\*)\s*\(?(-?\d+(?:\.\d+)?)\)?\s*", value)
            in_short = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([kKMBbGT])\s*", value)
            if match:
                result = float(match[1]) ** float(match[2])
            else:
                result = float(f"{in_short[1]}e{THOUSANDS[in_short[2].upper()]}" if in_short else value)
        else:
            result = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except (ValueError, ArithmeticError):  # not a number, or one too large for a float
        result = math.nan
    require(math.isfinite(result), f'{where} must be a number such as 0.03 or "2^-5", got {value!r}')
    return result + 0.0  # no negative zero


def from_dict(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Builds a configuration dataclass from nested dictionaries (TOML, JSON).

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, or one that is not valid.
    """
    name = where.rstrip(".") or "the configuration"
    require(isinstance(values, Mapping), f"{name} must be a table, got {values!r}")
    known = _types(kind)
    for key in values:
        require(key in known, f"unknown key {where + key!r}{hint(key, known)}")
    return kind(**{key: _convert(known[key], value, where + key) for key, value in values.items()})


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    """The declared types of a dataclass's fields."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        return None if value is None else _convert(arguments[0], value, where)
    if origin is Literal:
        require(value in arguments, f"{where} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(arguments[0], item, where) for item in items)
    if dataclasses.is_dataclass(kind):
        made = isinstance(value, typing.cast(type, kind))
        return value if made else from_dict(typing.cast(type, kind), value, where + ".")
    if kind is int:
        whole = number(value, where)
        require(whole == int(whole), f"{where} must be a whole number, got {value!r}")
        return int(value if isinstance(value, numbers.Integral) else whole)  # a float is exact to 2^53 only
    if kind is float:
        return number(value, where)
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(value, Mapping), f"{where} must be a table, got {value!r}")
        return {key: number(item, f"{where}.{key}") for key, item in value.items()}
    require(isinstance(value, kind), f"{where} must be {kind.__name__}, got {value!r}")
    return value


def hint(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
