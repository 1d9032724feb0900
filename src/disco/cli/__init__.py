"""The command ``disco``: arguments in, one call, a table or JSON out. Every import of weight is inside its command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

try:
    import tyro
except ModuleNotFoundError:
    raise SystemExit("disco: error: the command line needs the extra 'lab': pip install 'disco-scion[lab]'") from None

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
    at_least_one,
    token_count,
)
from disco.cli._parse import command, parsed
from disco.errors import UserError
from disco.files import FULL, unwritable
from disco.train.config import number

app = tyro.extras.SubcommandApp()
sweep_app = tyro.extras.SubcommandApp()
runs_app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()


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


@command(sweep_app, "run")
def sweep_run(
    study: File,
    *,
    data: Data = (),
    out: Path | None = None,
    engine: Literal["local", "slurm", "ray"] = "local",
    workers: int | None = None,
    track: Track = "",
    dry_run: bool = False,
    as_json: Json = False,
) -> int:
    """Train every run of a study that is not done yet; the same command continues a sweep that was stopped.

    Args:
        study: TOML file; its format is described in disco.sweep.study.
        data: Text of your own in place of the file's: files and folders of .txt, .jsonl, .parquet, or of tokens.
        out: Folder of run records; runs/NAME for the study NAME if not given.
        engine: Where to train: on this machine, or as jobs of Slurm or of a Ray cluster (docs/cluster.md).
        workers: Processes, one thread each; one per core if not given. Of a cluster: jobs at the same time.
        track: Trackers that follow the records, such as tensorboard,wandb:my-project (docs/trackers.md).
        dry_run: Show the plan and stop.
    """
    from disco.cli import _sweep

    at_least_one("--workers", workers)
    return _sweep.run(study, data, out, engine, workers, track, dry_run, as_json)


@command(sweep_app, "status")
def sweep_status(out: File, *, as_json: Json = False) -> int:
    """Show which runs of a sweep are queued, running, finished, failed (and why) or left to do.

    Args:
        out: Folder of the sweep's run records.
    """
    from disco.cli import _sweep

    return _sweep.status(out, as_json)


@command(sweep_app, "cancel")
def sweep_cancel(out: File, *, as_json: Json = False) -> int:
    """Stop a sweep and its jobs, wherever they run; each saves a checkpoint, and the sweep can be continued.

    Args:
        out: Folder of the sweep's run records.
    """
    from disco.cli import _cluster

    return _cluster.cancel(out, as_json)


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
    return _plan.plan(fit, wanted, as_json)


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


@command(runs_app, "ls")
def runs_ls(runs: Files, *, as_json: Json = False) -> int:
    """List runs.

    Args:
        runs: Folders of run records.
    """
    from disco.cli import _runs

    return _runs.ls(runs, as_json)


@command(runs_app, "show")
def runs_show(run: File, *, as_json: Json = False) -> int:
    """Show one run: configuration, outcome, last measurements.

    Args:
        run: Folder of the run; the first characters of its name are enough.
    """
    from disco.cli import _runs

    return _runs.show(run, as_json)


@command(runs_app, "import")
def runs_import(
    tables: Files,
    *,
    into: Path,
    options: TableOptions = AS_IT_IS,
    as_json: Json = False,
) -> int:
    """Bring tables of runs into the units of this project, check them, and write run records or one table.

    Args:
        tables: CSV, TSV, Parquet, JSON lines, or exports of W&B (docs/import.md).
        into: Folder of run records, or a file .csv, .tsv, .parquet or .jsonl; fit and report take either.
    """
    from disco.cli import _runs

    return _runs.import_(tables, options, into, as_json)


@command(runs_app, "track")
def runs_track(runs: Files, *, to: Track, follow: bool = False, as_json: Json = False) -> int:
    """Send run records to trackers, whoever trains or trained them; what they have already is not sent again.

    Args:
        runs: Folders of run records.
        to: Trackers, such as tensorboard,wandb:my-project,trackio (docs/trackers.md).
        follow: Go on until Ctrl-C, with runs that are being trained.
    """
    from disco.cli import _runs

    return _runs.track(runs, to, follow, as_json)


@command(data_app, "prepare")
def data_prepare(
    source: tyro.conf.Positional[tuple[str, ...]],
    *,
    out: Path,
    tokenizer: str = "bytes",
    text_field: str = "text",
    boundary: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None,
    shard_bytes: Number = "2^26",
    sample: Number = "2^25",
    workers: int | None = None,
    as_json: Json = False,
) -> int:
    """Turn text of any size into a folder of tokens to train on; the same command continues it, or repairs it.

    Args:
        source: Files and folders of .txt, .jsonl, .parquet, or data sets hf:NAME[:CONFIGURATION][@SPLIT][#REVISION].
        out: Folder to make; name it in data.source or --data.
        tokenizer: bytes, bpe:SIZE (trained on a sample), or the path of a Hugging Face tokenizer.json.
        text_field: Field of records that holds the text.
        boundary: Special token that ends every document; a blank line if not given.
        shard_bytes: Bytes of the sources that make one shard, about.
        sample: Characters to train bpe:SIZE on, spread over the sources.
        workers: Processes, one thread each; one per core if not given.
    """
    from disco.cli import _data

    at_least_one("--workers", workers)
    sizes = {
        "shard_bytes": token_count("--shard-bytes", shard_bytes),
        "sample": token_count("--sample", sample),
    }
    return _data.prepare(source, out, tokenizer, text_field, boundary, sizes, workers, as_json)


@command(data_app, "check")
def data_check(folder: File, *, as_json: Json = False) -> int:
    """Verify the checksums of a folder of tokens, and say what it holds.

    Args:
        folder: What `disco data prepare` made.
    """
    from disco.cli import _data

    return _data.check(folder, as_json)


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
