"""From fits to decisions. Never imports torch."""

from disco.guide._advice import Advice
from disco.guide._cost import Cost, Curvatures, LargestBatch
from disco.guide._estimates import STAGES, Estimate
from disco.guide._growth import Mark
from disco.guide._overlay import Answer
from disco.guide._plan import Plan, plan
from disco.guide._settings import Difference, flat_settings, sweep_settings

__all__ = [
    "STAGES",
    "Advice",
    "Answer",
    "Cost",
    "Curvatures",
    "Difference",
    "Estimate",
    "LargestBatch",
    "Mark",
    "Plan",
    "flat_settings",
    "plan",
    "sweep_settings",
]
