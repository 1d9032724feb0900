"""Coverage of the 90% intervals of ``disco plan`` on known truth, and whether it knows what it will cost.

python -m benchmarks.coverage.plan [--studies 1000] [--bootstraps 200]

Every study has rules, a place on its grid and a drift of the optimal norm of its own; bowls are lopsided by shapes that
are not fitted, and the noise of the losses and of the norms is correlated along a run. Plans are made for horizons 1 to
3 doublings beyond the study, by the stage that the rolling origin chose. Writes plan.md beside this file as it goes.
How intervals allow for the disagreement of the stages was chosen on seeds 0 and 5.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.coverage.generator import Bowl, Truth, along_runs, bowl, study
from benchmarks.coverage.rules import GRIDS, NOISES, SHAPES, Setting

from disco.fit import NORM, StudyFit, fit_table
from disco.guide import plan

RESULTS = Path(__file__).with_name("plan.md")
OCTAVES = (1, 2, 3)
"""Doublings of tokens beyond the study."""
NORM_NOISE = 0.05
"""Octaves."""


SETTINGS = tuple(Setting(grid, shape, noise) for noise in NOISES for shape in SHAPES for grid in GRIDS)


@dataclass(frozen=True)
class Outcome:
    """One quantity of one plan."""

    covered: bool | None
    """None: there was no interval."""
    error: float = math.nan
    width: float = math.nan
    """Octaves, likewise."""


def made(setting: Setting, rng: np.random.Generator) -> tuple[Truth, dict[str, np.ndarray]]:
    """A truth and a table of runs that follow it."""
    rates, batches, horizons = GRIDS[setting.grid]
    spacing = float(rates[1] - rates[0])
    truth = Truth(
        lr_batch=rng.uniform(0.4, 0.8), lr_tokens=rng.uniform(-0.7, -0.3), batch_tokens=rng.uniform(0.3, 0.6),
        norm_tokens=rng.uniform(-0.15, 0.25),
    )  # fmt: skip
    table = study(
        rng, truth, (rates + rng.uniform(-0.5, 0.5) * spacing).tolist(), bowl(*setting.shape),
        batches=batches, horizons=horizons, noise=setting.noise,
    )  # fmt: skip
    names = list(dict.fromkeys(table["run"].tolist()))
    strays = NORM_NOISE * along_runs(rng, [math.log2(tokens) for tokens in horizons], 2.0, len(names))
    where = {name: index for index, name in enumerate(names)}
    at = {tokens: index for index, tokens in enumerate(horizons)}
    rows = zip(table["run"].tolist(), table["tokens"].tolist(), strict=True)
    table[NORM] = table[NORM] * 2.0 ** np.array([strays[where[run], at[tokens]] for run, tokens in rows])
    return truth, table


def checked(
    fit: StudyFit, truth: Truth, shape: Bowl, octaves: int, stray: float = 0.0, stage: str | None = None
) -> tuple[dict[str, Outcome], float, float]:
    """Outcomes by quantity of one plan; what it expected to lose and what it loses, in nats.

    ``stray``: octaves by which the norm of the planned run happens to be off.
    """
    tokens = max(item.tokens for item in fit.horizons) * 2**octaves
    best = truth.batch(tokens)
    free = plan(fit, tokens, stage=stage)
    used = free.batch.value
    at_used = truth.lr(used, tokens)
    given = 2 ** (round(best) - 1)
    other = plan(fit, tokens, batch=given, stage=stage)
    norm = truth.norm + truth.norm_tokens * (math.log2(tokens) - 20)
    found = {
        "best batch": _of(free.batch.interval, best, free.batch.value),
        "learning rate at the planned batch": _of(free.lr.interval, at_used, free.lr.value),
        "learning rate at a given batch": _of(other.lr.interval, truth.lr(given, tokens), other.lr.value),
        "optimal norm": _of(free.norm.interval, norm, free.norm.value),
        "norm of the run, at the end": Outcome(None),
        "cost of the given batch": Outcome(None),
    }
    if free.norms:
        end = norm + 0.8 * (math.log2(free.lr.value) - at_used) + stray
        found["norm of the run, at the end"] = _of(free.norms[-1].interval, end, free.norms[-1].norm)
    priced = truth.batch_curvature * float(shape(np.float64(math.log2(given) - best)))
    if other.cost.of_batch_interval:
        low, high = other.cost.of_batch_interval
        found["cost of the given batch"] = Outcome(low <= priced <= high, (other.cost.of_batch or 0) - priced)
    lost = truth.curvature * float(shape(np.float64(math.log2(free.lr.value) - at_used)))
    lost += truth.batch_curvature * float(shape(np.float64(math.log2(used) - best)))
    return found, math.nan if free.cost.expected is None else free.cost.expected, lost


def _of(interval: tuple[float, float] | None, truth: float, value: float) -> Outcome:
    if interval is None:
        return Outcome(None)
    low, high = map(math.log2, interval)
    return Outcome(low <= truth <= high, math.log2(value) - truth, high - low)


@dataclass
class Tally:
    """Outcomes as they come."""

    outcomes: dict[tuple[str, str], list[Outcome]]
    costs: dict[str, list[tuple[float, float]]]
    stages: Counter[str]
    studies: int = 0

    @classmethod
    def empty(cls) -> Tally:
        return cls(defaultdict(list), defaultdict(list), Counter())

    def add(self, setting: Setting, fit: StudyFit, truth: Truth, rng: np.random.Generator) -> None:
        """All plans from one fit."""
        self.studies += 1
        self.stages[fit.default_stage] += 1
        shape = bowl(*setting.shape)
        for octaves in OCTAVES:
            found, expected, lost = checked(fit, truth, shape, octaves, rng.normal(0, NORM_NOISE))
            groups = (
                "all", f"+{octaves} doublings", setting.grid, " ".join(map(str, setting.shape)),
                f"noise {setting.noise}", f"by {fit.default_stage}",
            )  # fmt: skip
            for group in groups:
                for name, outcome in found.items():
                    self.outcomes[name, group].append(outcome)
                if math.isfinite(expected):
                    self.costs[group].append((expected, lost))

    def covered(self, name: str, group: str = "all") -> float:
        """Share of the intervals that hold the truth."""
        known = [item.covered for item in self.outcomes[name, group] if item.covered is not None]
        return float(np.mean(known)) if known else math.nan

    def text(self, bootstraps: int) -> str:
        """The tables."""
        names = list(dict.fromkeys(name for name, _ in self.outcomes))
        groups = list(dict.fromkeys(group for _, group in self.outcomes))
        groups = sorted(groups, key=lambda g: (g.startswith("by"), g.startswith("+")))
        chosen = ", ".join(f"{stage} {count}" for stage, count in sorted(self.stages.items()))
        what = f"{self.studies} studies, {bootstraps} resamples of whole runs, {len(OCTAVES)} horizons each"
        lines = [
            "# Coverage of the plan's 90% intervals on known truth", "",
            f"`python -m benchmarks.coverage.plan --studies {self.studies}`: {what}. Stage chosen by the rolling origin: {chosen}.", "",
            *_table(("quantity", "n", "none", "coverage", "bias", "rms error", "median width"), self._overall(names)),
            "", "Bias, error and width in octaves (a planned batch is rounded to a power of two); of the cost in nats.",
            "", "Coverage by group:", "",
            *_table(("quantity", *groups), ([n, *(f"{self.covered(n, g):.2f}" for g in groups)] for n in names)),
            "", "What the plan expects to lose against the true optimum, and what it loses (milli-nats, means):", "",
            *_table(("", *self.costs), self._lost()),
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _overall(self, names: Sequence[str]) -> Iterator[list[str]]:
        for name in names:
            every = self.outcomes[name, "all"]
            known = [item for item in every if item.covered is not None]
            errors = np.array([item.error for item in known])
            widths = np.array([item.width for item in known])
            numbers = (errors.mean(), math.sqrt(np.mean(errors**2)), float(np.median(widths))) if len(known) else ()
            yield [
                name, str(len(known)), str(len(every) - len(known)), f"{self.covered(name):.3f}",
                *(f"{number:.3f}" for number in numbers),
            ]  # fmt: skip

    def _lost(self) -> Iterator[list[str]]:
        for index, what in enumerate(("expected", "lost")):
            yield [what, *(f"{1000 * np.mean([pair[index] for pair in pairs]):.2f}" for pairs in self.costs.values())]


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def run(studies: int, bootstraps: int, seed: int, settings: Sequence[Setting] = SETTINGS, write: bool = True) -> Tally:
    """All settings in turn, so that an interrupted run is a fair sample."""
    tally = Tally.empty()
    for index in range(studies):
        round_, which = divmod(index, len(settings))
        rng = np.random.default_rng([seed, round_, which])
        truth, table = made(settings[which], rng)
        tally.add(settings[which], fit_table(table, bootstraps=bootstraps, seed=index), truth, rng)
        if write and (index % 24 == 23 or index == studies - 1):
            RESULTS.write_text(tally.text(bootstraps))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1008)
    parser.add_argument("--bootstraps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(run(arguments.studies, arguments.bootstraps, arguments.seed).text(arguments.bootstraps))


if __name__ == "__main__":
    main()
