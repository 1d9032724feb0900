"""From arguments to a call, and what tyro says of wrong ones in one line."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from disco.errors import UserError


def command(parent: tyro.extras.SubcommandApp, name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a command so that parsing it gives a call to make, rather than making it while tyro parses."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def later(*args: Any, **kwargs: Any) -> Callable[[], int]:
            return functools.partial(function, *args, **kwargs)

        parent.command(name=name)(later)
        return function

    return register


def parsed(app: tyro.extras.SubcommandApp, args: Sequence[str] | None) -> Callable[[], int]:
    """The call that the arguments ask for.

    Raises:
        UserError: the arguments are wrong; tyro's box of several lines, as one line.
    """
    settings = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    about = "Which learning rate and batch size for the run that is too big to sweep?"
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            call: Callable[[], int] = app.cli(prog="disco", description=about, args=args, config=settings)
            return call
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(box.getvalue())}; see disco --help") from None


def _one_line(box: str) -> str:
    """What tyro's box says, without its frame (drawn in UTF-8 or in ASCII), its title and its hints."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()
    text = " ".join(line.strip("│╰╯ ") for line in lines[1 if lines[0].startswith("╭") else 2 :])
    parts = [part.strip(" .") for part in re.split("[─-]{4,}", text)]
    return "; ".join(p for p in parts if p and not p.startswith(("For full", "Argument helptext", "Perhaps")))
