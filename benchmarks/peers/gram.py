"""Muon of Dao-AILab/gram-newton-schulz: the polynomial on the Gram matrix, same-shape matrices in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peers import MOMENTUM, WEIGHT_DECAY, Built, Weight, World, adamw, matrices, stand_ins

NAME = "gram-newton-schulz"
FOLDERS = ("gram-newton-schulz",)
LAYOUTS = {"single": "plain tensors; its documentation: one device only"}
SETTINGS = "its Polar Express, one tuned restart, nesterov (defaults); the rest to AdamW; float32 for half"


def build(weights: Sequence[Weight], world: World, lr: float, folders: Mapping[str, str]) -> Built:
    stand_ins.add_path(folders["gram-newton-schulz"])
    from gram_newton_schulz import Muon, gram_newton_schulz
    from gram_newton_schulz.muon.muon_utils import muon_opt_utils

    stand_ins.single_precision(gram_newton_schulz, muon_opt_utils)
    scalar = adamw(weights, lr)
    muon = Muon(
        [{"params": matrices(weights)}],
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        adjust_lr="spectral_norm",
        ns_use_kernels=False,
        scalar_optimizer=scalar[0] if scalar else None,
    )
    return Built(muon.step, [muon, *scalar])


def scale(shape: tuple[int, int]) -> float:
    return float((shape[0] / shape[1]) ** 0.5)
