"""Stand-ins, in an adapter's own process only, for what a peer asks for and a CPU or this Python does not have."""

from __future__ import annotations

import contextlib
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def add_path(folder: str) -> None:
    """Lets the process import from ``folder``, before anything that is installed."""
    sys.path.insert(0, folder)


class _SinglePrecision(types.ModuleType):
    """``torch`` for a peer's module, where the half precisions are float32."""

    bfloat16 = float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def single_precision(*modules: types.ModuleType) -> None:
    """Makes casts to half precision in ``modules`` (and the method forms everywhere) casts to float32."""
    for module in modules:
        module.__dict__["torch"] = _SinglePrecision("torch")
    as_float32 = torch.Tensor.float
    for method in ("bfloat16", "half"):
        setattr(torch.Tensor, method, lambda self: as_float32(self))


@contextlib.contextmanager
def triton() -> Iterator[None]:
    """Decorators of triton that do nothing, while a peer is imported; its kernels are never called."""
    import torch._dynamo  # noqa: F401 - looks for triton itself, so it comes first

    def unchanged(*args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else unchanged

    module, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    module.__dict__.update(jit=unchanged, autotune=unchanged, heuristics=unchanged, Config=dict, language=language)
    language.__dict__.update(constexpr=int)
    sys.modules |= {"triton": module, "triton.language": language}
    try:
        yield
    finally:
        del sys.modules["triton"], sys.modules["triton.language"]


def absl_logging() -> None:
    """``absl.logging``, silent."""
    absl, log = types.ModuleType("absl"), types.ModuleType("absl.logging")
    names = ("debug", "info", "warning", "error", "log_first_n")
    log.__dict__.update(dict.fromkeys(names, lambda *_: None), INFO=0, ERROR=0)
    absl.__dict__["logging"] = log
    sys.modules |= {"absl": absl, "absl.logging": log}


def python_3_12(registry: str) -> None:
    """``typing.override``, and a module ``registry`` with the one function whose syntax needs Python 3.12."""
    if sys.version_info >= (3, 12):
        return
    typing.__dict__["override"] = lambda function: function
    module = types.ModuleType(registry)
    module.__dict__["register_optimizer"] = lambda name: lambda kind: kind
    sys.modules[registry] = module


def empty_packages(folder: Path, *names: str) -> None:
    """Packages whose ``__init__`` is not run, so that one module can be imported without all that surrounds it."""
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package


class Stream:
    """A stream that runs what it is given at once, and the event that goes with it: nothing ever waits."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record(self, _: Any = None) -> None: ...


def one_stream() -> Any:
    """A device module, as ``torch.get_device_module`` returns it, with one stream."""
    only = Stream()
    return types.SimpleNamespace(
        Stream=Stream,
        Event=Stream,
        current_stream=lambda *_: only,
        stream=lambda _: contextlib.nullcontext(),
    )
