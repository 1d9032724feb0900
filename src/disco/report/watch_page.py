"""The page of a run that is watched. No network."""

from __future__ import annotations

import html
from pathlib import Path

from disco.files import replacing
from disco.guide import Check, Plan
from disco.guide._course import Course
from disco.report import _watch_figures as figures
from disco.report.page import Page, shell
from disco.report.tables import superscript
from disco.report.watch_text import render_check


def write_watch(course: Course, plan: Plan, check: Check, path: Path) -> Path:
    """Writes the page, whole or not at all.

    Args:
        course: The run so far.
        plan: That it follows.
        check: Of the run now.
        path: The HTML file to write or replace.

    Raises:
        UserError: the file cannot be written.
    """
    page = Page()
    page.add(f"<h1>{html.escape(check.verdict.capitalize())}</h1>")
    page.add(f'<section class="answer"><pre>{superscript(html.escape(render_check(check)))}</pre></section>')
    page.figure(
        "Where the norm will end",
        "The output norm so far, what the plan expects along the way, and the forecast with its 90% interval. The run "
        "is on course if the forecast ends at the norm to end with (planned or best).",
        figures.fan(course, plan, check),
        "the output norm has not been logged.",
    )
    page.figure(
        "What was forecast when",
        "The forecast of the final norm from what was known after so many tokens, and the norm to end with (dashed) "
        "with its interval (dotted).",
        figures.forecasts(course, plan, check),
        "there is no forecast yet.",
    )
    page.figure(
        "Against the runs of the study",
        "A healthy run at the planned settings stays inside the bands. A fault shows in the norms of the layer groups "
        "before it shows in the loss.",
        figures.against_bands(course, plan.bands),
        "the plan has no courses of the study's runs; fit the records again and plan once more.",
    )
    page.not_drawn()
    with replacing(Path(path)) as file:
        file.write(shell("Disco watch", page.parts).encode())
    return Path(path)
