"""Optima, power laws and norm transfer: arrays in, frozen results out. numpy and scipy only."""

from disco.fit._cells import Cell, Horizon, Point
from disco.fit._optimum import Optimum, optimum
from disco.fit._result import Result
from disco.fit._rules import PowerLaw, Prediction, power_law
from disco.fit._study import NORM, FirstHit, Path, Rule, StudyFit, fit_table
from disco.fit._transfer import Transfer, norm_transfer

__all__ = [
    "NORM",
    "Cell",
    "FirstHit",
    "Horizon",
    "Optimum",
    "Path",
    "Point",
    "PowerLaw",
    "Prediction",
    "Result",
    "Rule",
    "StudyFit",
    "Transfer",
    "fit_table",
    "norm_transfer",
    "optimum",
    "power_law",
]
