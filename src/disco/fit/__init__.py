"""Optima, power laws and norm transfer: arrays in, frozen results out. numpy and scipy only."""

from disco.fit._bowl import Bowl, bowl
from disco.fit._cells import Cell, Horizon, Point
from disco.fit._joint import Joint, NearBatch, NearOptimal, joint, near_optimal
from disco.fit._laws import HeldOut, Interaction
from disco.fit._layer_groups import GroupRatio, LayerGroups, RatioOptimum, layer_groups
from disco.fit._noise import Noise
from disco.fit._optimum import Optimum, optimum, variants
from disco.fit._published import PUBLISHED, PublishedRule, published
from disco.fit._regret import Forecast, Regret, Rolling, regret
from disco.fit._result import Result
from disco.fit._rolling import rolling_origin
from disco.fit._rules import PowerLaw, Prediction, power_law
from disco.fit._scaling import Composite, Rule
from disco.fit._selection import near_minimum
from disco.fit._study import BOOTSTRAPS, NORM, Bottom, FirstHit, OneStage, Path, StudyFit, fit_table
from disco.fit._surface import JointPrediction, Surface, surface
from disco.fit._transfer import Transfer, margin_for, norm_transfer, transfers

__all__ = [
    "BOOTSTRAPS",
    "NORM",
    "PUBLISHED",
    "Bottom",
    "Bowl",
    "Cell",
    "Composite",
    "FirstHit",
    "Forecast",
    "GroupRatio",
    "HeldOut",
    "Horizon",
    "Interaction",
    "Joint",
    "JointPrediction",
    "LayerGroups",
    "NearBatch",
    "NearOptimal",
    "Noise",
    "OneStage",
    "Optimum",
    "Path",
    "Point",
    "PowerLaw",
    "Prediction",
    "PublishedRule",
    "RatioOptimum",
    "Regret",
    "Result",
    "Rolling",
    "Rule",
    "StudyFit",
    "Surface",
    "Transfer",
    "bowl",
    "fit_table",
    "joint",
    "layer_groups",
    "margin_for",
    "near_minimum",
    "near_optimal",
    "norm_transfer",
    "optimum",
    "power_law",
    "published",
    "regret",
    "rolling_origin",
    "surface",
    "transfers",
    "variants",
]
