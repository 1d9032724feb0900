"""``disco.Disco``: the step of ``Scion`` on tensors that are sharded, replicated or both, as if on one device.

One step: momentum where the shards lie; LMOs that need only sums (``separable``) with one small all-reduce; matrices to
be orthogonalised through a plan (``buckets``) that ``pipeline`` carries out; AdamW groups element by element.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from disco import polar, rules, split
from disco.base import Asked, NormOptimizer, parameter_names
from disco.distributed import separable
from disco.distributed.agreement import agree
from disco.distributed.buckets import Cost, Entry, plan
from disco.distributed.failure import bound, explained, timeout
from disco.distributed.layout import Layout
from disco.distributed.pipeline import Pipeline
from disco.distributed.placements import layout_of, plain_layout
from disco.distributed.placements import local as _local
from disco.distributed.reduce import all_reduce
from disco.distributed.values import Part, Values

Group = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """What stays the same of a parameter from step to step."""

    name: str
    layout: Layout
    groups: tuple[ProcessGroup | None, ...]
    """Of the mesh dimensions; None where the size is 1."""


@final
class Disco(NormOptimizer):
    """Distributed Scion, and with groups of rule "adamw" any Muon-like mixture.

    Parameters may be plain tensors and DTensors on any meshes, sharded and replicated in any way (FSDP2, HSDP, tensor,
    expert, context and pipeline parallel). The updates are those of ``Scion`` on one device, to rounding.

    Args:
        params, lr, momentum, weight_decay, nesterov, orthogonalize, steps, scale, betas, eps, dtype, light,
            keep_updates, momentum_dtype: as of ``Scion``.
        replicas: process group whose ranks hold the same plain parameters with the same gradients, such as DDP's; they
            then share the orthogonalisations. None: each rank works on its plain parameters alone.
        buffer_bytes: bound of what is in flight on a rank at any time; a single matrix may exceed it. None: 16 MiB on a
            CPU, 512 MiB elsewhere.
        cost: what the plan takes into account; None: numbers for the device.
        compile: compile the orthogonalisation (``torch.compile``), one graph for each shape; matrices shared by a team
            of ranks are left out.
        fast: use the forms of the polynomial with fewer operations (``gram``), which differ by up to 5e-4; without them
            the updates are those of ``Scion`` to rounding.

    Raises:
        ValueError: as ``Scion``; a placement that is neither sharded nor replicated; at the first step, plans that
            differ between ranks, or no gradients at all, as of groups that were built before the model was sharded.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float | Tensor = 2**-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        orthogonalize: str = "polar_express",
        steps: int = 5,
        *,
        replicas: ProcessGroup | None = None,
        buffer_bytes: int | None = None,
        cost: Cost | None = None,
        compile: bool = False,
        fast: bool = True,
        **settings: Any,
    ) -> None:
        self._replicas, self._buffer_bytes, self._cost = replicas, buffer_bytes, cost
        self._compile, self._fast = compile, fast
        self._forget()
        super().__init__(params, lr, momentum, weight_decay, nesterov, orthogonalize, steps, **settings)

    def _forget(self) -> None:
        self._leaves: dict[Tensor, Leaf] = {}
        self._pipelines: dict[Any, Pipeline] = {}
        self._agreed: set[Any] = set()
        self._process_groups: dict[tuple[int, ...], ProcessGroup] = {}
        self._measured = Values()
        self._stepped = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_in_grad" in state:  # a copy, which has no process groups: it plans anew, replicas each for themselves
            self._replicas, self._buffer_bytes, self._cost = None, None, None
            self._compile, self._fast = False, True
            self._forget()
        super().__setstate__(state)
        if not self._leaves:
            self._find_leaves(*self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group after checking it and where its tensors lie, and allocates its state."""
        super().add_param_group(param_group)
        self._find_leaves(self.param_groups[-1])

    def _find_leaves(self, *groups: Group) -> None:
        _ALIVE.add(self)
        for group in groups:
            index = [other is group for other in self.param_groups].index(True)
            for name, param in zip(parameter_names(group, index), group["params"], strict=True):
                try:
                    self._leaves[param] = self._leaf(name, param)
                except ValueError as error:
                    raise ValueError(f"parameter {name}: {error}") from None

    def _leaf(self, name: str, param: Tensor) -> Leaf:
        if isinstance(param, DTensor):
            mesh = param.device_mesh
            groups = tuple(bound(mesh.get_group(i)) if mesh.size(i) > 1 else None for i in range(mesh.ndim))
            return Leaf(name, layout_of(param), groups)
        layout = plain_layout(param, _rank(), self._replicas)
        return Leaf(name, layout, (bound(self._replicas) if self._replicas and len(layout.ranks) > 1 else None,))

    # The step

    def _update(self, ready: list[tuple[Group, list[Tensor]]]) -> None:
        self._check_ready(ready)
        work: dict[Tensor, tuple[Group, Tensor]] = {}
        for group, params in ready:
            if not params:
                continue
            gradients = [_local_like(param, cast(Tensor, param.grad)) for param in params]
            locals_ = [_local(param) for param in params]
            if group["weight_decay"]:
                torch._foreach_mul_(locals_, 1 - float(group["lr"]) * group["weight_decay"])
            if group["rule"] == "adamw":
                states = [{key: _local(value) for key, value in self.state[param].items()} for param in params]
                directions = rules.adamw_each(gradients, states, betas=group["betas"], eps=group["eps"])
                self._apply_each(group, params, directions, [float(group["scale"])] * len(params))
                continue
            for param, average in zip(params, self._averages(group, params, gradients), strict=True):
                work[param] = (group, average)
        spectral = {p: item for p, item in work.items() if item[0]["norm"] not in separable.SEPARABLE}
        self._separable({p: item for p, item in work.items() if p not in spectral})
        for params, pipeline in self._plans(spectral):
            self._run(pipeline, params, spectral)
        for param, (group, _) in work.items():
            if self._is_light(group):
                gradient = cast(Tensor, param.grad)
                self._in_grad.put(param, gradient.mul_(group["momentum"]), group["momentum"])

    def _check_ready(self, ready: list[tuple[Group, list[Tensor]]]) -> None:
        names = [self._leaves[param].name for _, params in ready for param in params]
        if not names and not self._stepped:
            first = next(iter(self._leaves.values())).name
            raise ValueError(
                f"no parameter has a gradient, {first} for instance; if the model was sharded or wrapped after the "
                "parameter groups were built, build them, and the optimizer, after that"
            )
        self._stepped = True
        by_ranks: dict[tuple[int, ...], list[str]] = {}
        for group, params in ready:
            for param in params:
                leaf = self._leaves[param]
                ranks = tuple(sorted(leaf.layout.ranks))
                if len(ranks) > 1:
                    settings = {key: group[key] for key in ("norm", "layout", "batch_dims", "rule", "split")}
                    line = f"parameter {leaf.name} {leaf.layout.shape} cut {leaf.layout.cuts} on {leaf.layout.mesh}"
                    by_ranks.setdefault(ranks, []).append(f"{line} {settings}")
        for ranks, lines in sorted(by_ranks.items()):
            if (ranks, tuple(lines)) not in self._agreed:
                device = next(_local(p).device for _, params in ready for p in params)
                agree(self._group_of(ranks), lines, device)
                self._agreed.add((ranks, tuple(lines)))

    def _averages(self, group: Group, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Local tensors of which the LMO is taken."""
        momentum = group["momentum"]
        if not momentum or self._is_light(group):
            return gradients
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param] |= rules.lmo_state(param, momentum=momentum, dtype=self._momentum_dtype)
        buffers = [_local(self.state[param]["momentum"]) for param in params]
        fresh = [g.to(b.device, b.dtype) for g, b in zip(gradients, buffers, strict=True)]
        torch._foreach_lerp_(buffers, fresh, 1 - momentum)
        if group["nesterov"]:
            buffers = [b.lerp(g, 1 - momentum) for b, g in zip(buffers, fresh, strict=True)]
        return [b.to(g.device) for b, g in zip(buffers, gradients, strict=True)]

    def _apply_each(self, group: Group, params: list[Tensor], directions: list[Tensor], scales: list[float]) -> None:
        """Subtracts directions, which are overwritten, from whole local tensors of one group."""
        locals_ = [_local(param) for param in params]
        updates = [direction.to(local.dtype) for direction, local in zip(directions, locals_, strict=True)]
        rates: list[Any] = [rules.broadcast(group["lr"], x) * scale for x, scale in zip(locals_, scales, strict=True)]
        torch._foreach_mul_(updates, rates)
        if self._keep_updates:
            for param, update in zip(params, updates, strict=True):
                self._kept(param).copy_(update)
        torch._foreach_sub_(locals_, updates)

    def _apply(self, param: Tensor, group: Group, at: tuple[slice, ...], direction: Tensor, scale: float) -> None:
        """Subtracts a direction from the part ``at`` of the local tensor."""
        if self._keep_updates:
            self._kept(param)[at] = direction * (float(group["lr"]) * scale)
        rules.apply_(_local(param)[at], direction, lr=group["lr"], weight_decay=0.0, scale=scale)

    def _kept(self, param: Tensor) -> Tensor:
        """This rank's part of the last update, which is remembered."""
        if "update" not in self.state[param]:
            self.state[param]["update"] = torch.zeros_like(param)
        return _local(self.state[param]["update"])

    def _separable(self, work: dict[Tensor, tuple[Group, Tensor]]) -> None:
        sums: dict[Tensor, Tensor] = {}
        over: list[tuple[Tensor, list[ProcessGroup]]] = []
        for param, (group, average) in work.items():
            operator, leaf = self._norm(group), self._leaves[param]
            if operator.name == "one_to_inf":
                continue
            sums[param] = separable.sums_of_squares(operator, average)
            dim = separable.summed_dim(operator, average.ndim)
            cutting = leaf.layout.mesh_dims_cutting(() if dim is None else (dim,))
            over.append((sums[param], [cast(ProcessGroup, leaf.groups[i]) for i in cutting]))
        all_reduce(over)
        applied: dict[int, tuple[Group, list[Tensor], list[Tensor], list[float]]] = {}
        for param, (group, average) in work.items():
            operator = self._norm(group)
            direction = separable.lmo(operator, average, sums.get(param), self._leaves[param].layout.shape)
            _, params, directions, scales = applied.setdefault(id(group), (group, [], [], []))
            params.append(param)
            directions.append(direction)
            scales.append(rules.scale_factor(group["scale"], operator, param.shape))
        for each in applied.values():
            self._apply_each(*each)

    def _run(self, pipeline: Pipeline, params: list[Tensor], work: dict[Tensor, tuple[Group, Tensor]]) -> None:
        def apply(entry: int, parts: list[tuple[tuple[slice, ...], Tensor]]) -> None:
            param, (group, _) = params[entry], work[params[entry]]
            operator = self._norm(group)
            into = split.sizes(group["split"], param, operator)
            for at, direction in parts:
                shape = list(param.shape)
                if into:  # every part of a fused weight has a scale of its own shape
                    shape[split.out_dim(operator)] = self._part_size(param, into, split.out_dim(operator), at)
                scale = rules.scale_factor(group["scale"], operator, torch.Size(shape))
                self._apply(param, group, at, direction, scale)

        tensors = [work[param][1] for param in params]
        pipeline.run([t.to(_wire_dtype(t, self._orthogonalisation["dtype"])) for t in tensors], apply)

    def _part_size(self, param: Tensor, into: tuple[int, ...], dim: int, at: tuple[slice, ...]) -> int:
        """Size of the part of a fused weight to which the local slice ``at`` belongs."""
        for piece in self._leaves[param].layout.pieces(_rank()):
            offset = at[dim].start - piece.start[dim]
            if 0 <= offset < piece.box[dim][1] - piece.box[dim][0]:
                index, end = piece.box[dim][0] + offset, 0
                for size in into:
                    end += size
                    if index < end:
                        return size
        raise AssertionError("a slice that this rank does not hold")

    # Plans

    def _plans(self, work: dict[Tensor, tuple[Group, Tensor]]) -> list[tuple[list[Tensor], Pipeline]]:
        """The parameters that share ranks and precision, and how their matrices are orthogonalised."""
        shared: dict[tuple[tuple[int, ...], str], list[Tensor]] = {}
        for param, (_, average) in work.items():
            dtype = _wire_dtype(average, self._orthogonalisation["dtype"])
            shared.setdefault((tuple(sorted(self._leaves[param].layout.ranks)), str(dtype)), []).append(param)
        result = []
        for (ranks, precision), params in sorted(shared.items(), key=lambda item: item[0]):
            key = (ranks, precision, tuple(self._leaves[param].name for param in params))
            if key not in self._pipelines:
                self._pipelines[key] = self._pipeline(ranks, params, work)
            result.append((params, self._pipelines[key]))
        return result

    def _pipeline(
        self, ranks: tuple[int, ...], params: list[Tensor], work: dict[Tensor, tuple[Group, Tensor]]
    ) -> Pipeline:
        operators = [replace(self._norm(work[param][0]), fast=self._fast, compiled=self._compile) for param in params]
        entries = [
            Entry(
                self._leaves[param].name,
                self._leaves[param].layout,
                split.out_dim(operator),
                operator.batch_dims,
                split.sizes(work[param][0]["split"], param, operator),
                None if operator.orthogonalize == "svd" else operator.steps,
            )
            for param, operator in zip(params, operators, strict=True)
        ]
        tensor = work[params[0]][1]
        decided = plan(entries, ranks, self._costs(tensor))
        group = self._group_of(ranks) if decided.buckets else None
        return Pipeline(decided, operators, _rank(), group, self._group_of)

    def _costs(self, tensor: Tensor) -> Cost:
        if self._cost is not None:
            return self._cost
        cpu = tensor.device.type == "cpu"
        working = self._orthogonalisation["dtype"] or polar.working_dtype(tensor)
        gram = self._fast and working in (torch.float32, torch.float64)
        wire = _wire_dtype(tensor, self._orthogonalisation["dtype"])
        budget = self._buffer_bytes or (2**24 if cpu else 2**29)
        limit = max(1, budget // wire.itemsize // 2)  # two buckets are in flight
        numbers = (500.0, 2e7) if cpu else (5000.0, 1e10)
        return Cost(*numbers, limit=limit, halved=cpu, allow_gram=gram)

    def _group_of(self, ranks: tuple[int, ...]) -> ProcessGroup:
        """The process group of these global ranks, in the order of the ranks."""
        if ranks not in self._process_groups:
            known = [dist.group.WORLD, self._replicas, *(g for leaf in self._leaves.values() for g in leaf.groups)]
            found = [g for g in known if g is not None and tuple(sorted(dist.get_process_group_ranks(g))) == ranks]
            if not found:
                with explained("the forming of a process group", members=ranks):
                    new = dist.new_group(list(ranks), timeout=timeout(), use_local_synchronization=True)
                found = [cast(ProcessGroup, new)]
            self._process_groups[ranks] = found[0]
        return self._process_groups[ranks]

    def describe(self) -> str:
        """Who orthogonalises what if every parameter has a gradient: owners, elements sent, operations, imbalance."""
        work = {
            param: (group, _local(self.state[param].get("momentum", param)))
            for group in self.param_groups
            if group["rule"] == "lmo" and group["norm"] not in separable.SEPARABLE
            for param in group["params"]
        }
        return "\n".join(pipeline.plan.describe() for _, pipeline in self._plans(work)) or "nothing to orthogonalise"

    # Norms

    def measure_afresh(self) -> None:
        """Lets the next norms start from nothing, so that they are the same whatever was measured before."""
        self._measured = Values()

    def _values(self, asked: list[Asked], which: str | None) -> list[float]:
        parts = []
        for one in asked:
            leaf = self._leaves[one.param]
            parts.append(
                Part(
                    _local_like(one.param, one.tensor),
                    leaf.layout,
                    _rank(),
                    leaf.groups,
                    one.operator,
                    one.split,
                    (one.name, one.of),
                )
            )
        return self._measured.measure(parts, which)


_ALIVE: weakref.WeakSet[Disco] = weakref.WeakSet()
"""Optimizers that hold process groups."""


@atexit.register
def _let_go() -> None:
    """Drops process groups before the interpreter ends: a gloo group that is freed later aborts it (torch 2.13)."""
    for optimizer in list(_ALIVE):
        optimizer._forget()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _local_like(param: Tensor, tensor: Tensor) -> Tensor:
    """The shard of its gradient, buffer or itself, cut as the parameter is."""
    if isinstance(param, DTensor) and isinstance(tensor, DTensor) and tensor.placements != param.placements:
        tensor = tensor.redistribute(param.device_mesh, param.placements)
    return _local(tensor)


def _wire_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is sent in: its own precision, or that of the orthogonalisation where that is the lower."""
    working = dtype or polar.working_dtype(tensor)
    return working if working.itemsize < tensor.dtype.itemsize else tensor.dtype
