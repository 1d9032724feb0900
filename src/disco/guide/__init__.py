"""From fits to decisions. Never imports torch."""

from disco.guide._advice import Advice
from disco.guide._bands import Band
from disco.guide._callback import Watch, read_plan
from disco.guide._cost import Cost, Curvatures, LargestBatch
from disco.guide._course import Course, course
from disco.guide._estimates import STAGES, Estimate
from disco.guide._forecast import Distance, Forecast, distance, forecast
from disco.guide._growth import Mark
from disco.guide._growth_fit import growth
from disco.guide._growth_model import Growth
from disco.guide._kept import for_plans
from disco.guide._one_run import OneRun, one_run
from disco.guide._overlay import Answer
from disco.guide._plan import Plan, plan
from disco.guide._settings import Difference, flat_settings, sweep_settings
from disco.guide._watch import Check, Correction, check

__all__ = [
    "STAGES",
    "Advice",
    "Answer",
    "Band",
    "Check",
    "Correction",
    "Cost",
    "Course",
    "Curvatures",
    "Difference",
    "Distance",
    "Estimate",
    "Forecast",
    "Growth",
    "LargestBatch",
    "Mark",
    "OneRun",
    "Plan",
    "Watch",
    "check",
    "course",
    "distance",
    "flat_settings",
    "for_plans",
    "forecast",
    "growth",
    "one_run",
    "plan",
    "read_plan",
    "sweep_settings",
]
