"""Muon of microsoft/dion with its option to orthogonalise by Dao-AILab/gram-newton-schulz."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peers import Built, Weight, World, dion, stand_ins
from peers.dion import LAYOUTS, scale

NAME = "dion-gram"
FOLDERS = ("dion", "gram-newton-schulz")
SETTINGS = "use_gram_newton_schulz=True: Gram form, one restart; otherwise as dion"

__all__ = ["FOLDERS", "LAYOUTS", "NAME", "SETTINGS", "build", "scale"]


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    stand_ins.add_path(folders["gram-newton-schulz"])
    from gram_newton_schulz import gram_newton_schulz

    stand_ins.single_precision(gram_newton_schulz)
    return dion.build(weights, world, lr, folders, use_gram_newton_schulz=True)
