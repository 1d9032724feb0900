"""docs/choosing.md: every example prints what the page shows, and the page explains what the program says."""

import re
from pathlib import Path

import pytest
from documented import compare, differences, examples, same

from disco.fit import PUBLISHED
from disco.guide import STAGES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "choosing.md"


def test_every_example_prints_what_is_shown(tmp_path: Path) -> None:
    lines = PAGE.read_text().splitlines()
    assert len([e for e in examples(lines) if e.shown[1] > e.shown[0]]) >= 10
    assert list(differences(PAGE, tmp_path)) == []


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("2^-4.58", "2^-4.57", True),
        ("2^-4.58", "2^-4.61", False),
        ("2^-4.58", "2^4.58", False),
        ("2^6", "2^5.99", True),
        ("2^13", "2^12", False),
        ("41,472", "41,473", False),
        ("5e-05", "5.4e-05", True),
        ("5e-05", "7e-05", False),
        ("transfers", "drifts", False),
        ("2^-4", "–", False),
    ],
)
def test_what_counts_as_the_same(shown: str, printed: str, equal: bool) -> None:
    assert same(shown, printed) is equal


@pytest.mark.parametrize(
    ("shown", "places", "problems"),
    [
        (["head", "...", "a 2.00", "..."], [(0, 1), (3, 4)], ""),
        (["head", "─── ──", "a", "1.01", "b 2 a 2.00", "tail 5"], [(0, 5)], ""),
        (["...", "tail 5"], [(4, 5)], ""),
        (["...", "tail 6"], [(4, 5)], "6 (prints 5)"),
        (["...", "a 3.00", "..."], [(1, 2)], "3.00 (prints 1.00)"),
        (["head"], [None], "'head' is shown, but from its word 2 on it prints 'a 1.00 b 2'"),
        (["...", "b 2 c", "..."], [None], "'b 2 c' is shown, but from its word 3 on it prints 'a 2.00 tail 5'"),
        (["..."], [], ""),
        ([], [None], "it prints what is not shown: 'head a 1.00 b 2 a 2.00 tail'"),
    ],
)
def test_what_is_shown_is_found_in_what_is_printed(shown: list[str], places: list[object], problems: str) -> None:
    pieces = compare(shown, ["head", "a 1.00", "b 2", "a 2.00", "tail 5"])
    assert [piece.printed for piece in pieces] == places
    assert "".join(piece.problem for piece in pieces) == problems


def test_measured_coverages_are_those_of_the_benchmarks() -> None:
    text = PAGE.read_text().partition("## 10.")[2].partition("## 11.")[0]
    measured = "".join(path.read_text() for path in (ROOT / "benchmarks" / "coverage").glob("*.md"))
    numbers = re.findall(r"\b[01]\.\d{2,3}\b", text)
    goal = {"0.85", "0.95", "0.01", "0.05", "0.75"}
    assert len(numbers) >= 20
    assert [n for n in numbers if n not in goal and not re.search(rf"\b{re.escape(n)}\b", measured)] == []


def test_flags_verdicts_stages_and_sources_are_explained() -> None:
    """Every word that the fit and the plan may give as a reason is on the page."""
    text = PAGE.read_text()
    source = "".join(path.read_text() for path in (ROOT / "src" / "disco" / "fit").glob("_*.py"))
    flags = {"edge-low", "edge-high", "flat", "few-points", "no-minimum", "multi-modal", "one-batch", "no-optimum"}
    assert all(f'"{flag}"' in source for flag in flags)
    words = {*flags, *STAGES, "transfers", "drifts", "cannot tell", "ok", "caution", "DO NOT TRUST THIS"}
    words |= {"rule", "assumed", "given", "capped", "default"}
    assert {word for word in words if word not in text} == set()
    for rule in PUBLISHED:
        assert f"| {rule.name} | {rule.source} | {rule.lr_formula} | {rule.batch_formula} | {rule.condition} |" in text
