"""The main job as a user runs it: one command, real text, a page at the end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from disco.fit import StudyFit
from disco.runs.reader import read_runs


def demo(out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "disco", "demo", "--quick", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(printed: str) -> list[str]:
    """The lines of the table of optima that hold results."""
    start = printed.index("Optima at the best batch of each horizon")
    return [line for line in printed[start:].split("\n\n")[0].splitlines() if re.search(r" 2\^\d+ +2\^\d+ ", line)]


def measured(lines: list[str]) -> list[str]:
    """The losses, to four decimals."""
    return re.findall(r"\b\d\.\d{4}\b", " ".join(lines))


def test_quick_demo_answers_and_repeats_itself(tmp_path: Path) -> None:
    printed = demo(tmp_path)
    assert re.search(r"\d+ runs in \d+ cohorts, [\d.^]+M? tokens, \d+ processes; expected: ", printed)
    assert "learning rate" in printed[printed.index("For a run of twice the tokens") :]
    optima = table(printed)
    assert len(optima) == len(json.loads((tmp_path / "fit.json").read_bytes())["horizons"]) == 3
    page = tmp_path / "report.html"
    assert str(page) in printed
    text = page.read_text()
    for loss in measured(optima):
        assert f"{float(loss):.3f}" in text or loss[:-1] in text  # the page has three decimals
    assert "http" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    runs = read_runs(tmp_path)
    assert not runs.problems
    assert all(run.outcome == "finished" for run in runs.runs)
    assert table(demo(tmp_path)) == optima  # nothing is trained again


def numbers(out: Path) -> dict[str, float]:
    """What the page's tables of cells and rules print of a fit, before rounding, but for values of the grid."""
    fit = StudyFit.from_dict(json.loads((out / "fit.json").read_bytes()))
    found: dict[str, float] = {}
    for cell in fit.cells:
        where = f"{cell.model} {cell.batch} {cell.tokens}"
        found[f"{where} loss"] = cell.loss
        for name, best in (("lr", cell.lr), ("norm", cell.norm), ("paper", cell.paper)):
            if best is not None and best.usable:
                ends = (*(best.interval or ()), *(best.y_interval or ()))
                found |= {f"{where} {name} {index}": value for index, value in enumerate((best.x, best.y, *ends))}
    for rule in fit.rules:
        if rule.law is not None and rule.recipe != "paper":  # the paper's rates are those of runs, so of the grid
            where = f"{rule.model} {rule.name}"
            terms = (*rule.law.exponents.values(), *rule.law.standard_errors.values(), rule.law.intercept, rule.law.r2)
            found |= {f"{where} {index}": value for index, value in enumerate(terms)}
    return found


@pytest.mark.full
def test_another_seed_changes_every_number(tmp_path: Path) -> None:
    first, second = (measured(table(demo(tmp_path / str(seed), "--seed", str(seed)))) for seed in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))
    one, two = (numbers(tmp_path / str(seed)) for seed in (0, 1))
    both = one.keys() & two.keys()
    assert len(both) > 20
    assert [key for key in both if one[key] == two[key]] == []
