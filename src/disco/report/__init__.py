"""Pages, tables and text for people: the only plotting code. Never imports torch.

Names are loaded on first use: text needs no plotly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disco.report.fit_text import render_fit
    from disco.report.page import write_report
    from disco.report.plan_text import render_plan

_HOME = {
    "render_fit": "disco.report.fit_text",
    "render_plan": "disco.report.plan_text",
    "write_report": "disco.report.page",
}

__all__ = ["render_fit", "render_plan", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'disco.report' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
