"""Cases for ``test_integrations``, in a process that can import torchtitan 0.3.0: python titan.py CASE FOLDER.

torchtitan is for accelerators. What it lacks on a CPU has stand-ins here and nowhere else; docs/trainers.md lists them.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251
from torch import Tensor, nn

SEQUENCES, CONTEXT, STEPS = 2, 64, 6


def stand_in_for_the_device() -> None:
    """What torchtitan asks a device module, which torch.cpu does not answer. Before torchtitan is imported."""
    torch._utils._get_available_device_type = lambda: "cpu"
    answers = {
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=2**30),
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda *_: {},
    }
    for name, answer in answers.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, answer)


def stand_in_for_kernels() -> None:
    """Causal attention in place of FlexAttention, whose backward has no CPU form. Nothing in place of kernels that
    import triton, of shorter timeouts after step 1, for which torch 2.13 has no function, and of two seconds of sleep.
    """
    kernels = ModuleType("torchtitan.distributed.minimal_async_ep.kernels")
    kernels.__getattr__ = lambda name: None  # type: ignore[method-assign]
    sys.modules[kernels.__name__] = kernels
    import torchtitan.trainer
    from torchtitan.distributed import utils
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.common.decoder import Decoder

    def forward(
        self: Any, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, *, enable_gqa: bool = False, **_: Any
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
        return out.transpose(1, 2)

    FlexAttention.forward = forward
    Decoder.get_attention_masks = lambda self, positions: None
    utils.set_pg_timeouts = lambda **_: None
    torchtitan.trainer.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)


def environment() -> None:
    """Of torchrun, for one process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)


def job(folder: Path, layers: int) -> Any:
    """The example's configuration, made small, with text and tokens of our own: the wheel brings none."""
    from examples.torchtitan_config import debugmodel
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer

    from disco.corpus import documents

    class Bytes(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Config, *, tokenizer_path: str) -> None:
            super().__init__()

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode()

        def get_vocab_size(self) -> int:
            return 256

    class Text(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            stop: int = 0

        def __init__(self, config: Config, *, tokenizer: Bytes, **_: Any) -> None:
            self.tokens = torch.tensor(tokenizer.encode(next(documents())[1][: 2**15]))
            self.step, self.stop = 0, config.stop

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            size = SEQUENCES * CONTEXT
            while True:
                if self.step + 1 == self.stop:
                    raise KeyboardInterrupt
                rows = self.tokens[self.step * size : (self.step + 1) * size + 1]
                self.step += 1
                positions = torch.arange(CONTEXT).expand(SEQUENCES, -1)
                inputs = {"input": rows[:-1].view(SEQUENCES, -1), "positions": positions}
                yield inputs, rows[1:].view(SEQUENCES, -1)

        def state_dict(self) -> dict[str, Any]:
            return {"step": self.step}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.step = state_dict["step"]

    config = debugmodel()
    del config.model_spec.model.layers[layers:]
    config.metrics.record = str(folder / "run")
    config.dump_folder = str(folder / "outputs")
    config.tokenizer, config.dataloader = Bytes.Config(), Text.Config(dataset="corpus")
    training = config.training
    training.local_batch_size, training.seq_len, training.steps = SEQUENCES, CONTEXT, STEPS
    training.mixed_precision_param, training.disable_cuda_graphs = "float32", True
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    config.activation_checkpoint, config.validator.enable = None, False
    config.checkpoint = CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False)
    config.debug.seed = 0
    return config


def train(folder: Path, layers: int, stop: int = 0) -> Any:
    """Trains in a process group of one, up to the data of step ``stop`` if that is not 0; returns the trainer."""
    config = job(folder, layers)
    config.dataloader.stop = stop
    trainer = config.build()
    try:
        trainer.train()
    except KeyboardInterrupt:
        assert stop
    trainer.close()
    return trainer


def debugmodel(folder: Path, layers: int = 6) -> dict[str, Any]:
    """The debug model, undisturbed; then once more, interrupted after its checkpoint of step 4, and resumed."""
    stand_in_for_the_device()
    stand_in_for_kernels()
    environment()
    trainer = train(folder / "whole", layers)
    train(folder / "cut", layers, stop=6)
    train(folder / "cut", layers)
    (optimizer,) = trainer.optimizers
    weights = {
        name: param.full_tensor().detach()
        for group in optimizer.param_groups
        for name, param in zip(group["names"], group["params"], strict=True)
    }
    torch.save(weights, folder / "weights.pt")
    dist.destroy_process_group()
    return {"groups": {group["group"]: group["names"] for group in optimizer.param_groups}, "step": trainer.step}


class Model(nn.Module):
    """As torchtitan's: layers in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, 8)
        self.layers = nn.ModuleDict({str(i): nn.Linear(8, 8, bias=i == 1) for i in range(3)})
        self.lm_head = nn.Linear(8, 11, bias=False)


def give_gradients(parts: list[nn.Module], seed: int) -> None:
    for part in parts:
        for name, param in part.named_parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed + len(name)))


def optimizer(folder: Path) -> dict[str, Any]:
    """The container of the configuration with torchtitan's own schedule, state and checks; nothing stands in.

    Two steps of a whole model; its state goes into a model that is cut into three stages, which makes the third.
    """
    from torchtitan.components.optimizer import LRSchedulersContainer

    from disco.integrations import TorchtitanOptimizer

    config = TorchtitanOptimizer.Config(
        lr=0.25,
        ratios={"hidden": 0.125},
        momentum=0.5,
        overrides={"layers.0.*": {"rule": "adamw", "betas": (0.9, 0.99)}},
    )
    schedule = LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.0)
    torch.manual_seed(0)
    whole, cut = Model(), Model()
    container = config.build(model_parts=[whole])
    schedulers = schedule.build(optimizers=container, training_steps=4)
    rates = []
    for seed in (1, 2):
        give_gradients([whole], seed)
        rates.append(schedulers.get_metrics())
        container.step()
        schedulers.step()
    state = container.state_dict()
    dist.checkpoint.save(state, checkpoint_id=folder / "state", no_dist=True)
    cut.load_state_dict(whole.state_dict())
    parts: list[nn.Module] = [nn.Module(), nn.Module(), nn.Module()]
    for i, part in enumerate(parts):
        part.register_module("tok_embeddings", cut.tok_embeddings if i == 0 else None)
        part.layers = nn.ModuleDict({str(i): cut.layers[str(i)]})
        part.register_module("lm_head", cut.lm_head if i == 2 else None)
    stages = config.build(model_parts=parts)
    loaded = stages.state_dict()
    dist.checkpoint.load(loaded, checkpoint_id=folder / "state", no_dist=True)
    stages.load_state_dict(loaded)
    for one, models in ((container, [whole]), (stages, parts)):
        give_gradients(models, 3)
        one.step()
        one.zero_grad()
    differences = {
        name: float((a - b).abs().max())
        for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True)
    }
    names = [{group["group"]: group["names"] for group in stage.param_groups} for stage in stages]
    return {"keys": sorted(state), "rates": rates, "differences": differences, "names": names}


CASES = {"debugmodel": debugmodel, "two layers": lambda folder: debugmodel(folder, 2), "optimizer": optimizer}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](Path(sys.argv[2]))))
