"""A schedule that steers the learning rate by the norm, against schedules that do not look.

    python -m benchmarks.closed_loop FOLDER [--widths 16 32 64] [--corpora corpus code] [--seeds 0 1] [--report]

Every setting (corpus, width) trains all schedules at five peak rates an octave apart, with the same data and initial
weights for one seed, as cohorts of one program. The schedules that do not look: constant, cosine to 0, linear to 0, and
warmup (5%), stable, linear to 0 over the last fifth ("wsd"). The schedules that do ("linear, steered", "wsd, steered")
take such a shape and the course of the output norm that the best run of that shape had in the first setting (the
smallest width, the first corpus; mean over seeds), and at every check multiply the rate so that the norm comes back to
that course; their "peak" is only the rate that they begin with. In the first setting itself they know the answer.

Results go to FOLDER/results.jsonl as they come, and what is there is not trained again; ``--report`` writes
``closed_loop.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.growth.split import code
from numpy.typing import NDArray

from disco.runs.schema import DATA
from disco.train.cohort import Program
from disco.train.config import TrainConfig, from_dict
from disco.train.data import TokenStream, prepare
from disco.train.schedule import factor

Array = NDArray[np.float64]

REPORT = Path(__file__).with_name("closed_loop.md")
SHAPES: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"decay": 1.0, "shape": "cosine"},
    "linear": {"decay": 1.0},
    "wsd": {"warmup": 0.05, "decay": 0.2},
}
"""Of ``train.schedule.factor``, warmup and decay as parts of the run."""
STEERED = ("linear", "wsd")
FIRST = ("corpus", 16)
"""Setting whose best runs give the course."""
PEAKS = (-4, -3, -2, -1, 0)
BATCH, HORIZON = 2**10, 2**18
STEPS = HORIZON // BATCH
TOGETHER = 2**14
"""Tokens of a step of one cohort."""
BACK = 0.5
"""Octaves of tokens over which a deviation from the course is to be taken back."""
SLOWEST = 0.1
"""Octaves of norm per octave of tokens that the course is taken to have at least, in that."""
TURN, REACH = 0.5, 3.0
"""Octaves by which a rate may change at one check, and in all, against the shape."""


@dataclass(frozen=True, order=True)
class Member:
    """One run."""

    corpus: str
    width: int
    schedule: str
    steered: bool
    peak: int
    """log2 of the rate at the peak of the shape; of a steered one, as it begins."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.schedule}, steered" if self.steered else self.schedule


@dataclass(frozen=True)
class Course:
    """The course that steered runs follow, at the checks."""

    peak: float
    """log2."""
    log2_norm: Array
    path: Array

    @cached_property
    def speed(self) -> Array:
        """Octaves of norm per octave of tokens."""
        smooth = np.convolve(np.pad(self.log2_norm, 2, mode="edge"), np.ones(5) / 5, mode="valid")
        return np.asarray(np.gradient(smooth, np.log2(CHECKS)))


def shape(schedule: str, step: int) -> float:
    """Rate of a step over the peak."""
    own = dict(SHAPES[schedule])
    for name in ("warmup", "decay"):
        if name in own:
            own[name] *= STEPS
    return factor(step, steps=STEPS, **own)


def _checks() -> list[int]:
    """Steps after which norms are looked at: an eighth of an octave apart, or a 64th of the run if that is less."""
    found = [8]
    while found[-1] < STEPS:
        found.append(min(STEPS, found[-1] + max(1, min(math.ceil(found[-1] * (2**0.125 - 1)), STEPS // 64))))
    return found


CHECKS = _checks()


def steer(log2_by: Array, log2_norm: Array, path: Array, course: Course, check: int) -> Array:
    """log2 of what the shape's rates are multiplied with from a check on.

    On its course a run's rate stands to its path as the course's does; off it the norm's speed is changed so that the
    deviation would be gone after ``BACK`` octaves of tokens.
    """
    off = course.log2_norm[check] - log2_norm
    wanted = path / course.path[check] * (1 + off / (BACK * max(course.speed[check], SLOWEST)))
    aim = np.clip(np.log2(np.maximum(wanted, 2.0**-REACH)), log2_by - TURN, log2_by + TURN)
    return np.asarray(np.clip(aim, -REACH, REACH))


def config(corpus: str, width: int, seed: int, folder: Path) -> TrainConfig:
    """Of a run whose rates are set at every step."""
    source = "corpus" if corpus == "corpus" else str(code(folder))
    made: TrainConfig = from_dict(TrainConfig, {
        "model": {"width": width, "depth": 2, "head_size": 16, "context": 128},
        "data": {"source": [source], "valid_tokens": 2**15},
        "optimizer": {"lr": 1.0}, "batch": BATCH, "horizon": HORIZON, "seed": seed,
    })  # fmt: skip
    return replace(made, data=prepare(made.data, folder / DATA))


def train(members: Sequence[Member], courses: dict[str, Course], folder: Path) -> Iterator[dict[str, Any]]:
    """Trains members of one setting together; yields a line for each."""
    first = members[0]
    configs = {seed: config(first.corpus, first.width, seed, folder) for seed in {m.seed for m in members}}
    streams = {seed: TokenStream(each.data, folder / DATA, context=each.model.context, seed=seed)
               for seed, each in configs.items()}  # fmt: skip
    program = Program([configs[member.seed] for member in members])
    for index in range(len(members)):
        program.initialise(index)
    steered = np.array([member.steered for member in members])
    by = np.array([m.peak - courses[m.schedule].peak if m.steered else 0.0 for m in members])
    peaks = np.array([courses[m.schedule].peak if m.steered else float(m.peak) for m in members])
    path, paths, norms, rates = np.zeros(len(members)), [], [], []
    for step in range(STEPS):
        now = np.array([shape(member.schedule, step) for member in members]) * 2.0 ** (peaks + by)
        program.set_rates(torch.from_numpy(now))  # type: ignore[arg-type]
        blocks = {seed: stream.batch(step, BATCH) for seed, stream in streams.items()}
        tokens, targets = (torch.from_numpy(np.stack([blocks[m.seed][part] for m in members])) for part in (0, 1))
        program.optimizer.zero_grad()
        program.model.loss(tokens, targets).sum().backward()
        program.optimizer.step()
        path += now
        if step + 1 in CHECKS:
            check = CHECKS.index(step + 1)
            (norm,) = program.optimizer.norms_each("rms_to_inf", groups=["output"]).values()
            log2_norm = np.log2(norm.double().numpy())
            for name in STEERED:
                own = steered & np.array([member.schedule == name for member in members])
                if own.any():
                    by[own] = steer(by[own], log2_norm[own], path[own], courses[name], check)
            paths.append(path.copy())
            norms.append(log2_norm)
            rates.append(np.log2(np.maximum(now, 1e-9)))
    losses = held_out(program, streams[first.seed])
    for index, member in enumerate(members):
        curves = {"log2_norm": norms, "path": paths, "log2_rate": rates}
        yield asdict(member) | {"loss": float(losses[index])} | {
            name: [round(float(row[index]), 4) for row in rows] for name, rows in curves.items()
        }  # fmt: skip


@torch.no_grad()
def held_out(program: Program, stream: TokenStream) -> Array:
    """Mean loss of each member on the held-out tokens, in nats."""
    tokens, targets = (torch.from_numpy(part) for part in stream.valid_blocks())
    runs = len(program.configs)
    total, rows = np.zeros(runs), max(1, TOGETHER // (runs * tokens.shape[1]))
    for chunk, target in zip(tokens.split(rows), targets.split(rows), strict=True):
        total += (
            len(chunk) * program.model.loss(chunk.expand(runs, -1, -1), target.expand(runs, -1, -1)).double().numpy()
        )
    return total / len(tokens)


def courses_of(lines: Sequence[dict[str, Any]], corpus: str, width: int) -> dict[str, Course]:
    """Of the best peak of each steered shape in the first setting, the mean over its seeds."""
    found = {}
    for name in STEERED:
        own = [line for line in lines if (line["corpus"], line["width"], line["schedule"], line["steered"])
               == (corpus, width, name, False)]  # fmt: skip
        peak = min(PEAKS, key=lambda p: np.mean([line["loss"] for line in own if line["peak"] == p]))
        best = [line for line in own if line["peak"] == peak]
        found[name] = Course(float(peak), np.mean([line["log2_norm"] for line in best], axis=0),
                             np.mean([line["path"] for line in best], axis=0))  # fmt: skip
    return found


def wanted(corpus: str, width: int, seeds: Sequence[int]) -> list[list[Member]]:
    """Members of a setting, those that steer last."""
    plain = [Member(corpus, width, name, False, peak, seed) for seed, name, peak in product(seeds, SHAPES, PEAKS)]
    looking = [Member(corpus, width, name, True, peak, seed) for seed, name, peak in product(seeds, STEERED, PEAKS)]
    return [plain, looking]


def read(path: Path) -> list[dict[str, Any]]:
    """All lines so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def member_of(line: dict[str, Any]) -> Member:
    return Member(**{name: line[name] for name in Member.__dataclass_fields__})


def train_setting(corpus: str, width: int, seeds: Sequence[int], first: tuple[str, int], folder: Path) -> None:
    """Trains what is missing of one setting."""
    path = folder / "results.jsonl"
    for members in wanted(corpus, width, seeds):
        lines = read(path)
        done = {member_of(line) for line in lines}
        left = [member for member in members if member not in done]
        courses = courses_of(lines, *first) if left and left[0].steered else {}
        size = min(len(left), TOGETHER // BATCH) or 1
        for start in range(0, len(left), size):
            began = time.monotonic()
            some = left[start : start + size]
            text = "".join(json.dumps(line) + "\n" for line in train(some, courses, folder))
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            took = time.monotonic() - began
            speed = len(some) * HORIZON / took / 1e3
            print(f"{corpus} d{width}: {len(some)} runs, {took:.0f} s, {speed:.0f}k tokens/s", flush=True)


class Setting:
    """Losses of one corpus and width: [schedule][peak, seed], infinite where a run diverged."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.seeds = sorted({line["seed"] for line in lines})
        self.losses: dict[str, Array] = {}
        for line in lines:
            table = self.losses.setdefault(member_of(line).name, np.full((len(PEAKS), len(self.seeds)), math.nan))
            loss = line["loss"] if line["loss"] is not None and math.isfinite(line["loss"]) else math.inf
            table[PEAKS.index(line["peak"]), self.seeds.index(line["seed"])] = loss
        self.losses = {name: table for name, table in self.losses.items() if not np.isnan(table).any()}

    def best(self, name: str) -> int:
        """Index of the peak with the least mean over seeds."""
        return int(np.argmin(self.losses[name].mean(axis=1)))

    def scores(self, name: str, first: Setting) -> dict[str, Array]:
        """By seed: at the best peak; mean over the peaks within an octave of it; at that of the first setting."""
        table, best = self.losses[name], self.best(name)
        around = table[max(best - 1, 0) : best + 2]
        return {"best": table[best], "within an octave": around.mean(axis=0), "carried over": table[first.best(name)]}


def report(lines: Sequence[dict[str, Any]], first: tuple[str, int]) -> str:
    """Tables over all settings, and of each."""
    settings = {key: Setting([line for line in lines if (line["corpus"], line["width"]) == key])
                for key in dict.fromkeys((line["corpus"], line["width"]) for line in lines)}  # fmt: skip
    about = (
        f"Written by `python -m benchmarks.closed_loop`. {HORIZON:,} tokens, batch {BATCH:,}, peaks 2^{PEAKS[0]} to "
        f"2^{PEAKS[-1]} an octave apart. Held-out loss in nats, mean over seeds (standard error in brackets). Best: at "
        "the best peak; within an octave: mean over it and its neighbours; carried over: at the peak that is best in "
        f"the first setting, {first[0]} d{first[1]}, whose course the steered schedules follow."
    )
    against = (
        "Mean difference of loss from that of the linear schedule at its best peak, same seeds (standard error over "
        "settings and seeds). Negative is better."
    )
    overall = [_overall(name, settings, first) for name in _names(settings)]
    parts = ["# A schedule that steers by the norm", about, "## Against linear decay, all settings but the first"]
    parts += [against, _table(overall)]
    for (corpus, width), setting in settings.items():
        rows = []
        for name in setting.losses:
            scores = setting.scores(name, settings[first])
            rows.append({"schedule": name, "best peak": f"2^{PEAKS[setting.best(name)]}"}
                        | {key: _mean(values) for key, values in scores.items()})  # fmt: skip
        parts += [f"## {corpus}, width {width}, {len(setting.seeds)} seeds", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _names(settings: dict[tuple[str, int], Setting]) -> list[str]:
    return list(dict.fromkeys(name for setting in settings.values() for name in setting.losses))


def _overall(name: str, settings: dict[tuple[str, int], Setting], first: tuple[str, int]) -> dict[str, str]:
    apart: dict[str, list[float]] = {}
    for key, setting in settings.items():
        if key == first or name not in setting.losses or "linear" not in setting.losses:
            continue
        against = setting.scores("linear", settings[first])["best"]
        for score, values in setting.scores(name, settings[first]).items():
            apart.setdefault(score, []).extend(values - against)
    return {"schedule": name} | {score: _mean(np.array(values), "+") for score, values in apart.items()}


def _mean(values: Array, sign: str = "") -> str:
    error = f" ({np.std(values, ddof=1) / math.sqrt(len(values)):.4f})" if len(values) > 1 else ""
    return f"{values.mean():{sign}.4f}{error}"


def _table(rows: Sequence[dict[str, str]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([row.get(key, "") for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Trains, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--corpora", nargs="+", default=["corpus", "code"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--report", action="store_true", help="only write the report")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    for width, corpus in product(args.widths, args.corpora) if not args.report else ():
        train_setting(corpus, width, args.seeds, FIRST, args.folder)
    REPORT.write_text(report(read(args.folder / "results.jsonl"), FIRST), encoding="utf-8")
    print(REPORT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
