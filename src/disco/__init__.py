"""Disco: norm-based optimizers, and the learning rate and batch size for the run that is too big to sweep.

Names are loaded on first use, so that ``import disco`` stays light and the statistics work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from disco._version import __version__

if TYPE_CHECKING:
    from disco.distributed.disco import Disco
    from disco.groups import ParamGroups, init_, param_groups
    from disco.norms import OperatorNorm, norm
    from disco.scion import Scion

_HOME = {
    "Disco": "disco.distributed.disco",
    "OperatorNorm": "disco.norms",
    "ParamGroups": "disco.groups",
    "Scion": "disco.scion",
    "init_": "disco.groups",
    "norm": "disco.norms",
    "param_groups": "disco.groups",
}

__all__ = ["Disco", "OperatorNorm", "ParamGroups", "Scion", "__version__", "init_", "norm", "param_groups"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'disco' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
