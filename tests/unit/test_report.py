"""disco.report: one page, complete, self-contained, with the numbers of the fit."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import columns as synthetic
from synthetic import write_runs

from disco.errors import UserError
from disco.fit import NORM, StudyFit, fit_table
from disco.fit._layer_groups import layer_groups
from disco.guide import plan
from disco.report import render_fit, write_report
from disco.report._style import raised
from disco.report.figures import layer_norms, norm_collapse, one_stage, parallel_coordinates
from disco.report.tables import superscript
from disco.report.words import PAPER
from disco.runs.reader import Run, Runs, read_runs
from disco.runs.table import columns
from disco.runs.table import layer_norms as layer_norms_of
from disco.runs.units import counted, error_digits, exact, power, short, two_to

DOCUMENT = Path(__file__).parents[2] / "docs" / "figures.md"
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
        titles = re.findall(r"<h3>([^<]*)</h3>(?=\s*<p>.*?</p>\s*<div class=\"figure\")", self.own)
        self.titled = tuple(titles)

    def figure(self, title: str) -> dict:
        """The first figure of a title."""
        return self.figures[self.divs[self.titled.index(title)]]


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
    for name, figure in page.figures.items():
        assert points(figure) >= 4, name
    across = [
        "Optimal norm over tokens",
        "Loss against norm over width and depth",
        "Which norm transfers",
        "Best batch over tokens",
    ]
    each = [
        "Loss against output norm during training",
        "Output norm against steps, tokens and path length",
        "How far runs part at the same path",
        "How fast the norm grows",
        "Loss against norm at each horizon",
        "What the recipe of the fit changes",
        "Loss over learning rate and batch",
        "Which runs first reach the optimal norm",
        "Optimal learning rate against batch",
        "Layer norms over training",
    ]
    assert list(page.titled) == [*across, *each, *each]
    assert "What a rule would have cost: it takes a fit with resamples" in page.words
    assert "One model of the loss for all runs: it takes a fit with resamples" in page.words
    assert "Layer groups: the runs have one set of layer-group ratios" in page.words


def test_bowls_mark_optima_and_edges_differently(full: tuple[Page, StudyFit]) -> None:
    page, fit = full
    bowls = page.figure("Loss against norm at each horizon")["data"]
    stars = [t["x"][0] for t in bowls if t.get("marker", {}).get("symbol") == "star" and t["x"][0] is not None]
    rings = [t["x"][0] for t in bowls if t.get("marker", {}).get("symbol") == "circle-open" and t["x"][0] is not None]
    own, _ = fit.of("scion", "d32-L2")
    assert sorted(stars) == pytest.approx(sorted(c.norm.x for c in own if c.norm and c.norm.usable), abs=1e-3)
    assert len(rings) == sum(c.norm is not None and not c.norm.usable for c in own) > 0


def test_one_batch_and_one_horizon_degrade_to_sentences(tmp_path: Path) -> None:
    runs, fit = study(write_runs(tmp_path / "runs", batches=(2048,), last=2**17))
    page = Page(write_report(runs, fit, tmp_path / "report.html"))
    assert "no learning rate can be recommended" in page.words
    assert "no run crosses the optimal norm" in page.words
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
    assert "the output norm was not measured at any horizon." in page.words
    assert "no run has layer norms." in page.words
    assert page.titled == (  # what needs no norm
        "Best batch over tokens",
        "Loss over learning rate and batch",
        "Optimal learning rate against batch",
    )
    assert page.own.count("Not drawn:") == 3  # one list per section, not a paragraph per figure


def test_loss_surfaces_show_the_joint_optimum(full: tuple[Page, StudyFit]) -> None:
    page, fit = full
    data = page.figure("Loss over learning rate and batch")["data"]
    stars = [(t["x"][0], t["y"][0]) for t in data if t.get("marker", {}).get("symbol") == "star" and t["x"][0]]
    own = [b for b in fit.bottoms if b.model == "d32-L2" and b.optimum.usable]
    assert len(own) >= 3
    assert stars == [pytest.approx((b.optimum.batch, b.optimum.lr), abs=1e-3) for b in own]
    region = [t for t in data if t["mode"] == "lines" and t["line"].get("width") == 1.6 and t["x"][0] is not None]
    last = own[-1]
    batches = [x for x in region[-1]["x"] if x is not None]
    assert 2 ** max(batches) == pytest.approx(last.near.largest, rel=0.02)  # the line and the numbers are one thing
    assert f"to {power(last.near.largest)}" in page.words


def test_the_one_stage_model_is_drawn_beside_the_two_stage_optima() -> None:
    fit = fit_table(synthetic(np.arange(-8.0, 1.0), noise=0.004), bootstraps=200)
    surface = fit.surfaces[0].surface
    assert surface is not None
    _, horizons = fit.of("scion", "d32-L2")
    figure = one_stage(fit, "scion", "d32-L2", plan(fit, 2**22))
    assert figure is not None

    def marks(symbol: str) -> list[tuple[float, float]]:
        found = [t for t in figure.data if t.type == "scatter" and t.marker.symbol == symbol and t.x[0] is not None]
        return [(t.x[0], t.y[0]) for t in found]

    stars = [surface.optimum(tokens) for tokens in (*(item.tokens for item in horizons), 2**22)]
    assert marks("star") == [pytest.approx((best.batch, best.lr), abs=1e-3) for best in stars]
    (ours,) = [answer for answer in plan(fit, 2**22).answers if answer.name == "two-stage"]
    assert ours.batch
    assert ours.lr
    two = [(item.smooth_batch, item.smooth_lr) for item in horizons if not item.flags]
    two.append((math.log2(ours.batch), math.log2(ours.lr)))
    assert marks("diamond") == [pytest.approx(each, abs=1e-3) for each in two]
    contours = [trace for trace in figure.data if trace.type == "contour"]
    assert len(contours) == len(horizons) + 1
    for trace, best in zip(contours, stars, strict=True):
        z = np.array(trace.z)
        assert 0 <= z.min() < 0.01  # nats above the model's least
        low, at = np.unravel_index(z.argmin(), z.shape)
        assert (trace.x[at], trace.y[low]) == pytest.approx((best.batch, best.lr), abs=0.3)
    dots = [t for t in figure.data if t.type == "scatter" and t.marker.coloraxis]
    assert sum(len(trace.x) for trace in dots) == len(synthetic(np.arange(-8.0, 1.0))["lr"])
    assert one_stage(fit_table(synthetic(np.arange(-8.0, 1.0))), "scion", "d32-L2", plan(fit, 2**22)) is None


def test_weight_decay_caps_the_layer_norms(tmp_path: Path) -> None:
    norms = layer_norms_of(read_runs(write_runs(tmp_path / "runs", rates=(-3,), batches=(2048,), last=2**18)).runs[0])
    capped, free = layer_norms(norms, 0.1), layer_norms(norms)
    assert capped is not None
    assert free is not None
    assert [shape.y0 for shape in capped.layout.shapes] == pytest.approx([math.log2(10)] * 3)
    assert not free.layout.shapes


def test_figures_name_those_of_the_paper(full: tuple[Page, StudyFit]) -> None:
    page, _ = full
    text = DOCUMENT.read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    named = {number for line in headings for number in re.findall(r"\b\d+[ab]?\b", line)}
    assert named >= {"2b", "3a", "5", "6", "8", "9", "10", "11"}
    for title, numbers in PAPER.items():
        assert f'"{title}"' in text, title
        assert f"As Fig. {numbers} of arXiv:2510.03871" in page.words or title not in page.titled
    of_our_own = {"Loss over learning rate and batch", "How far runs part at the same path"}
    assert set(page.titled) - set(PAPER) == of_our_own  # of those drawn


def test_runs_part_by_what_was_put_in() -> None:
    """log2 norm is half of log2 path, and 0.1 more at the larger batch of five runs."""
    path = 2.0 ** np.arange(0, 6.1, 0.5)
    runs = [
        pl.DataFrame({"run": [f"{b}{k}"] * 13, "batch": [b] * 13, "lr": [0.1] * 13, "step": range(1, 14), "path": path,
                      NORM: path**0.5 * 2 ** (0.1 * (b > 512))})
        for b, count in ((512, 3), (1024, 2)) for k in range(count)
    ]  # fmt: skip
    figure = norm_collapse(pl.concat(runs))
    assert figure is not None
    apart = [[y for y in trace.y if y is not None] for trace in figure.data]
    assert [trace.name for trace in figure.data] == ["batch 2<sup>9</sup>", "batch 2<sup>10</sup>"]
    assert apart[0] == pytest.approx([0.0] * 72)
    assert apart[1] == pytest.approx([0.1] * 48, abs=1e-4)
    assert norm_collapse(pl.concat(runs[:2])) is None


def test_the_slope_of_the_norm_is_that_of_the_runs(full: tuple[Page, StudyFit]) -> None:
    """The made-up norm grows as path^0.7 from path 2^2 to 2^6."""
    page, _ = full
    slopes = [
        slope
        for trace in page.figure("How fast the norm grows")["data"]
        for norm, slope in zip(trace["x"], trace["y"], strict=True)
        if norm is not None and 3.2 < norm < 4.4
    ]
    assert len(slopes) > 20
    assert np.mean(slopes) == pytest.approx(0.7, abs=0.02)


def test_which_norm_transfers_counts_every_logged_norm(full: tuple[Page, StudyFit]) -> None:
    page, _ = full
    figure = page.figure("Which norm transfers")
    panels = [note["text"] for note in figure["layout"]["annotations"]]
    assert panels == ["hidden rms_to_rms", "input one_to_rms", "output rms_to_inf", "output rms_to_rms"]
    drift = [float(found) for found in re.findall(r"input one_to_rms: [\w ]+, ([+-][\d.]+) \[", page.words)]
    own = [float(found) for found in re.findall(r"output rms_to_inf: [\w ]+, ([+-][\d.]+) \[", page.words)]
    assert drift[0] == pytest.approx(0.75 * own[0], abs=0.011)  # made as its power 0.75


def test_ratio_sweeps_have_one_section_and_their_own_figures(tmp_path: Path) -> None:
    for ratio in (0.125, 0.25, 0.5, 1.0):
        batches = (1024, 2048, 4096) if ratio == 0.25 else (2048,)
        _ratio(write_runs(tmp_path / f"made-{ratio}", batches=batches, last=2**19), tmp_path / "runs", ratio)
    runs, fit = study(tmp_path / "runs")
    assert len(fit.studies) == 4
    page = Page(write_report(runs, fit, tmp_path / "report.html"))
    assert re.findall(r"<summary><h2>(.*?)</h2>", page.own) == ["d32-L2, scion, ratio hidden 2^-2"]
    assert "3 other sets are in the table below" in page.words
    coordinates = page.figure("All runs as parallel coordinates")
    bars = [trace for trace in coordinates["data"] if trace["type"] == "bar"]
    assert len(bars) == 3 * 4  # horizons by axes
    runs_at_last = 7 * 6
    best = math.ceil(runs_at_last / 10)
    assert all(sum(trace["customdata"]) == best for trace in bars)
    lines = [t for t in coordinates["data"] if t.get("mode") == "lines" and "text" in t]
    assert sum(t["x"].count(None) for t in lines) == 3 * best
    losses = [float(re.search(r"loss ([\d.]+)", text)[1]) for t in lines if t["xaxis"] == "x3" for text in t["text"]]
    last = columns(runs)
    assert max(losses) <= np.sort(last["loss"][last["tokens"] == 2**19])[best - 1] + 6e-4
    assert "best learning rates relative to" in page.words or "No best ratio of hidden" in page.words


def test_decay_branches_show_what_came_before_them(tmp_path: Path) -> None:
    folder = write_runs(tmp_path / "runs", batches=(2048,), last=2**20)
    parents = read_runs(folder).runs
    for parent in parents:
        _branch(parent, folder)
    runs, fit = study(folder)
    assert len(runs) == 2 * len(parents)
    assert len(fit.studies) == 2
    page = Page(write_report(runs, fit, tmp_path / "report.html"))
    starts = [
        min(x for trace in figure["data"] for x in trace["x"] if x is not None and trace.get("xaxis") == "x")
        for title, name in zip(page.titled, page.divs, strict=True)
        for figure in [page.figures[name]]
        if title == "Output norm against steps, tokens and path length"
    ]
    assert starts == [0.0, 0.0]  # both families from step 1 on


def _ratio(made: Path, folder: Path, ratio: float) -> None:
    """Moves run records into a folder as those of another ratio of the hidden layers' learning rate."""
    folder.mkdir(exist_ok=True)
    for run in made.iterdir():
        config = json.loads((run / "config.json").read_text())
        config["id"] += f"-h{ratio:g}"
        config["config"]["optimizer"]["ratios"] = {"hidden": ratio}
        (run / "config.json").write_text(json.dumps(config))
        run.rename(folder / config["id"])


def _branch(parent: Run, folder: Path) -> None:
    """A decay branch from 3/4 of the tokens of a run: its last lines under another id."""
    config = json.loads((parent.folder / "config.json").read_text())
    config["id"] += "-decay"
    config["config"]["parent"] = parent.id
    config["config"]["schedule"]["decay"] = 0.25
    new = folder / config["id"]
    new.mkdir()
    (new / "config.json").write_text(json.dumps(config))
    lines = (parent.folder / "metrics.jsonl").read_text().splitlines()
    late = [line for line in lines if json.loads(line)["tokens"] > 0.75 * 2**20]
    (new / "metrics.jsonl").write_text("\n".join(late) + "\n")
    (new / "summary.json").write_text((parent.folder / "summary.json").read_text())


def test_two_thousand_runs_of_ratios_stay_readable() -> None:
    """The parallel coordinates of a large sweep are few traces and thin lines."""
    rng = np.random.default_rng(0)
    n = 2000
    ratio = 2.0 ** rng.integers(-4, 3, n)
    lr = 2.0 ** rng.integers(-8, -1, n)
    columns = {
        "family": np.array([f"scion, ratio hidden 2^{math.log2(r):g}" for r in ratio]), "model": np.full(n, "m"),
        "batch": 2 ** rng.integers(9, 13, n), "lr": lr, "tokens": np.full(n, 2**20), "diverged": np.zeros(n, bool),
        "ratio_input": np.ones(n), "ratio_hidden": ratio, "ratio_output": np.ones(n),
        "loss": 3 + 0.02 * (np.log2(lr) + 4) ** 2 + 0.01 * (np.log2(lr * ratio) + 6) ** 2 + rng.normal(0, 0.003, n),
    }  # fmt: skip
    figure = parallel_coordinates(columns, layer_groups(columns), "scion", "m")
    assert figure is not None
    assert len(figure.data) < 30
    assert len(figure.to_json()) < 6e5
    (background,) = [trace for trace in figure.data if trace.opacity is not None and trace.type == "scatter"]
    assert background.opacity < 0.2


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


@pytest.mark.parametrize(
    ("log2", "text"),
    [(-5.5, "2^-5.5"), (20.0, "2^20"), (10.004, "2^10"), (0.0, "2^0"), (-0.001, "2^0"), (float("nan"), "–")],
)
def test_powers(log2: float, text: str) -> None:
    assert two_to(log2) == power(2**log2) == text
    assert superscript(text) == raised(log2)


def test_what_is_no_power_of_two_is_shown_in_full() -> None:
    assert [exact(value) for value in (1024, 1536, 2**-5.5, 0.3, 0)] == ["2^10", "1,536", "2^-5.5", "0.3", "0"]
    assert [exact(value) for value in (2e10, 2.84e10, 28_412_000_000)] == ["20B", "28.4B", "28,412,000,000"]
    assert [power(value) for value in (1536, None, 0, float("inf"))] == ["2^10.58", "–", "–", "–"]


def test_counts_of_tokens_have_one_form() -> None:
    """Powers of two where they are such, or nearly: a horizon is rounded to whole steps."""
    counts = [2**18, 2**18 + 2**8, 2**18 - 2**8, 2**18 + 2**11, 3_500_000, 10**9, 256, 2, 0, float("nan")]
    assert [counted(count) for count in counts] == ["2^18", "2^18", "2^18", "264k", "3.5M", "1B", "2^8", "2", "0", "–"]
    assert [short(count) for count in (950, 2**21, 10**9, 2.5e12)] == ["950", "2.1M", "1B", "2.5T"]


def test_numbers_in_words() -> None:
    assert error_digits(0.6192, 0.0507) == "0.619(51)"
    assert error_digits(9.75, 1.6) == "9.75(1.60)"
    assert error_digits(0.5, 0.099999) == "0.50(10)"
    assert error_digits(0.123456, float("nan")) == "0.123"
    assert superscript("2^-5.5, 2^20. And 12^2") == "2<sup>−5.5</sup>, 2<sup>20</sup>. And 12^2"


def test_a_one_stage_model_that_misses_the_runs_is_not_shown() -> None:
    """Least squares may end in another valley, as they do on a large published table."""
    fit = fit_table(synthetic(np.arange(-8.0, 1.0), noise=0.004), bootstraps=200)
    (found,) = fit.surfaces
    assert found.surface is not None
    values = list(found.surface.values)
    values[found.surface.names.index("lr")] += 9  # octaves
    wrong = dataclasses.replace(found.surface, values=tuple(values))
    astray = dataclasses.replace(fit, surfaces=(dataclasses.replace(found, surface=wrong),))
    assert one_stage(astray, "scion", "d32-L2", plan(fit, 2**22)) is None
    text = " ".join(render_fit(astray).split())
    assert "no one-stage model: the formula fitted to 45 runs has its best rate outside those swept at 4 of 4" in text
    assert "runs, one stage" not in text
    assert "45 runs, one stage" in render_fit(fit)
