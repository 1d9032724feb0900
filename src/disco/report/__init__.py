"""Pages, tables and text for people: the only plotting code. Never imports torch.

Names are loaded on first use: text needs no plotly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disco.report.fit_text import render_fit
    from disco.report.one_run_text import render_one_run
    from disco.report.page import write_report
    from disco.report.plan_text import render_plan
    from disco.report.watch_page import write_watch
    from disco.report.watch_text import line, render_check

_HOME = {
    "line": "disco.report.watch_text",
    "render_check": "disco.report.watch_text",
    "render_fit": "disco.report.fit_text",
    "render_one_run": "disco.report.one_run_text",
    "render_plan": "disco.report.plan_text",
    "write_report": "disco.report.page",
    "write_watch": "disco.report.watch_page",
}

__all__ = ["line", "render_check", "render_fit", "render_one_run", "render_plan", "write_report", "write_watch"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'disco.report' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
