"""Pages and tables for people: the only plotting code. Never imports torch."""

from disco.report.page import write_report
from disco.report.tables import render_optima, render_plan, render_rules

__all__ = ["render_optima", "render_plan", "render_rules", "write_report"]
