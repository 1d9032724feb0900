"""The commands of ``disco sweep``, ``disco runs`` and ``disco data``. Every import of weight is inside its command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from disco.cli._options import AS_IT_IS, Data, File, Files, Json, Number, TableOptions, Track, at_least_one, token_count
from disco.cli._parse import command

sweep_app = tyro.extras.SubcommandApp()
runs_app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()


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
        workers: Processes, one thread each; one per GPU or core if not given. Of a cluster: jobs at the same time.
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
