"""Kinds of arguments that several commands take, and their checks. Light: every start of the program reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from disco.errors import UserError
from disco.train.config import number

MOST = 1e18
"""Tokens: more than any text holds."""

File = tyro.conf.Positional[Path]
Files = tyro.conf.Positional[tuple[Path, ...]]
Number = Annotated[str, tyro.conf.arg(metavar="NUMBER")]
Output = tyro.conf.arg(aliases=["-o"])
Data = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")]
Track = Annotated[str, tyro.conf.arg(metavar="TRACKERS")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="JSON instead of a table.")]
Words = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """How tables of runs are read; see docs/import.md."""

    map: Annotated[Words, tyro.conf.arg(metavar="NAME=EXPRESSION")] = ()
    """Columns from those of the table, such as lr=peak_lr, batch=bs*2048, tokens=2^log2_d, loss=`smooth loss`: batch
    and tokens in tokens, the loss in nats. Columns that have the right name and unit need no map."""
    preset: str = ""
    """Maps for a known kind of table: norm-transfer-logs or step-law."""
    join: Path | None = None
    """Table with one row per run, such as W&B's table of runs, whose columns are added to the rows of that run."""
    on: str = ""
    """Columns to join on, as HERE=THERE; run=Name if not given."""
    form: str = ""
    """results (a row per run, or per run and horizon) or series (a row per run and step); if not given, series just
    where the table has a step."""

    @property
    def maps(self) -> list[str]:
        """All assignments, in order."""
        return [text for group in self.map for text in group]


TableOptions = Annotated[Tables, tyro.conf.arg(name="")]
AS_IT_IS = Tables()


def at_least_one(option: str, value: int | None) -> None:
    """Raises UserError if the value of an option is below 1."""
    if value is not None and value < 1:
        raise UserError(f"{option} must be 1 or more, got {value}")


def token_count(option: str, text: str) -> int:
    """A positive whole number of tokens, at most ``MOST``."""
    try:
        value = number(text, option)
    except UserError:
        raise UserError(f"{option} must be a count of tokens such as 2^30, 1e9, 10B or 20k, got {text!r}") from None
    if value != int(value) or value < 1:
        raise UserError(f"{option} must be a positive whole number, got {text!r}")
    if value > MOST:
        raise UserError(f"{option} must be at most {MOST:.0e} tokens, got {text!r}")
    return int(value)
