"""What a sweep keeps beside its runs: the plan, and the records of runs that failed or were pruned. No torch.

<out>/study.json   {"schema", "name", "runs": [config, ...]}, rewritten when the study is started again
<out>/cohorts.json {"schema", "cohorts": [{"horizon", "runs": [id, ...], "compiled"}, ...]}: what trains together
<out>/lock         held while the sweep runs
<out>/workers.log  what the workers print: warnings, tracebacks
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disco._version import __version__
from disco.errors import UserError
from disco.runs.reader import outcome_so_far, read_summary
from disco.runs.schema import CONFIG, SCHEMA_VERSION, Outcome
from disco.runs.writer import RunWriter, write_json
from disco.sweep.cohorts import Cohort
from disco.sweep.study import Study
from disco.train.config import TrainConfig, from_dict, to_dict

STUDY = "study.json"
COHORTS = "cohorts.json"
LOG = "workers.log"


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
