"""Other people's trainers and trackers. Names are loaded on first use, each with the package it is for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disco.integrations.lightning import LightningCallback
    from disco.integrations.record import Recorder
    from disco.integrations.torchtitan import TorchtitanMetrics, TorchtitanOptimizer
    from disco.integrations.transformers import TransformersCallback

_HOME = {
    "LightningCallback": "lightning",
    "Recorder": "record",
    "TorchtitanMetrics": "torchtitan",
    "TorchtitanOptimizer": "torchtitan",
    "TransformersCallback": "transformers",
}

__all__ = ["LightningCallback", "Recorder", "TorchtitanMetrics", "TorchtitanOptimizer", "TransformersCallback"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'disco.integrations' has no attribute {name!r}")
    return getattr(import_module(f"disco.integrations.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
