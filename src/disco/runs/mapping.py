"""``lr=2^log2_lr``, ``batch=bs*2048``: columns from arithmetic on those of a table. Parsed, never run as code.

An assignment is NAME=EXPRESSION. An expression is the name of a column as it stands in the table, or arithmetic on
columns and numbers: + - * / ** (or ^) and parentheses, log2(...) and exp2(...). A column whose name is not a plain word
stands in backquotes: `smooth loss`, `track/x`. 'text' or "text" in quotes is that text in every row.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import polars as pl

from disco.errors import UserError

LONGEST = 1000
"""Characters of an expression; more is a mistake."""

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, Callable[[pl.Expr], pl.Expr]] = {
    "log2": lambda x: x.log(2),
    "exp2": lambda x: pl.lit(2.0).pow(x),
}


class _WrongError(Exception):
    """Why an expression cannot be used."""


def with_columns(table: pl.DataFrame, maps: Iterable[str]) -> pl.DataFrame:
    """The table with the columns of ``maps`` added, in their order.

    Names in an expression are columns of ``table`` as it was given, or else those of earlier maps. Text where a number
    is needed becomes missing.

    Args:
        table: Any table.
        maps: Assignments NAME=EXPRESSION.

    Raises:
        UserError: an assignment that cannot be read, is made twice, names a column that is not there (the message has
            the nearest names), or calculates with text.
    """
    made: dict[str, pl.Series] = {}
    for text in maps:
        name, equals, source = (part.strip() for part in text.partition("="))
        if not (equals and name and source):
            raise UserError(f"--map takes NAME=EXPRESSION, such as lr=peak_lr or batch=bs*2048, got {text!r}")
        if name in made:
            raise UserError(f"--map {text}: {name} is already mapped")
        known = table.with_columns(**{key: values for key, values in made.items() if key not in table.columns})
        try:
            values = known.select(_expression(source, known).alias(name))[name]
        except _WrongError as wrong:
            raise UserError(f"--map {text}: {wrong}") from None
        made[name] = values if len(values) == len(table) else values.new_from_index(0, len(table))  # of a constant
    return table.with_columns(**made)


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """ "; nearest: lr, lr_std", or what there is, for a message about a missing column."""
    names = list(known)
    lower = {each.lower(): each for each in reversed(names)}
    close = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=most, cutoff=0.5)]
    close += [each for each in names if name and name.lower() in each.lower() and each not in close]
    if close:
        return f"nearest: {', '.join(close[:most])}"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"there are: {shown}" if names else "there are none"


def _expression(text: str, table: pl.DataFrame) -> pl.Expr:
    if text in table.columns:  # a name wins over arithmetic: D/N is a column in some tables
        return pl.col(text)
    if len(text) > LONGEST:
        raise _WrongError(f"longer than {LONGEST} characters")
    quoted: dict[str, str] = {}

    def stand_in(match: re.Match[str]) -> str:
        key = f"_quoted_{len(quoted)}_"
        quoted[key] = match[1]
        return f" {key} "

    plain = re.sub(r"`([^`]*)`", stand_in, text)
    if "'" not in plain and '"' not in plain:
        plain = plain.replace("^", "**")  # as ast reads ^, it would bind weaker than + and *
    try:
        tree = ast.parse(plain.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hint = "; column names that are not plain words go in backquotes, such as `smooth loss`"
        raise _WrongError(f"not an expression{'' if '`' in text else hint}") from None
    try:
        built = _build(tree, table, quoted)
    except RecursionError:
        raise _WrongError("nested too deeply") from None
    return built if isinstance(built, pl.Expr) else pl.lit(built)


def _build(node: ast.expr, table: pl.DataFrame, quoted: Mapping[str, str], alone: bool = True) -> pl.Expr | float | str:
    """A column, or a number of Python. ``alone``: the whole expression, where text is allowed."""

    def number(child: ast.expr) -> Any:
        return _build(child, table, quoted, alone=False)

    match node:
        case ast.Constant(value=bool() | None as word):
            raise _WrongError(f"{word} is no number; a column of that name goes in backquotes")
        case ast.Constant(value=int() | float() as value):
            return _float(value)
        case ast.Constant(value=str() as word) if alone:
            return word
        case ast.Name(id=name):
            return _column(quoted.get(name, name), table, alone)
        case ast.UnaryOp(op=ast.USub()):
            return -number(node.operand)
        case ast.UnaryOp(op=ast.UAdd()):
            return number(node.operand)
        case ast.BinOp(op=op) if type(op) in _BINARY:
            left, right = number(node.left), number(node.right)
            if isinstance(left, pl.Expr) or isinstance(right, pl.Expr):
                left = pl.lit(left) if isinstance(left, float) else left
                return _BINARY[type(op)](left, right)
            return _constant(_BINARY[type(op)], left, right)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            value = number(argument)
            if isinstance(value, pl.Expr):
                return _FUNCTIONS[name](value)
            return _constant(math.log2 if name == "log2" else lambda x: 2.0**x, value)
        case ast.Call():
            raise _WrongError(f"the functions are {' and '.join(f'{each}(x)' for each in _FUNCTIONS)}")
        case _:
            what = f": {ast.unparse(node)}" if not quoted else ""
            raise _WrongError(f"only + - * / ** ^, parentheses, numbers and columns are understood{what}")


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _WrongError("a number is too large") from None


def _constant(function: Callable[..., Any], *values: float) -> float:
    try:
        result = function(*values)
    except (ArithmeticError, ValueError) as error:
        raise _WrongError(f"the number cannot be computed: {error}") from None
    if isinstance(result, complex) or not math.isfinite(result):
        raise _WrongError("a number in it is not finite")
    return float(result)


def _column(name: str, table: pl.DataFrame, alone: bool) -> pl.Expr:
    if name not in table.columns:
        raise _WrongError(f"no column {name!r}; {nearest(name, table.columns)}")
    if alone:
        return pl.col(name)
    kind = table.schema[name]
    if not (kind.is_numeric() or kind in (pl.String, pl.Boolean, pl.Null)):
        raise _WrongError(f"column {name!r} holds {kind}, which is not a number")
    if kind == pl.String:
        values = table[name].drop_nulls()
        numbers = values.cast(pl.Float64, strict=False)
        if len(values) and numbers.null_count() == len(values):
            raise _WrongError(f"column {name!r} holds text such as {values[0]!r}, which is not a number")
    return pl.col(name).cast(pl.Float64, strict=False)
