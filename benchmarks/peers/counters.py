"""What a step costs besides time: elements sent, and memory beyond parameters, gradients and state."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peers import Built
from peers.problem import local


class SentElements(TorchDispatchMode):
    """Counts the elements that this rank sends in collectives, by operation.

    The convention, for a group of W: an all-to-all counts what leaves the rank; an all-gather of n elements per rank
    n (W - 1); a reduce-scatter of n elements on each rank n (W - 1) / W; an all-reduce of n elements 2 n (W - 1) / W
    (a ring); a broadcast n (W - 1) at its root and a scatter what leaves it; a gather, reduce or send n from each
    sender. Barriers count nothing. Both ``torch.distributed`` and functional collectives (those of DTensor) are seen;
    whatever a library does past the dispatcher is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first turns it into local operations and collectives
        kwargs = kwargs or {}
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        namespace, _, operation = func._schema.name.partition("::")
        kind = operation.strip("_")
        if namespace in ("c10d", "_c10d_functional") and kind != "barrier" and _group(given) is not None:
            self.elements[kind] += _sent(kind, given)
            self.calls[kind] += 1
        return func(*args, **kwargs)


def _sent(kind: str, given: dict[str, Any]) -> float:
    group = _group(given)
    assert group is not None
    rank, size = group.rank(), group.size()
    sources = _first(given, "input_tensors", "input_tensor", "input_list", "inputs", "input", "tensors")
    total = sum(tensor.numel() for tensor in tree_leaves(sources))
    if kind.startswith(("alltoall", "all_to_all")):
        return _leaves(given, sources, total, rank, size)
    if kind.startswith(("allgather", "all_gather")):
        return total * (size - 1)
    if kind.startswith("reduce_scatter"):
        return total * (size - 1) / size
    if kind.startswith(("allreduce", "all_reduce")):
        return 2 * total * (size - 1) / size
    root = given.get("root_rank", given.get("src", given.get("dst")))
    if kind == "broadcast":
        return total * (size - 1) if rank == root else 0
    if kind == "scatter":
        return total * (size - 1) / size if rank == root else 0
    if kind in ("gather", "reduce"):
        return total if rank != root else 0
    if kind in ("send", "isend"):
        return total
    if kind.startswith(("recv", "irecv")):
        return 0
    raise NotImplementedError(f"no convention for the elements that {kind} sends")


def _leaves(given: dict[str, Any], sources: Any, total: int, rank: int, size: int) -> float:
    """Elements of an all-to-all that are not for the rank itself."""
    if isinstance(sources, Sequence):
        return total - sources[rank].numel()
    splits = given.get("input_split_sizes")
    rows = sources.shape[0] if sources.ndim else 0
    stays = splits[rank] * (total // max(rows, 1)) if splits else total // size
    return total - stays


def _group(given: dict[str, Any]) -> ProcessGroup | None:
    """The group that takes part, or None for what is no collective."""
    if "process_group" in given:
        return ProcessGroup.unbox(given["process_group"])
    name = given.get("group_name")
    return _resolve_process_group(name) if isinstance(name, str) else name


def _first(given: dict[str, Any], *names: str) -> Any:
    return next(given[name] for name in names if name in given)


def extra_memory(build: Callable[[], Built]) -> int:
    """Peak of resident memory during a step beyond what it was before ``build`` and beyond optimizer state, in bytes.

    Tensors must go back to the system when they are freed: the process runs with MALLOC_MMAP_THRESHOLD_ set low
    (``cases.MEASURING``). A first optimizer, built, stepped and deleted, brings in all that stays in the process, such
    as code, and buffers of BLAS and gloo. What the second keeps between steps besides its state counts. Measured twice,
    results differ by 1 MB, and by a tenth where an optimizer leaves tensors to the garbage collector.
    """
    first = build()
    first.step()
    first.step()
    del first
    gc.collect()
    before = _resident("VmRSS")
    second = build()
    second.step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    second.step()
    return _resident("VmHWM") - before - state_bytes(second.optimizers)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of the tensors in the optimizers' state on this rank; storage that is shared counts once."""
    storages = {}
    for optimizer in optimizers:
        for leaf in tree_leaves(dict(optimizer.state)):
            if isinstance(leaf, Tensor):
                storage = local(leaf).untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
