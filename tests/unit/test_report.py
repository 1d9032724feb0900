"""disco.report: one page, complete, self-contained, with the numbers of the fit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic import columns as synthetic
from synthetic import write_runs

from disco.errors import UserError
from disco.fit import StudyFit, fit_table
from disco.guide import plan
from disco.report import render_optima, render_plan, write_report
from disco.report._style import raised
from disco.report.tables import error_digits, superscript
from disco.runs.reader import Run, Runs, read_runs
from disco.runs.table import columns
from disco.runs.units import exact, power, two_to

SMALL = {"rates": (-6, -5, -4, -3, -2, -1), "batches": (512, 1024, 2048, 4096), "last": 2**21}


class Page:
    """A written page, taken apart."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        self.own = self.text[self.text.rindex("</script></head>") :]  # without plotly.js
        words = re.sub(r"<script.*?</script>", "", self.own, flags=re.S)
        words = words.replace("<sup>", "^").replace("</sup>", "").replace("−", "-").replace("</b>", "")
        self.words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", words))
        self.divs = re.findall(r'<div class="figure" id="([\w-]+)"', self.own)
        found = re.findall(r'<script type="application/json" id="([\w-]+)-data">(.*?)</script>', self.own, flags=re.S)
        self.figures = {name: json.loads(data) for name, data in found}


def study(folder: Path) -> tuple[tuple[Run, ...], StudyFit]:
    runs = read_runs(folder).runs
    return runs, fit_table(columns(runs))


def points(figure: dict) -> int:
    """Finite points of all traces."""
    return sum(
        x is not None and y is not None
        for trace in figure["data"]
        for x, y in zip(trace.get("x", []), trace.get("y", []), strict=False)
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, StudyFit]:
    folder = tmp_path_factory.mktemp("full")
    runs, fit = study(write_runs(folder / "runs", **SMALL, models=((32, 2), (64, 2))))
    read = Runs(runs, ("metrics.jsonl:7: the line is cut off",))
    return Page(write_report(read, fit, folder / "report.html")), fit


def test_the_page_holds_the_numbers(full: tuple[Page, StudyFit]) -> None:
    page, fit = full
    assert "48 runs (48 finished) of d32-L2, d64-L2; horizons from 2^17 to 2^21 tokens" in page.words
    for item in fit.horizons:
        if item.lr == item.lr:
            assert two_to(item.lr) in page.words
            assert two_to(item.norm) in page.words
            assert f"{item.loss:.3f}" in page.words
    chosen = plan(fit, 2**22)
    assert chosen.supported
    assert f"d64-L2, 2^22 tokens next: learning rate {power(chosen.lr.value)}" in page.words
    rule = fit.rule("scion", "d64-L2", "lr(batch, tokens)")
    assert rule.law is not None
    assert f"{error_digits(rule.law.exponents['batch'], rule.law.standard_errors['batch'])} log2 batch" in page.words
    for note in fit.warnings:
        assert note.split(":")[-1].strip() in page.words
    assert "metrics.jsonl:7: the line is cut off" in page.words


def test_the_page_is_self_contained(full: tuple[Page, StudyFit]) -> None:
    page, _ = full
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?:""", page.own)
    assert page.text.count("<html") == 1
    assert len(page.text) < 8e6


def test_every_figure_is_there_and_not_empty(full: tuple[Page, StudyFit]) -> None:
    page, _ = full
    assert page.divs == list(page.figures)
    assert len(page.divs) == 2 + 2 * 6  # two that compare models, six of each
    for name, figure in page.figures.items():
        assert points(figure) >= 4, name
    titles = re.findall(r"<h3>(.*?)</h3>", page.own)
    assert titles[:3] == [
        "Optimal norm over tokens",
        "Loss against norm over width and depth",
        "Loss against output norm during training",
    ]


def test_bowls_mark_optima_and_edges_differently(full: tuple[Page, StudyFit]) -> None:
    page, fit = full
    bowls = page.figures["figure-5"]["data"]
    stars = [t["x"][0] for t in bowls if t.get("marker", {}).get("symbol") == "star" and t["x"][0] is not None]
    rings = [t["x"][0] for t in bowls if t.get("marker", {}).get("symbol") == "circle-open" and t["x"][0] is not None]
    own, _ = fit.of("scion", "d32-L2")
    assert sorted(stars) == pytest.approx(sorted(c.norm.x for c in own if c.norm and c.norm.usable), abs=1e-3)
    assert len(rings) == sum(c.norm is not None and not c.norm.usable for c in own) > 0


def test_one_batch_and_one_horizon_degrade_to_sentences(tmp_path: Path) -> None:
    runs, fit = study(write_runs(tmp_path / "runs", batches=(2048,), last=2**17))
    page = Page(write_report(runs, fit, tmp_path / "report.html"))
    assert "no learning rate can be recommended" in page.words
    assert "No run crosses the optimal norm" in page.words
    assert "no axis of width or depth" in page.words
    assert "one batch only" in page.words
    assert all(points(figure) > 0 for figure in page.figures.values())


def test_runs_without_norms(tmp_path: Path) -> None:
    folder = write_runs(tmp_path / "runs", **SMALL)
    for file in folder.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = ({key: value for key, value in line.items() if not key.startswith("norm/")} for line in lines)
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    runs, fit = study(folder)
    page = Page(write_report(runs, fit, tmp_path / "report.html"))
    assert "The output norm was not measured at any horizon." in page.words
    assert "No run has layer norms." in page.words
    assert len(page.figures) == 1  # learning rate against batch needs no norm


def test_names_are_escaped(tmp_path: Path) -> None:
    runs, _ = study(write_runs(tmp_path / "runs", batches=(2048,), last=2**18))
    table = columns(runs)
    named = table | {"family": np.full(len(table["lr"]), "<script>x")}
    page = Page(write_report(runs, fit_table(named), tmp_path / "report.html"))
    assert "&lt;script&gt;x" in page.own
    assert "<script>x" not in page.own


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    runs, fit = study(write_runs(tmp_path / "runs", batches=(2048,), last=2**17))
    path = tmp_path / "deep" / "report.html"
    path.parent.mkdir()
    write_report(runs, fit, path)
    first = path.read_bytes()
    write_report(runs, fit, path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*choose another place"):
        write_report(runs, fit, tmp_path / "file" / "report.html")


def test_text_tables() -> None:
    fit = fit_table(synthetic(np.arange(-9.0, -2.9)))
    text = render_optima(fit)
    row = next(line for line in text.splitlines() if "2^21" in line)
    best = fit.horizons[-1]
    assert [power(2**21), power(best.batch), two_to(best.lr)] == row.split()[:3]
    assert f"{best.loss:.3f} ±" in row
    assert "note: d32-L2, scion: higher learning rates are needed" in text
    shown = render_plan(plan(fit, 2**22))
    assert "4,194,304 tokens (2^22)" in shown
    assert "rule lr(batch, tokens) from" in shown.replace("\n", " ")
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize(
    ("log2", "text"),
    [(-5.5, "2^-5.5"), (20.0, "2^20"), (10.004, "2^10"), (0.0, "2^0"), (-0.001, "2^0"), (float("nan"), "–")],
)
def test_powers(log2: float, text: str) -> None:
    assert two_to(log2) == power(2**log2) == text
    assert superscript(text) == raised(log2)


def test_what_is_no_power_of_two_is_shown_in_full() -> None:
    assert [exact(value) for value in (1024, 1536, 2**-5.5, 0.3, 0)] == ["2^10", "1,536", "2^-5.5", "0.3", "0"]
    assert [power(value) for value in (1536, None, 0, float("inf"))] == ["2^10.58", "–", "–", "–"]


def test_numbers_in_words() -> None:
    assert error_digits(0.6192, 0.0507) == "0.619(51)"
    assert error_digits(9.75, 1.6) == "9.75(1.60)"
    assert error_digits(0.5, 0.099999) == "0.50(10)"
    assert error_digits(0.123456, float("nan")) == "0.123"
    assert superscript("2^-5.5, 2^20. And 12^2") == "2<sup>−5.5</sup>, 2<sup>20</sup>. And 12^2"
