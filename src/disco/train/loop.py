"""The training loop, top to bottom: build, resume, step, evaluate, checkpoint, finish.

A run is a pure function of its configuration: killed anywhere and started again, it continues from its last checkpoint
and leaves the record that an undisturbed run leaves. Runs that differ in a few settings only train together, as a
cohort (``cohort.py``), each with its own record; a run alone is a cohort of one. A team of processes (``launch.py``)
goes through the same loop, each with a part of every batch; its leader has the record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from disco.errors import UserError
from disco.runs.schema import DATA, Outcome
from disco.train.config import TrainConfig, cohort_key
from disco.train.data import TokenStream, check, prepare
from disco.train.member import Member
from disco.train.schedule import evaluation_points, learning_rate_factor
from disco.train.team import Team

Progress = Callable[[int, int], None]
Ended = Callable[[str, Outcome | UserError], None]
End = Callable[[Member, Outcome | UserError], None]

ALONE = Team()


def train(config: TrainConfig, runs: Path, progress: Progress | None = None, team: Team = ALONE) -> Outcome:
    """Trains one run, or continues it, or returns at once if its record says that it is done.

    Args:
        config: the run; its data are prepared if they are not yet.
        runs: folder of run records; the run's own is ``runs / config.id``.
        progress: called with (step, tokens) after every step; what it raises ends the training, resumably.
        team: the processes that train it, all of which call this.

    Returns:
        ``finished``, or ``diverged`` when the training loss exploded, or it or a held-out loss was not finite.

    Raises:
        UserError: bad data, a corpus too short for the horizon, an unwritable folder, damaged checkpoints, another
            process that trains the same run, or a ``parallel`` section for another number of processes.
    """
    (ended,) = train_cohort([config], runs, progress, team=team).values()
    if isinstance(ended, UserError):
        raise ended
    return ended


def train_cohort(
    configs: Sequence[TrainConfig],
    runs: Path,
    progress: Progress | None = None,
    ended: Ended | None = None,
    compiled: bool = False,
    team: Team = ALONE,
) -> dict[str, Outcome | UserError]:
    """Trains runs together: each leaves the record that it would leave alone, but for rounding.

    Args:
        configs: runs that are alike in ``cohort_key``; those that are done are left alone.
        runs: folder of run records.
        progress: called with (step, tokens of each run) after every step; what it raises ends the training, resumably.
        ended: called with (run id, outcome) as soon as a run has ended, or cannot start.
        compiled: compile the model, also where the configuration does not ask for it; it changes the rounding only.
        team: the processes that train them; more than one train one run.

    Returns:
        Run id -> outcome, or why the run could not start (a damaged checkpoint, a lock); the others went on without it.

    Raises:
        UserError: bad data, a corpus too short for the horizon, an unwritable folder, the wrong number of processes.
        ValueError: no runs, or runs that cannot train as one program.
    """
    configs = _prepared(configs, runs)
    configs[0].parallel.fits(team.size)
    data, context = configs[0].data, configs[0].model.context
    streams = {
        seed: TokenStream(data, runs / DATA, context=context, seed=seed, repeat=data.repeat)
        for seed in {config.seed for config in configs}
    }
    check(configs[0], streams[configs[0].seed])
    results: dict[str, Outcome | UserError] = {}

    def end(member: Member, result: Outcome | UserError) -> None:
        results[member.config.id] = result
        if ended is not None:
            ended(member.config.id, result)

    with ExitStack() as stack:
        members = [Member(config, runs, team) for config in configs]
        waiting: dict[Member, set[int]] = {}
        for member in members:
            try:
                stack.enter_context(member)
                if member.outcome:
                    end(member, member.outcome)
                else:
                    waiting[member] = member.prepare()
            except UserError as error:
                end(member, error)
        for step, group in _starting_together(waiting):
            _Cohort(group, step, streams, end, compiled, team).go(progress)
    return {config.id: results[config.id] for config in configs}


def _prepared(configs: Sequence[TrainConfig], runs: Path) -> list[TrainConfig]:
    if not configs:
        raise ValueError("a cohort needs at least one run")
    data = prepare(configs[0].data, runs / DATA)
    configs = [replace(config, data=data) for config in configs]
    if len({cohort_key(config) for config in configs}) > 1:
        raise ValueError(f"{len(configs)} runs that differ in more than a cohort may cannot train as one program")
    return configs


def _starting_together(waiting: dict[Member, set[int]]) -> list[tuple[int, list[Member]]]:
    """Groups of runs with the step that they start from: one group, unless no step is common to all."""
    if not waiting:
        return []
    common = set.intersection(*waiting.values())
    if common:
        return [(max(common), list(waiting))]
    latest = {member: max(steps) for member, steps in waiting.items()}
    return [(step, [m for m in waiting if latest[m] == step]) for step in sorted(set(latest.values()))]


class _Cohort:
    """Runs that are at the same step, and the program that trains them."""

    def __init__(
        self,
        members: list[Member],
        step: int,
        streams: dict[int, TokenStream],
        end: End,
        compiled: bool,
        team: Team,
    ) -> None:
        self.members = members
        self.step = step
        self.streams = streams
        self.end = end
        self.team = team
        self.config = members[0].config
        self.program = team.program([member.config for member in members], compiled)
        for index, member in enumerate(members):
            path = member.start(step)
            if path is None:
                self.program.initialise(index)
            else:
                self.program.load(index, path)
        self.valid = [torch.from_numpy(part) for part in streams[self.config.seed].valid_blocks()]
        self.clock = time.monotonic()

    def go(self, progress: Progress | None) -> None:
        """Trains to the horizon."""
        config = self.config
        points = {point.step: point for point in evaluation_points(config)}
        first = config.branch_tokens // config.batch if config.parent else 0  # a branch records its own part only
        last = config.horizon // config.batch
        every = min(member.config.checkpoint_seconds for member in self.members)
        saved_at = self.clock
        if self.step == 0 and first == 0:
            self._record(with_valid=True)
        while self.step < last and self.members:
            diverged = self._step()
            if self.step in points and self.step > first:
                diverged |= self._record(with_valid=points[self.step].horizon)
            for index, member in enumerate(self.members):
                if member.keeps:
                    self.program.save(index, member.checkpoints, member.header(), kept=member.tokens)
            if diverged or self.step == last or self.team.agree(self.clock - saved_at >= every):
                self._save()  # before a run ends: the others resume without it from here on
                saved_at = self.clock
            for member, reason in diverged.items():
                self._end(member, Outcome.DIVERGED, reason)
            if progress is not None and self.members:
                self._report(progress)
        self.program.settle()
        for member in self.members:
            self._end(member, Outcome.FINISHED)

    def _step(self) -> dict[Member, str]:
        """One update of every run; returns those that diverged, which are out of the program."""
        factor = learning_rate_factor(self.config, self.step)
        self.program.set_rates(factor)
        losses, diverged = self._gradients()
        if self.members:
            self.program.step()
            self.step += 1
            now = time.monotonic()
            share, self.clock = (now - self.clock) / len(self.members), now
            for member, loss in zip(self.members, losses, strict=True):
                member.count(loss, factor, share)
            exploded = {m: f"training loss {m.state.losses[-1]:.4g}" for m in self.members if m.exploded}
            diverged |= self._drop(exploded)
        return diverged

    def _gradients(self) -> tuple[list[float], dict[Member, str]]:
        """Losses before the update. Where that is not finite, the run has diverged and nothing in it changes."""
        diverged: dict[Member, str] = {}
        while True:
            losses = self.program.gradients(*self._batch())
            values = zip(self.members, losses, strict=True)
            bad = {member: f"training loss {loss:.4g}" for member, loss in values if not math.isfinite(loss)}
            diverged |= self._drop(bad)
            if not bad or not self.members:
                return losses, diverged

    def _batch(self) -> list[Tensor]:
        """This process's part of tokens and targets [R, B, T] of the next step; runs of one seed share them."""
        seeds = [member.config.seed for member in self.members]
        which = {"rank": self.team.part, "ranks": self.team.parts}
        blocks = {seed: self.streams[seed].batch(self.step, self.config.batch, **which) for seed in set(seeds)}
        if len(blocks) == 1:
            return [torch.from_numpy(part).expand(len(seeds), -1, -1) for part in blocks[seeds[0]]]
        return [torch.from_numpy(np.stack(parts)) for parts in zip(*(blocks[seed] for seed in seeds), strict=True)]

    def _record(self, with_valid: bool) -> dict[Member, str]:
        """Appends the metrics of this step; returns the runs whose held-out loss is not finite, as ``_step`` does."""
        valid = self.program.valid_losses(*self.valid) if with_valid else [None] * len(self.members)
        norms = self.program.norms()
        for index, member in enumerate(self.members):
            member.record(valid[index], self.program.rates(index), norms[index])
        losses = zip(self.members, valid, strict=True)
        return self._drop({m: f"held-out loss {v:.4g}" for m, v in losses if v is not None and not math.isfinite(v)})

    def _drop(self, gone: dict[Member, str]) -> dict[Member, str]:
        """Takes runs out of the program."""
        if gone:
            stay = [index for index, member in enumerate(self.members) if member not in gone]
            self.members = [self.members[index] for index in stay]
            if stay:
                self.program.keep(stay)
        return gone

    def _report(self, progress: Progress) -> None:
        try:
            progress(self.step, self.step * self.config.batch)
        except BaseException:  # told to stop: keep what was trained
            self._save()
            self.program.settle()
            raise

    def _save(self) -> None:
        for index, member in enumerate(self.members):
            self.program.save(index, member.checkpoints, member.header())

    def _end(self, member: Member, outcome: Outcome, reason: str = "") -> None:
        member.finish(outcome, reason, self.streams[member.config.seed].passes(member.tokens))
        self.end(member, outcome)
