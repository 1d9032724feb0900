"""From fits to decisions. Never imports torch."""

from disco.guide._plan import Estimate, Plan, plan

__all__ = ["Estimate", "Plan", "plan"]
