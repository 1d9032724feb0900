"""What a sweep keeps beside its runs: the plan, and the records of runs that failed or were pruned. No torch.

<out>/study.json   {"schema", "name", "runs": [config, ...]}, rewritten when the study is started again
<out>/cohorts.json {"schema", "cohorts": [{"horizon", "runs": [id, ...], "compiled"}, ...]}: what trains together
<out>/lock         held while the sweep runs
<out>/workers.log  what the workers print: warnings, tracebacks
<out>/jobs.json    {"schema", "engine", "settings", "jobs": {key: [id, ...]}}: what a scheduler may know of this sweep
<out>/jobs/        of each of its jobs: <key>.json the runs, <key>.jsonl what it says, <key>.log what it prints
<out>/cancel       there while `disco sweep cancel` waits for the process that watches the jobs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disco._version import __version__
from disco.errors import UserError
from disco.runs.reader import outcome_so_far, read_summary
from disco.runs.schema import CONFIG, SCHEMA_VERSION, Outcome
from disco.runs.writer import RunWriter, write_json
from disco.sweep.cohorts import Cohort, group
from disco.sweep.study import Study
from disco.train.config import TrainConfig, from_dict, to_dict

STUDY = "study.json"
COHORTS = "cohorts.json"
LOG = "workers.log"
QUEUED, JOBS, CANCEL = "jobs.json", "jobs", "cancel"


def write_plan(study: Study, out: Path) -> None:
    """Writes the plan into the sweep's folder."""
    runs = [to_dict(config) for config in study.runs]
    write_json(out / STUDY, {"schema": SCHEMA_VERSION, "name": study.name, "runs": runs})


def read_plan(out: Path) -> Study:
    """The plan of the sweep in ``out``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = out / STUDY
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        configs: list[TrainConfig] = [from_dict(TrainConfig, run) for run in content["runs"]]
        name = str(content["name"])
    except OSError:
        raise UserError(f"{out} is not the folder of a sweep: it has no {STUDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    from_start = tuple(config for config in configs if config.parent is None)
    return Study(name, from_start, tuple(config for config in configs if config.parent is not None))


def write_cohorts(out: Path, cohorts: Sequence[Cohort]) -> None:
    """Writes which runs train together, before they do."""
    content = [
        {"horizon": cohort.runs[0].horizon, "runs": [config.id for config in cohort.runs], "compiled": cohort.compiled}
        for cohort in cohorts
    ]
    write_json(out / COHORTS, {"schema": SCHEMA_VERSION, "cohorts": content})


def read_cohorts(out: Path, runs: Sequence[TrainConfig]) -> list[Cohort]:
    """The cohorts that runs were in when they were interrupted on the way to the horizon that they have now.

    A file that cannot be read is as none: the runs are grouped anew.
    """
    waiting = {(config.id, config.horizon): config for config in runs}
    try:
        written = json.loads((out / COHORTS).read_bytes())["cohorts"]
        found = []
        for cohort in written:
            left = [waiting[key] for run in cohort["runs"] if (key := (run, cohort["horizon"])) in waiting]
            found += [Cohort(tuple(left), bool(cohort["compiled"]))] if left else []
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return []


@dataclass(frozen=True)
class Queued:
    """The jobs of a sweep that its scheduler may still have."""

    engine: str
    settings: Mapping[str, Any]
    """The engine's settings, for ``sweep.clusters``."""
    jobs: Mapping[str, tuple[str, ...]]
    """Run ids by the job's key."""


def write_queued(out: Path, queued: Queued) -> None:
    """Writes the jobs of a sweep before they are submitted; no file if there are none."""
    if not queued.jobs:
        (out / QUEUED).unlink(missing_ok=True)
        return
    jobs = {key: list(runs) for key, runs in queued.jobs.items()}
    content = {"schema": SCHEMA_VERSION, "engine": queued.engine, "settings": dict(queued.settings), "jobs": jobs}
    write_json(out / QUEUED, content)


def read_queued(out: Path) -> Queued | None:
    """The jobs that the sweep in ``out`` may have; None if it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = out / QUEUED
    try:
        content = json.loads(path.read_bytes())
        jobs = {str(key): tuple(map(str, runs)) for key, runs in content["jobs"].items()}
        return Queued(str(content["engine"]), dict(content["settings"]), jobs)
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); cancel the sweep's jobs by hand and delete it") from None


def refuse_other_jobs(out: Path, engine: str) -> None:
    """Makes sure that no other engine's jobs may be training the runs in ``out``.

    Raises:
        UserError: they may.
    """
    queued = read_queued(out)
    if queued is not None and queued.engine != engine:
        raise UserError(
            f"{queued.engine} may still have {len(queued.jobs)} jobs of the sweep in {out}: go on with "
            f"--engine {queued.engine}, or first: disco sweep cancel {out}"
        )


def grouped(out: Path, left: Sequence[TrainConfig], workers: int, memory: int) -> list[Cohort]:
    """The cohorts of the runs that are left to do in ``out``, interrupted and new ones; see ``cohorts.group``."""
    return group(left, lambda config: tokens_reached(config, out), read_cohorts(out, left), workers, memory)


def outcome(config: TrainConfig, runs: Path) -> Outcome | None:
    """How a run ended; None if there is something left to do: it never ended, failed, or is to go on further."""
    return outcome_so_far(runs / config.id, config.horizon)


def tokens_reached(config: TrainConfig, runs: Path) -> int:
    """Tokens at the end of a run that ended; 0 where its summary has none."""
    return (read_summary(runs / config.id) or {}).get("tokens", 0)


def record_end(config: TrainConfig, runs: Path, ended: Outcome, reason: str, **fields: Any) -> None:
    """Writes the summary of a run that failed or was pruned, and its configuration if it never started."""
    with RunWriter(runs / config.id) as writer:
        if not (writer.folder / CONFIG).exists():
            writer.start(
                {
                    "schema": SCHEMA_VERSION,
                    "id": config.id,
                    "disco": __version__,
                    "config": to_dict(config),
                    "parameters": config.model.parameters(config.data.vocab),
                    "groups": {},
                }
            )
        writer.finish(ended, reason, parent=config.parent, **fields)
