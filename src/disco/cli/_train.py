"""``disco train``."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disco.cli import _show
from disco.errors import UserError
from disco.integrations.follow import following
from disco.runs.reader import read_run
from disco.runs.schema import DATA, Metric, Outcome
from disco.runs.units import power
from disco.sweep.progress import Display, Snapshot, display
from disco.train.config import ConfigError, TrainConfig, from_dict
from disco.train.data import prepare

if TYPE_CHECKING:
    from disco.train.team import Team


WAIT = 10.0
"""Seconds that other processes give the first one to say what is wrong with all of them, before torchrun ends them."""


class _StoppedError(Exception):
    """Told to stop; what was trained is saved."""


def train(
    path: Path, settings: Sequence[str], data: Sequence[str], out: Path, threads: int, track: str, as_json: bool
) -> int:
    """Trains the run of a configuration file, in this process or with all that torchrun started.

    Returns:
        The exit code: 1 if it diverged, 143 if it was told to stop by SIGTERM, and saved.
    """
    config = load_config(path, settings)

    import torch

    from disco.train.team import started

    torch.set_num_threads(threads)
    try:
        with started(config) as team:
            config = replace(config, data=prepare(config.data, out / DATA, source=data))
            outcome = _trained(config, out, team, track, as_json)
    except _StoppedError as stopped:
        if team.leads:
            print(f"disco: {stopped}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(WAIT)
        raise
    if team.leads:
        _report(config, out, outcome, as_json)
    return 0 if outcome == Outcome.FINISHED else 1


def _trained(config: TrainConfig, out: Path, team: Team, track: str, as_json: bool) -> Outcome:
    from disco.train.loop import train as train_run

    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        with ExitStack() as stack:
            show = None
            if team.leads:
                stack.enter_context(following(out / config.id, track))
                show = _reporter(config, stack.enter_context(display(as_json)))

            def progress(step: int, tokens: int) -> None:
                if show is not None:
                    show(step, tokens)
                if team.agree(bool(told)) and tokens < config.horizon:
                    raise _StoppedError(f"stopped by SIGTERM at {tokens:,} tokens, and saved: {out / config.id}")

            return train_run(config, out, progress, team)
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(config: TrainConfig, out: Path, outcome: Outcome, as_json: bool) -> None:
    run = read_run(out / config.id)
    loss = float(run.column(Metric.LOSS_VALID)[-1])
    if as_json:
        _show.event("result", folder=run.folder, loss=loss, **(run.summary or {}))
    else:
        reason = (run.summary or {}).get("reason")
        print(f"{outcome} at {run.tokens:,} tokens" + (f" ({reason})" if reason else "") + f": {run.folder}")
        print(f"held-out loss {_show.fixed(loss)} nats, output norm {_output_norm(run.norm('output', 'rms_to_inf'))}")


def load_config(path: Path, settings: Sequence[str]) -> TrainConfig:
    """Reads a TOML file and lays ``key=value`` settings over it.

    Raises:
        ConfigError: one line that names the file, or the setting.
    """
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes KEY=VALUE, such as optimizer.lr=2^-5, got {setting!r}")
        _assign(table, key, _value(text), setting)
    try:
        config: TrainConfig = from_dict(TrainConfig, table)
    except ConfigError as error:
        raise ConfigError(f"{path}{' with --set' if settings else ''}: {error}") from None
    return config


def _value(text: str) -> Any:
    """A TOML value, or the text itself: 2^-5, everywhere."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(table: dict[str, Any], key: str, value: Any, setting: str) -> None:
    first, _, rest = key.partition(".")
    if not rest:
        table[first] = value
    elif isinstance(inner := table.setdefault(first, {}), dict):
        _assign(inner, rest, value, setting)
    else:
        raise UserError(f"--set {setting}: {first} is not a table")


def _output_norm(values: Any) -> str:
    return power(float(values[-1]) if len(values) else None)


def _reporter(config: TrainConfig, shown: Display) -> Callable[[int, int], None]:
    """Shows the progress of the run from its (step, tokens) callbacks."""
    begun, first, last = time.monotonic(), -1, 0.0

    def progress(step: int, tokens: int) -> None:
        nonlocal first, last
        first = tokens if first < 0 else first
        now = time.monotonic()
        if now - last < 0.5 and tokens < config.horizon:
            return
        last = now
        rate = (tokens - first) / (now - begun) if tokens > first else math.nan
        left = (config.horizon - tokens) / rate
        ended = int(tokens >= config.horizon)
        shown.update(
            Snapshot(
                runs=1, ended=ended, running=1 - ended, diverged=0, failed=0, tokens=config.horizon, done=tokens,
                tokens_per_second=rate, seconds_left=left,
            )
        )  # fmt: skip

    return progress
