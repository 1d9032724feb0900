"""What a step costs besides time: elements sent, and memory beyond parameters, gradients and state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peers.problem import local

STEP = "disco.measured_step"


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


def peak_memory(build: Callable[[], tuple[Callable[[], Any], Any]], warm_up: int = 1) -> tuple[Any, int]:
    """Builds an optimizer, takes steps, and measures the last of them.

    Returns:
        What ``build`` returns (whose first part is the step), and the largest number of bytes of tensor memory that
        were alive at a time during the last step, beyond those alive before ``build``. Subtract the state's size.

    The bytes are those of torch's CPU allocator, from the profiler's memory events: temporaries inside operators and
    buffers kept between steps are seen; what a library takes from malloc itself (packing buffers of BLAS, sockets) is
    not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built = build()
        for _ in range(warm_up):
            built[0]()
        with record_function(STEP):
            built[0]()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start, end = next((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == STEP)
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]" and event.start_ns() <= end:
            alive += event.nbytes()
            peak = max(peak, alive) if event.start_ns() >= start else alive
    return built, peak


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of the tensors in the optimizers' state on this rank; storage that is shared counts once."""
    storages = {}
    for optimizer in optimizers:
        for leaf in tree_leaves(dict(optimizer.state)):
            if isinstance(leaf, Tensor):
                storage = local(leaf).untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
