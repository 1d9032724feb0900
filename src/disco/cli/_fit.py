"""``disco fit``, ``disco plan`` and ``disco report``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from disco.cli import _show
from disco.errors import UserError
from disco.fit import StudyFit, fit_table
from disco.guide import Estimate
from disco.guide import plan as make_plan
from disco.runs.reader import Runs, read_runs
from disco.runs.table import columns
from disco.runs.units import power, short, two_to
from disco.runs.writer import write_json


def fit(paths: Sequence[Path], output: Path, as_json: bool) -> int:
    """Fits runs, writes the fit, and shows the optimum for each number of tokens; 2 if records were damaged."""
    read = _read(paths)
    code = _show.tell(read)
    fitted = fit_table(columns(read.runs))
    write_json(output, fitted.to_dict())
    if as_json:
        _show.document(fitted.to_dict())
        return code
    _show.table(
        [
            {
                "family": item.family,
                "model": item.model,
                "tokens": short(item.tokens),
                "best batch": power(item.batch),
                "lr": two_to(item.lr),
                "norm": two_to(item.norm),
                "loss": _show.fixed(item.loss),
                "flags": ", ".join(item.flags),
            }
            for item in fitted.horizons
        ]
    )
    for path in fitted.paths:
        verdict = path.transfer.verdict if path.transfer else "cannot tell: too few optima"
        where = " ".join(part for part in (path.model, path.family) if part)
        print(f"{where}: optimal norm over {path.axis} ({path.condition}): {verdict}")
    _show.warn(fitted.warnings)
    print(f"fit: {output}")
    return code


def plan(path: Path, tokens: int, batch: int | None, model: str | None, family: str | None, as_json: bool) -> int:
    """Shows the recommended batch and learning rate, with what they rest on."""
    result = make_plan(_read_fit(path), tokens, batch=batch, model=model, family=family)
    if as_json:
        _show.document(result.to_dict())
        return 0
    numbers = {"batch (tokens)": result.batch, "learning rate": result.lr, "output norm at the end": result.norm}
    title = f"{short(tokens)} tokens, {result.model}, {result.family}"
    _show.table([_estimate(name, number) for name, number in numbers.items()], title)
    _show.warn(result.warnings)
    return 0


def _estimate(name: str, number: Estimate) -> dict[str, str]:
    interval = " .. ".join(map(power, number.interval)) if number.interval else ""
    value = power(number.value)
    return {"": name, "value": value, "90%": interval, "source": number.source, "also": number.why}


def report(paths: Sequence[Path], output: Path, as_json: bool) -> int:
    """Writes the page; exit code 2 if records were damaged, which the page lists."""
    from disco.report import write_report

    read = _read(paths)
    code = _show.tell(read)
    write_report(read, fit_table(columns(read.runs)), output)
    if as_json:
        _show.document({"report": output, "runs": len(read.runs)})
    else:
        print(f"report: {output}")
    return code


def _read(paths: Sequence[Path]) -> Runs:
    if not paths:
        raise UserError("name at least one folder of run records")
    return read_runs(*paths)


def _read_fit(path: Path) -> StudyFit:
    try:
        return StudyFit.from_dict(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read the fit {path}: {error.strerror}; make it with: disco fit RUNS") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not what disco fit writes: {error}") from None
