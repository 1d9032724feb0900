"""A study file (TOML) becomes the runs to train, in the order to train them. No torch.

    name = "width"
    [base]                      # a TrainConfig: whatever does not vary
    horizon = "2^21"
    model = { width = 32, depth = 2, head_size = 16, context = 256 }
    [axes]                      # lists or ranges; [[axes]] blocks are separate grids whose runs are united
    batch = { from = "2^9", to = "2^13", step = 2 }
    lr = { centre = "2^-3", at_batch = 1024, exponent = 0.5, octaves = 2, step = "sqrt2" }
    ratio.hidden = [1, 0.125]
    [decay]                     # branches: from the constant run at each horizon in `at`, decay to 0
    fraction = 0.25
    at = ["2^20", "2^21"]
    [adaptive]                  # or adaptive = true above: choose the runs as the results come (docs/studies.md)
    budget = "2^24"
    [slurm]                     # what each job asks for with --engine slurm, and [ray]: docs/cluster.md
    partition = "gpu"

Keys are those of TrainConfig with dots, or the short names in ``axes.ALIASES``. Numbers may be written "2^-5".
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from disco.runs.units import power
from disco.sweep.adaptive.settings import Adaptive, read_adaptive
from disco.sweep.axes import product, read_axes
from disco.sweep.clusters import CLUSTERS, JobConfig, read_cluster
from disco.train.config import ConfigError, DataConfig, ParallelConfig, TrainConfig, from_dict, number, to_dict
from disco.train.data import TokenStream, check
from disco.train.gpus import gpus

Prepare = Callable[[DataConfig], DataConfig]
"""``train.data.prepare`` with its cache: fills in digest and vocabulary."""

SECTIONS = ("name", "base", "axes", "decay", "adaptive", *CLUSTERS)


@dataclass(frozen=True)
class Study:
    """The plan of a sweep."""

    name: str
    configs: tuple[TrainConfig, ...]
    """Runs that start from initial weights, in the order to train them."""
    branches: tuple[TrainConfig, ...] = ()
    """Decay branches; each starts once its parent, one of ``configs``, has finished."""
    notes: tuple[str, ...] = ()
    """What was rounded or merged."""
    adaptive: Adaptive | None = None
    """Not None: ``configs`` only say where to begin, see ``disco.sweep.adaptive``."""

    @property
    def runs(self) -> tuple[TrainConfig, ...]:
        """All runs."""
        return self.configs + self.branches

    @property
    def tokens(self) -> int:
        """Tokens to train on, in all runs from their beginning."""
        return sum(map(new_tokens, self.runs))


def new_tokens(config: TrainConfig) -> int:
    """Tokens that a run itself trains on: a branch does not repeat its parent's."""
    return config.horizon - (config.branch_tokens if config.parent else 0)


def load_study(path: Path, prepare: Prepare, engine: str = "local") -> Study:
    """Reads a study file.

    Args:
        path: the TOML file.
        prepare: makes the data ready, so that run ids are known; called once per distinct data.
        engine: what will train the runs, each on as many processes as its jobs have.

    Raises:
        ConfigError: one line that names the file and the key at fault.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the study {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    try:
        return build_study(table, prepare, name=path.stem, engine=engine)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_data(study: Study, cache: Path) -> None:
    """Makes sure, before training, that the prepared data last for every run.

    Raises:
        UserError: they do not, or are not in ``cache``.
    """
    streams: dict[tuple[str, int, int, int], TokenStream] = {}
    for config in study.runs:
        data, context = config.data, config.model.context
        key = (data.digest, data.valid_tokens, data.repeat, context)
        if key not in streams:
            streams[key] = TokenStream(data, cache, context=context, seed=0, repeat=data.repeat)
        check(config, streams[key])


def build_study(table: Mapping[str, Any], prepare: Prepare, name: str = "study", engine: str = "local") -> Study:
    """The study that a study file's content describes, to be trained by an engine.

    Raises:
        ConfigError: an unknown key, or a run that cannot be; without the file's name.
    """
    for key in table:
        if key not in SECTIONS:
            near = difflib.get_close_matches(key, SECTIONS, n=1)
            raise ConfigError(
                f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else ", ".join(SECTIONS))
            )
    jobs = {name: read_cluster(name, table) for name in CLUSTERS}
    name = table.get("name", name)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w. -]*", name):
        raise ConfigError(f"name must be letters, digits, spaces and ._- (it names a folder), got {name!r}")
    base = table.get("base", {})
    if not isinstance(base, Mapping):
        raise ConfigError(f"base must be a table, got {base!r}")
    grids = table.get("axes", [])
    grids = grids if isinstance(grids, list) else [grids]
    tables: list[Mapping[str, Any]] = [point for grid in grids for point in product(base, read_axes(grid))] or [base]
    valid: list[TrainConfig] = [from_dict(TrainConfig, point) for point in tables]
    for config in valid:
        _check_processes(config.parallel, engine, jobs.get(engine))
        if engine not in CLUSTERS:
            _check_device(config)
    prepared = _once(prepare)
    configs = [dataclasses.replace(config, data=prepared(config.data)) for config in valid]
    merged = _merge(configs)
    notes = [f"{len(configs) - len(merged)} duplicate runs merged"] if len(merged) < len(configs) else []
    branches: list[TrainConfig] = []
    adaptive = read_adaptive(table.get("adaptive", False))
    if adaptive and ("decay" in table or any(config.schedule.decay for config in merged)):
        raise ConfigError("an adaptive study continues its runs, so they cannot decay: leave out decay or adaptive")
    if "decay" in table:
        merged, branches = _branch(merged, table["decay"], notes)
    return Study(name, tuple(ordered(merged)), tuple(ordered(branches)), tuple(notes), adaptive)


def _check_processes(parallel: ParallelConfig, engine: str, job: JobConfig | None) -> None:
    """Makes sure that a run is for as many processes as a job has; without a job, in a local sweep, it is one."""
    if parallel.processes == (job.world if job else 1):
        return
    if job is None:
        raise ConfigError(
            f"{parallel.product}, but a local sweep trains a run in one process; jobs of --engine slurm and ray can "
            "have several (docs/cluster.md)"
        )
    nodes = f"{engine}.nodes x " if job.world > job.processes else ""
    sizes = f"{job.world // job.processes} x {job.processes} = {job.world}" if nodes else job.processes
    raise ConfigError(f"{parallel.product}, but {nodes}{engine}.processes is {sizes}; make them the same")


def _check_device(config: TrainConfig) -> None:
    """Makes sure that a run of a local sweep needs no GPU, or that one is here."""
    device = config.parallel.device
    if (device == "cuda" or (config.precision == "bf16" and device == "auto")) and not gpus():
        asked = "parallel.device is cuda" if device == "cuda" else "precision is bf16, which is for GPUs"
        raise ConfigError(
            f"a local sweep trains on this machine, where torch finds no GPU, but {asked}; set parallel.device to cpu, "
            "or use --engine slurm or ray"
        )


def _once(prepare: Prepare) -> Prepare:
    known: dict[str, DataConfig] = {}

    def prepared(data: DataConfig) -> DataConfig:
        key = str(to_dict(data))
        if key not in known:
            known[key] = prepare(data)
        return known[key]

    return prepared


def _merge(configs: list[TrainConfig]) -> list[TrainConfig]:
    """One configuration per id: that of the longest horizon, which contains the others."""
    merged: dict[str, TrainConfig] = {}
    for config in configs:
        known = merged.setdefault(config.id, config)
        longest = max(known, config, key=lambda c: c.horizon)
        keep = tuple(sorted({*known.keep, *config.keep}))
        merged[config.id] = dataclasses.replace(longest, keep=keep)
    return list(merged.values())


def _branch(
    configs: list[TrainConfig], table: Mapping[str, Any], notes: list[str]
) -> tuple[list[TrainConfig], list[TrainConfig]]:
    """Decay branches of the constant-rate runs, and the runs with the checkpoints kept that the branches need.

    A branch from D tokens ends at D / (1 - fraction). Both are made multiples of every batch, so that batches are
    compared at equal tokens; the fraction is therefore one of whole numbers up to 100. ``notes`` says what changed.
    """
    if not isinstance(table, Mapping) or set(table) != {"fraction", "at"}:
        raise ConfigError(f'decay is a table such as {{ fraction = 0.25, at = ["2^20"] }}, got {table!r}')
    fraction = number(table["fraction"], "decay.fraction")
    exact = Fraction(fraction).limit_denominator(100)
    if not 0 < exact < 1:
        raise ConfigError(f"decay.fraction must lie between 0.01 and 0.99, got {fraction:g}")
    if abs(exact - fraction) > 1e-6:
        notes.append(f"decay over {exact} of the horizon instead of {fraction:g}, so that all batches divide it")
    given = table["at"] if isinstance(table["at"], list) else [table["at"]]
    if not given:
        raise ConfigError("decay.at is an empty list")
    starts = sorted({number(at, "decay.at") for at in given})
    constant = [config for config in configs if not config.schedule.decay]
    if not constant:
        raise ConfigError("decay needs runs at a constant rate, but all have schedule.decay above 0")
    unit = math.lcm(*(config.batch for config in constant))
    before, whole = unit * (exact.denominator - exact.numerator), unit * exact.denominator
    branches = []
    keep: dict[str, set[int]] = {config.id: set(config.keep) for config in constant}
    for at in starts:
        parents = [config for config in constant if before <= at <= config.horizon]
        if not parents:
            raise ConfigError(_no_parent(at, exact, before, max(config.horizon for config in constant)))
        count = min(round(at / before), *(config.horizon // before for config in parents))
        start, horizon = count * before, count * whole
        if start != at:
            notes.append(f"decay from {start} tokens instead of {at:.0f}, so that all batches divide it")
        for parent in parents:
            schedule = dataclasses.replace(parent.schedule, decay=float(exact))
            branches.append(dataclasses.replace(parent, horizon=horizon, schedule=schedule, parent=parent.id, keep=()))
            keep[parent.id].add(start)
    kept = [dataclasses.replace(c, keep=tuple(sorted(keep[c.id]))) if c.id in keep else c for c in configs]
    return kept, branches


def _no_parent(at: float, fraction: Fraction, unit: int, longest: int) -> str:
    """Why no run is at a constant rate up to ``at`` tokens, or up to a multiple of ``unit`` near it."""
    if unit <= longest:
        return f"decay.at must lie between {unit} (a multiple of all batches) and {longest}, got {at:g}"
    return (
        f"a decay over {fraction} of the horizon begins at a multiple of {unit} tokens, so that all batches divide it, "
        f"but no run is longer than {longest}; choose a simpler decay.fraction, such as 0.25, or a longer horizon"
    )


def ordered(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Long runs first, so that no worker is left with one at the end; among equals the middle learning rates first,
    so that the bowls are seen early, and small batches first, which take longest.
    """
    rates: dict[str, list[float]] = {}
    for config in configs:
        rates.setdefault(_but_lr(config), []).append(config.optimizer.lr)
    for values in rates.values():
        values.sort()

    def key(config: TrainConfig) -> tuple[float, ...]:
        cost = new_tokens(config) * config.model.parameters(config.data.vocab)
        values = rates[_but_lr(config)]
        from_middle = abs(values.index(config.optimizer.lr) - (len(values) - 1) / 2)
        return (-round(math.log2(cost)), config.seed, math.floor(from_middle), config.batch, config.optimizer.lr)

    return sorted(configs, key=key)


def _but_lr(config: TrainConfig) -> str:
    content = to_dict(config)
    del content["optimizer"]["lr"], content["parent"], content["keep"]
    return str(content)


def scan_key(config: TrainConfig) -> str:
    """What all runs of one adaptive scan have in common: everything but rate, batch and horizon."""
    context = config.model.context
    optimizer = dataclasses.replace(config.optimizer, lr=1.0)
    return dataclasses.replace(config, optimizer=optimizer, batch=context, horizon=context, keep=()).id


def scan_names(configs: Sequence[TrainConfig]) -> list[str]:
    """The model of each configuration, and in what else they differ: "d64-L2, momentum=0.9"."""
    varied = _varied(tuple(configs))
    names = []
    for config in configs:
        settings = _flat(to_dict(config))
        also = [f"{key.split('.', 1)[-1]}={settings[key]}" for key in varied]
        names.append(", ".join([f"d{config.model.width}-L{config.model.depth}", *also]))
    return names


def rows(study: Study) -> list[dict[str, str]]:
    """The plan as a table: a row per grid of learning rates, with what distinguishes it."""
    grids: dict[str, list[TrainConfig]] = {}
    for config in sorted(study.runs, key=lambda c: (bool(c.parent), c.model.width, c.model.depth, c.batch, c.horizon)):
        grids.setdefault(_but_lr(config), []).append(config)
    varied = _varied(study.runs)
    return [_row(grid, varied) for grid in grids.values()]


def _row(grid: list[TrainConfig], varied: list[str]) -> dict[str, str]:
    first = grid[0]
    rates = sorted(config.optimizer.lr for config in grid)
    settings = _flat(to_dict(first))
    return {
        "model": f"d{first.model.width}-L{first.model.depth}",
        "parameters": f"{first.model.parameters(first.data.vocab):,}",
        "batch": power(first.batch),
        "learning rates": power(rates[0]) + (f" .. {power(rates[-1])}" if len(rates) > 1 else ""),
        "horizon": power(first.horizon) + (f" (decay from {power(first.branch_tokens)})" if first.parent else ""),
        "also": ", ".join(f"{key.split('.', 1)[-1]}={settings[key]}" for key in varied),
        "runs": str(len(grid)),
        "tokens": f"{sum(map(new_tokens, grid)):,}",
    }


def _varied(runs: tuple[TrainConfig, ...]) -> list[str]:
    """Dotted settings that differ between runs, apart from those with a column of their own."""
    shown = {"model.width", "model.depth", "batch", "horizon", "optimizer.lr", "schedule.decay", "parent", "keep"}
    tables = [_flat(to_dict(config)) for config in runs]
    return [key for key in tables[0] if key not in shown and len({str(table.get(key)) for table in tables}) > 1]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
