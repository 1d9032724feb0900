"""The command ``disco``: arguments in, one call, a table or JSON out. Every import of weight is inside its command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

try:
    import tyro
except ModuleNotFoundError:
    raise SystemExit("disco: error: the command line needs the extra 'lab': pip install 'disco-scion[lab]'") from None

from disco.cli._families import data_app, runs_app, sweep_app
from disco.cli._options import (
    AS_IT_IS,
    Data,
    File,
    Files,
    Json,
    Number,
    Output,
    TableOptions,
    Track,
    Words,
    at_least_one,
    token_count,
)
from disco.cli._parse import command, parsed
from disco.errors import UserError
from disco.files import FULL, unwritable
from disco.train.config import number

app = tyro.extras.SubcommandApp()


@command(app, "train")
def train(
    config: File,
    *,
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = (),
    data: Data = (),
    out: Path = Path("runs"),
    threads: int = 1,
    track: Track = "",
    as_json: Json = False,
) -> int:
    """Train one run; the same command continues it.

    Args:
        config: TOML file with the keys of TrainConfig.
        set: Settings in place of the file's, such as optimizer.lr=2^-5.
        data: Text of your own in place of the file's: files and folders of .txt, .jsonl, .parquet, or of tokens.
        out: Folder of run records.
        threads: Threads of torch. With 1 the numbers are, to the bit, those of the same run in a sweep.
        track: Trackers that follow the record, such as tensorboard,wandb:my-project (docs/trackers.md).
    """
    from disco.cli import _train

    at_least_one("--threads", threads)
    return _train.train(config, [item for group in set for item in group], data, out, threads, track, as_json)


@command(app, "fit")
def fit(
    runs: Files,
    *,
    output: Annotated[Path | None, Output] = None,
    tables: TableOptions = AS_IT_IS,
    scan: Annotated[str, tyro.conf.arg(metavar="'Y ~ X'")] = "",
    quadratic: Annotated[str, tyro.conf.arg(metavar="'Y ~ X1 + X2'")] = "",
    power_law: Annotated[tuple[str, ...], tyro.conf.arg(metavar="'Y ~ X1 + ...'"), tyro.conf.UseAppendAction] = (),
    by: str = "",
    within: str = "",
    of: str = "",
    recipe: str = "quadratic",
    anchor: float | None = None,
    interactions: bool = False,
    bootstraps: int = 1000,
    as_json: Json = False,
) -> int:
    """Fit the optimal learning rate, batch size and norm, and their scaling rules, to finished runs.

    PATHs are folders of run records, or tables: CSV, TSV, Parquet, JSON lines, exports of W&B (docs/import.md).

    With --scan, --quadratic or --power-law only these steps are done, on the columns of a table as they are and those
    of --map: a law over its rows, over those that --within keeps, or over the optima of --scan or --quadratic. All
    variables of a formula are taken in log2, except for the loss on the left of --scan and --quadratic.

    Args:
        runs: Folders of run records, or tables.
        output: File to write the fit to; fit.json if not given, and nothing for a single step.
        scan: Minimum of Y over log2 X for each group of --by, such as 'loss ~ lr'. A column sigma is used if there.
        quadratic: Minimum of the six-term quadratic of Y in log2 X1 and log2 X2 for each group, 'loss ~ lr + batch'.
        power_law: Least squares in logarithms, such as 'lr ~ batch + tokens'; may be given several times.
        by: Columns that make a group, separated by commas, such as N,D.
        within: Keep only rows whose loss is within this of its group's least, such as 0.25% or 0.0025.
        of: Column of that loss; that of --scan or --quadratic, or loss, if not given.
        recipe: Of --scan: quadratic, or paper (arXiv:2510.03871), which needs the loss at step 0 too.
        anchor: That loss at step 0; else the column loss_start.
        interactions: Add the products of the logarithms to --power-law.
        bootstraps: Resamples of whole runs behind the intervals of rules; 0 takes horizons of a run as independent.
    """
    if scan or quadratic or power_law or within:
        from disco.cli import _formulas

        steps = _formulas.Steps(
            scan=scan, quadratic=quadratic, power_law=power_law, by=by, within=within, of=of, recipe=recipe,
            anchor=anchor, interactions=interactions,
        )  # fmt: skip
        return _formulas.run(runs, tables, steps, output, as_json)
    for option, value in (("--by", by), ("--of", of), ("--anchor", anchor), ("--interactions", interactions)):
        if value:
            raise UserError(f"{option} belongs to --scan, --quadratic, --power-law or --within")
    from disco.cli import _fit

    return _fit.fit(runs, tables, output or Path("fit.json"), bootstraps, as_json)


@command(app, "plan")
def plan(
    fit: File,
    *,
    tokens: Number,
    batch: Number | None = None,
    max_batch: Number | None = None,
    width: Number | None = None,
    depth: Number | None = None,
    parameters: Number | None = None,
    tolerance: Number | None = None,
    stage: str | None = None,
    like: Path | None = None,
    optimizer: str | None = None,
    schedule: str | None = None,
    momentum: Number | None = None,
    weight_decay: Number | None = None,
    context: Number | None = None,
    model: str | None = None,
    family: str | None = None,
    probe: Annotated[Words, tyro.conf.arg(metavar="RUN")] = (),
    output: Annotated[Path | None, Output] = None,
    as_json: Json = False,
) -> int:
    """Recommend a learning rate and a batch size for a run that is too big to sweep, and say what they rest on.

    Args:
        fit: What `disco fit` wrote.
        tokens: Horizon of the run, such as 2^30, 1e9, 10B or 3.5M.
        batch: Tokens per step, likewise, if that is decided already; what it costs is told.
        max_batch: Largest batch in tokens that the run can take.
        width: Width of its model, if that is not the sweep's.
        depth: Layers of its model, likewise.
        parameters: Parameters of its model, likewise; published rules need them.
        tolerance: Nats that do not matter, for the largest batch; the noise of one run if not given.
        stage: two-stage, joint or one-stage; the one that predicted the largest horizon best if not given.
        like: Configuration (TOML) or record of the run, to compare its settings with the sweep's.
        optimizer: Optimizer of the run, to compare; and so are the next four.
        schedule: constant, the fraction of the run over which the rate decays linearly, or a word such as cosine.
        momentum: Weight of the old buffer.
        weight_decay: As in the optimizer.
        context: Tokens per sequence.
        model: Model of the study to plan from, such as d64-L2; the nearest in size or the largest if not given.
        family: Settings of the study to plan from; those most like the run's, or with the lowest loss, if not given.
        probe: Short runs of the planned size and batch, at a constant rate: the learning rate then comes from them and
            the study's best norm, without rates swept at that size (docs/choosing.md).
        output: File to write the plan to, for disco watch.
    """
    from disco.cli import _plan

    def real(option: str, text: str | None) -> float | None:
        return None if text is None else number(text, option)

    def count(option: str, text: str | None) -> int | None:
        return None if text is None else token_count(option, text)

    settings = {
        "optimizer.name": optimizer,
        "optimizer.momentum": real("--momentum", momentum),
        "optimizer.weight_decay": real("--weight-decay", weight_decay),
        "model.context": count("--context", context),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    wanted = _plan.Wanted(
        tokens=token_count("--tokens", tokens),
        batch=count("--batch", batch),
        max_batch=count("--max-batch", max_batch),
        width=real("--width", width),
        depth=real("--depth", depth),
        parameters=real("--parameters", parameters),
        tolerance=real("--tolerance", tolerance),
        stage=stage,
        model=model,
        family=family,
        like=like,
        settings=settings | (_plan.schedule(schedule) if schedule else {}),
    )
    if probe:
        from disco.cli import _probe

        return _probe.probe(fit, wanted, [Path(run) for runs in probe for run in runs], output, as_json)
    return _plan.plan(fit, wanted, output, as_json)


@command(app, "watch")
def watch(
    run: File,
    *,
    plan: Path,
    follow: bool = False,
    every: Number = "10",
    stop: bool = False,
    output: Annotated[Path | None, Output] = None,
    like: Path | None = None,
    map: Annotated[Words, tyro.conf.arg(metavar="NAME=EXPRESSION")] = (),
    preset: str = "",
    name: str = "",
    as_json: Json = False,
) -> int:
    """Hold a run against its plan while it trains: will it end where planned, and if not, what brings it there?

    The exit code is 0 on course, 1 off course, 3 if it cannot be told (yet), 2 for bad input.

    Args:
        run: Folder of a run record, or the log of another trainer (docs/watching.md).
        plan: What `disco plan -o` wrote.
        follow: Check again whenever the run has written more, until it ends.
        every: Seconds between two looks at the run.
        stop: With --follow: end as soon as the run is off course.
        output: HTML file to write: the run so far against the plan, and the forecast.
        like: Configuration (TOML) or record with the settings of a run whose log does not tell them.
        map: Columns of a log, as in docs/import.md, such as lr=peak_lr or norm=`output norm`.
        preset: Maps for a known kind of log: torchtitan, transformers or norm-transfer-logs.
        name: Which run of a log that holds several.
    """
    from disco.cli import _watch

    maps = tuple(text for group in map for text in group)
    wanted = _watch.Wanted(follow, number(every, "--every"), stop, output, like, maps, preset, name)
    return _watch.watch(run, plan, wanted, as_json)


@command(app, "report")
def report(
    runs: Files,
    *,
    output: Annotated[Path, Output] = Path("report.html"),
    tables: TableOptions = AS_IT_IS,
    as_json: Json = False,
) -> int:
    """Write one self-contained page with figures of the runs and the fit.

    Args:
        runs: Folders of run records, or tables.
        output: HTML file to write.
    """
    from disco.cli import _fit

    return _fit.report(runs, tables, output, as_json)


@command(app, "demo")
def demo(
    *,
    quick: bool = False,
    seed: int = 0,
    data: Data = (),
    out: Path = Path("demo-runs"),
    workers: int | None = None,
    as_json: Json = False,
) -> int:
    """Answer the question on the embedded text: sweep, fit, plan and report, in about ten minutes on two cores.

    Args:
        quick: A smaller sweep, in about a minute.
        seed: Seed of weights and data order.
        data: Text of your own in place of the embedded one: files and folders of .txt, .jsonl, .parquet, or of tokens.
        out: Folder for records and report.
        workers: Processes, one thread each; one per core if not given.
    """
    from disco import demo

    at_least_one("--workers", workers)
    return demo.run(quick=quick, seed=seed, data=data, out=out, workers=workers, as_json=as_json)


app.command(sweep_app, name="sweep", help="Train the runs of a study, see how far they are, or stop them.")
app.command(data_app, name="data", help="Turn text into tokens to train on, or check them.")
app.command(runs_app, name="runs", help="List run records, show one, send them to trackers, or import tables of runs.")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 2 for bad input, 128 + the signal after an interruption.

    Any other exception is a defect of Disco and stays one: Python shows its traceback and exits with 1.
    """
    try:
        return parsed(app, args)()
    except UserError as error:
        print(f"disco: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("disco: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `disco ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"disco: error: {unwritable(Path(error.filename or 'the output'), error)}", file=sys.stderr)
        return 2
