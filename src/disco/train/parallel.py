"""The norm-everywhere model over many processes: DDP, FSDP2, HSDP, and tensor parallelism below either.

Tensor parallelism cuts heads, hidden units and the vocabulary over a mesh. Column-wise: queries, keys, values, ``w1``,
``w3`` and the output layer; row-wise: ``wo``, ``w2`` and the embedding (Shoeybi et al., arXiv:1909.08053). The norms on
the inputs of ``wo`` and ``w2`` run over what is then cut, so their sums of squares are added up. Every rank of the mesh
sees the same tokens and gets the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from disco.errors import UserError
from disco.train.config import ParallelConfig
from disco.train.model import Attention, Block, Llama, RMSNorm

Loss = Callable[[Tensor, Tensor], Tensor]


def mesh_of(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """The mesh of all processes, tensor-parallel ones next to each other; without the sizes of 1 that nothing needs."""
    sizes = {"replicate": config.replicate, "shard": config.shard, "tensor": config.tensor}
    both = config.replicate > 1 and config.tensor > 1  # HSDP x TP, also where the shards are whole
    used = {name: size for name, size in sizes.items() if size > 1 or (name == "shard" and both)}
    return init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))


def spread(model: Llama, mesh: DeviceMesh, compiled: bool) -> Loss:
    """Lays the model out over the mesh, in place; returns the loss of this process's part of a batch, to be trained.

    Gradients are the mean over the dimensions replicate and shard. Compiled are the blocks, one graph for all; not with
    tensor parallelism, whose collectives torch 2.13 keeps in its cache of graphs under names of process groups.

    Raises:
        UserError: the size of the mesh's dimension tensor does not divide the model.
    """
    names = mesh.mesh_dim_names or ()
    if "tensor" in names:
        tensor_parallel(model, mesh["tensor"])
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=False)
    if "shard" in names:
        over = mesh[("replicate", "shard")] if "replicate" in names else mesh["shard"]
        for layer in model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
    elif "replicate" in names:
        return DistributedDataParallel(_Loss(model), broadcast_buffers=False)
    return model.loss


class _Loss(nn.Module):
    """The loss as a module, for DDP knows modules only."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.model.loss(tokens_BT, targets_BT)


class CutRMSNorm(nn.Module):
    """RMSNorm over a last dimension that is cut evenly over the ranks of a group."""

    def __init__(self, eps: float, group: ProcessGroup) -> None:
        super().__init__()
        self.eps, self._group = eps, group

    def forward(self, x: Tensor) -> Tensor:
        squares = all_reduce((x * x).sum(-1, keepdim=True), group=self._group)
        return x * torch.rsqrt(squares / (x.shape[-1] * self._group.size()) + self.eps)


class CutAttention(Attention):
    """Attention of this rank's heads."""

    def qkv(self, x_ND: Tensor) -> Tensor:
        weights = [cast(DTensor, part.weight) for part in (self.wq, self.wk, self.wv)]
        # every rank's heads see the same input, so its gradient is the sum of theirs
        x_ND = DTensor.from_local(x_ND, weights[0].device_mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        return F.linear(x_ND, torch.cat([weight.to_local() for weight in weights]))


def tensor_parallel(model: Llama, mesh: DeviceMesh) -> Llama:
    """Cuts the parameters of ``model`` in place over a mesh of one dimension, before FSDP2 if both are used.

    Raises:
        UserError: the mesh's size does not divide the heads, the key-value heads, the hidden units or the vocabulary.
    """
    size, group = mesh.size(), mesh.get_group()
    blocks = [cast(Block, layer) for layer in model.layers]
    counts = {"heads": blocks[0].attention.heads, "kv_heads": blocks[0].attention.kv_heads}
    counts |= {"hidden": model.config.hidden, "vocab": model.output.out_features}
    for name, count in counts.items():
        if count % size:
            raise UserError(f"tensor parallelism over {size} ranks needs a multiple of them as {name}, got {count}")
    columns, rows = ColwiseParallel(), RowwiseParallel()
    for block in blocks:
        plan = {"attention.wq": columns, "attention.wk": columns, "attention.wv": columns, "attention.wo": rows}
        plan |= {"feed_forward.w1": columns, "feed_forward.w3": columns, "feed_forward.w2": rows}
        parallelize_module(block, mesh, plan)
        block.attention.__class__ = CutAttention
        block.attention.heads //= size
        block.attention.kv_heads //= size
        if isinstance(block.feed_forward.norm, RMSNorm):
            block.attention.o_norm = block.feed_forward.norm = CutRMSNorm(model.config.norm_eps, group)
    ends = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    return model
