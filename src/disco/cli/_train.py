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
from disco.integrations.trackers import chosen
from disco.runs.reader import read_run
from disco.runs.schema import DATA, Metric, Outcome
from disco.runs.units import power
from disco.sweep.progress import Display, Snapshot, display
from disco.train.config import ConfigError, TrainConfig, from_dict
from disco.train.data import prepare

if TYPE_CHECKING:
    from disco.train.team import Team


WAIT = 10.0
"""Seconds that other processes give the first one to say what is wrong with all of them, before they say it."""


def train(
    path: Path, settings: Sequence[str], data: Sequence[str], out: Path, threads: int, track: str, as_json: bool
) -> int:
    """Trains the run of a configuration file, in this process or with all that torchrun started.

    Returns:
        The exit code: 1 if it diverged, 143 if it was told to stop by SIGTERM, and saved; of many processes, 130 by
        SIGINT.
    """
    rank = os.environ.get("RANK", "0")
    told: list[int] = []
    with ExitStack() as group:
        try:
            if track:
                chosen(track)
            config = load_config(path, settings)

            import torch

            from disco.train.team import TrainingStoppedError, started

            torch.set_num_threads(threads)
            team = group.enter_context(started(config))
            config = replace(config, data=prepare(config.data, out / DATA, source=data))
            try:
                outcome = _trained(config, out, team, track, as_json, told)
            except TrainingStoppedError as stopped:
                number = signal.Signals(told[0] if told else signal.SIGTERM)
                if team.leads:
                    where = f"at {stopped.tokens:,} tokens, and saved: {out / config.id}"
                    print(f"disco: stopped by {number.name} {where}", file=sys.stderr)
                elif not told:  # the first process has an error to say
                    time.sleep(WAIT)
                return 128 + number
        except UserError as error:
            if rank != "0":
                time.sleep(WAIT)  # within the group: the others wait too, instead of failing first for another reason
                error.args = (f"rank {rank}: {error}",)
            raise
    if team.leads:
        _report(config, out, outcome, as_json)
    return 0 if outcome == Outcome.FINISHED else 1


def _trained(config: TrainConfig, out: Path, team: Team, track: str, as_json: bool, told: list[int]) -> Outcome:
    """Trains until the end, or until a signal is ``told``: SIGTERM, of many processes SIGINT too."""
    from disco.train.loop import train as train_run
    from disco.train.team import TrainingStoppedError

    collected = (signal.SIGTERM, signal.SIGINT) if team.size > 1 else (signal.SIGTERM,)
    before = {number: signal.signal(number, lambda got, _: told.append(got)) for number in collected}
    try:
        with ExitStack() as stack:
            show = None
            if team.leads:
                stack.enter_context(following(out / config.id, track))
                show = _reporter(config, stack.enter_context(display(as_json)))

            def progress(step: int, tokens: int) -> None:
                if show is not None:
                    show(step, tokens)
                if told and tokens < config.horizon:
                    raise TrainingStoppedError(tokens)

            return train_run(config, out, progress, team)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
