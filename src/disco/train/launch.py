"""One run on the processes that torchrun starts: the team, and the program that each of them goes through."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from disco.distributed.checkpoint import Saver
from disco.distributed.disco import Disco
from disco.distributed.failure import explained
from disco.distributed.reduce import MAX, all_gather
from disco.errors import UserError
from disco.groups import init_
from disco.probe import Probe
from disco.train import checkpoint
from disco.train.cohort import optimizer_groups, optimizer_settings
from disco.train.config import TrainConfig
from disco.train.model import Llama
from disco.train.parallel import mesh_of, spread
from disco.train.team import Team
from disco.train.trainer import VALID_CHUNK, Trainer, device_of

T = TypeVar("T")


@contextmanager
def ranks(config: TrainConfig) -> Iterator[Team]:
    """The processes of torchrun, as a team that may train this run, joined within the context.

    Raises:
        UserError: no GPU where one is asked for.
    """
    device = device_of(config)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(config, mesh_of(config.parallel, device))
    finally:
        dist.destroy_process_group()


class Ranks(Team):
    """The processes of the default group, each a place in a mesh."""

    def __init__(self, config: TrainConfig, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.size = dist.get_world_size()
        self.leads = dist.get_rank() == 0
        self.part, self.parts = dist.get_rank() // config.parallel.tensor, config.parallel.data_ranks

    def program(self, configs: Sequence[TrainConfig], compiled: bool) -> Trainer:
        """The program of the one run."""
        (config,) = configs
        return ShardedProgram(config, self, compiled)

    def first(self, work: Callable[[], T]) -> T:
        """What the leader's ``work`` returns (JSON), on all processes.

        Raises:
            UserError: the leader's, on all of them.
        """
        if self.leads:
            try:
                result = work()
            except UserError as error:
                self._tell({"error": str(error)})
                raise
            self._tell({"result": result})
            return result
        told = self._tell({})
        if "error" in told:
            raise UserError(told["error"])
        return cast(T, told["result"])

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        said = torch.tensor(int(flag))
        with explained("an agreement"):
            dist.all_reduce(said, MAX)
        return bool(said)

    def _tell(self, content: dict[str, Any]) -> dict[str, Any]:
        """The leader's content, on all processes."""
        text = json.dumps(content).encode()
        length = torch.tensor(len(text))
        with explained("a message of the first rank"):
            dist.broadcast(length, 0)
            message = torch.zeros(int(length), dtype=torch.uint8)
            if self.leads:
                message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            dist.broadcast(message, 0)
        told: dict[str, Any] = json.loads(bytes(message.tolist()))
        return told


class ShardedProgram(Trainer):
    """Model and optimizer of one run, of which this process holds a part (``Disco``, R = 1)."""

    optimizer: Disco

    def __init__(self, config: TrainConfig, team: Ranks, compiled: bool) -> None:
        super().__init__(config)
        self._config, self._team = config, team
        cut = config.parallel.shard * config.parallel.tensor > 1
        with torch.device("meta" if cut else self.device):  # what is cut need not fit on a device
            self.model = Llama(config.model, config.data.vocab)
        self.model.recompute(config.parallel.recompute)
        self._loss = spread(self.model, team.mesh, compiled or config.compile)
        if cut:
            self.model.to_empty(device=self.device)
        self.model.rotate_anew()
        replicas = dist.group.WORLD if isinstance(self._loss, DistributedDataParallel) else None
        groups = optimizer_groups(self.model, config.optimizer)
        self.optimizer = Disco(groups, replicas=replicas, fast=False, **optimizer_settings(config.optimizer))
        self.loss_fn = lambda tokens, targets: self._loss(tokens[0], targets[0])[None]
        self._remember_rates()
        self._saver = Saver()

    def initialise(self, run: int) -> None:
        whole = Llama(self._config.model, self._config.data.vocab)
        init_(whole, whole.init_scales(), generator=torch.Generator().manual_seed(self._config.seed))
        weights = dict(whole.named_parameters())
        for group in self.optimizer.param_groups:
            for name, param in zip(group["names"], group["params"], strict=True):
                checkpoint.fill(param.detach(), weights[name].detach())

    def load(self, run: int, path: Path) -> None:
        checkpoint.restore(path, checkpoint.tensors(self.optimizer))

    def save(self, run: int, folder: Path, header: Mapping[str, Any], kept: int | None = None) -> None:
        tokens = header["state"]["step"] * self._config.batch
        path = checkpoint.path_of_latest(folder, tokens)
        if kept is not None:
            path = checkpoint.path_at(folder, kept).with_suffix(checkpoint.SHARDED)
        self._saver.save(path, checkpoint.tensors(self.optimizer), header, lambda: checkpoint.make_room(folder))

    def settle(self) -> None:
        self._saver.settle()

    def keep(self, runs: Sequence[int]) -> None:
        raise ValueError("a run on many processes trains alone")

    def rates(self, run: int) -> dict[str, float]:
        return {group["group"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def norms(self) -> list[dict[str, float]]:
        self.optimizer.measure_afresh()  # a run that is continued has no norms before
        return [Probe(self.optimizer, size=True).measure()]

    @torch.no_grad()
    def valid_losses(self, tokens: Tensor, targets: Tensor) -> list[float]:
        part, parts = self._team.part, self._team.parts
        rows = max(1, VALID_CHUNK // self._context)
        mine = list(zip(tokens[part::parts].split(rows), targets[part::parts].split(rows), strict=True))
        passes = math.ceil(math.ceil(len(tokens) / parts) / rows)
        total = torch.zeros(2, dtype=torch.float64)
        for index in range(passes):  # as many as the other ranks make, for they exchange parameters
            counts = index < len(mine) and len(mine[index][0]) > 0
            chunk, target = mine[index] if counts else (tokens[:1], targets[:1])
            with self._precision():
                loss = self.model.loss(chunk.to(self.device), target.to(self.device))
            if counts:
                total += torch.tensor([float(loss) * len(chunk), len(chunk)], dtype=torch.float64)
        sums = self._everywhere(total).sum(0)
        return [float(sums[0] / sums[1])]

    def _adding(self, last: bool) -> AbstractContextManager[object]:
        if isinstance(self._loss, DistributedDataParallel) and not last:
            return cast("AbstractContextManager[object]", self._loss.no_sync())
        return nullcontext()

    def _agreed(self, losses: Tensor) -> list[float]:
        return [float(self._everywhere(losses.double().cpu()).mean())]

    def _everywhere(self, numbers: Tensor) -> Tensor:
        """The numbers of all ranks, on each of them in the same order: so they decide alike, to the bit."""
        return all_gather(numbers, cast(dist.ProcessGroup, dist.group.WORLD), "the mean of the losses")
