"""What a run is: frozen, validated dataclasses, their dictionary form, and the run id. No torch.

Units: batch, horizon, warmup and context are in tokens; a learning rate is the size of one step in the layer's norm.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from disco.train.fields import ConfigError, coerce, from_dict, hint, number, positive, require, to_dict

__all__ = [
    "ConfigError", "DataConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig", "ScheduleConfig", "TrainConfig",
    "cohort_key", "from_dict", "number", "to_dict",
]  # fmt: skip

Placement = Literal[
    "everywhere",
    "all-but-output",
    "residual+output+qk",
    "residual+output",
    "residual",
    "qk",
    "output",
    "none",
]
"""Which inputs get a parameter-free RMSNorm (arXiv:2510.03871, normalisation ablation)."""

GROUPS = ("input", "hidden", "output", "vector")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder with two dials, width and depth (method: arXiv:2510.03871 section 2)."""

    width: int = 256
    depth: int = 4
    head_size: int = 64
    kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None means one for each query head."""
    ffn_width: int | None = None
    """Hidden width of SwiGLU; None means 2.75 x width, rounded up to a multiple of 8."""
    context: int = 4096
    placement: Placement = "everywhere"
    residual: Literal["identity", "depth-normalised", "completep"] = "identity"
    """Y = a X + b Block(Norm(X)): identity (1, 1), depth-normalised ((2L-1)/2L, 1/2L), completep (1, 1/2L)."""
    depth_init: Literal["identity", "total", "relative"] = "total"
    """Factor on the initial last projection of a block: 1, 1/sqrt(2L) or 1/sqrt(2l) for layer l = 1..L."""
    rope_theta: float = 1e4
    norm_eps: float = 1e-20

    def __post_init__(self) -> None:
        coerce(self)
        positive(
            width=self.width, depth=self.depth, head_size=self.head_size, kv_heads=self.kv_heads,
            ffn_width=self.ffn_width, context=self.context, rope_theta=self.rope_theta, norm_eps=self.norm_eps,
        )  # fmt: skip
        require(self.head_size % 2 == 0, f"head_size must be even for rotary positions, got {self.head_size}")
        require(
            self.width % self.head_size == 0,
            f"width must be a multiple of head_size, got width={self.width} and head_size={self.head_size}",
        )
        require(
            self.kv_heads is None or self.heads % self.kv_heads == 0,
            f"kv_heads must divide the {self.heads} query heads (width / head_size), got {self.kv_heads}",
        )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.width // self.head_size

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward block."""
        return self.ffn_width or 8 * math.ceil(2.75 * self.width / 8)

    def parameters(self, vocab: int) -> int:
        """Number of parameters with a vocabulary of ``vocab`` entries, both embeddings included."""
        kv = (self.kv_heads or self.heads) * self.head_size
        block = 2 * self.width**2 + 2 * self.width * kv + 3 * self.width * self.hidden
        return self.depth * block + 2 * vocab * self.width


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text and how it becomes tokens. ``digest`` and ``vocab`` are filled in by ``train.data.prepare``."""

    source: tuple[str, ...] = ("corpus",)
    """"corpus" is the embedded text; anything else is a file or folder of .txt, .jsonl or .parquet, a folder that
    ``disco data prepare`` made, or .bin files of nanoGPT or llm.c (docs/data.md)."""
    tokenizer: str = "bytes"
    """"bytes", "bpe:SIZE" (trained on the text itself), or the path of a Hugging Face tokenizer.json."""
    text_field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    valid_tokens: int = 2**16
    """Held-out tokens, the same ones for every run on this data."""
    repeat: int = 1
    """Passes over the training text that may be made; above 1 a run says in its summary how many it made."""
    digest: str = ""
    """Hash of the tokens (so of text and tokenizer); part of the run id in place of paths."""
    vocab: int = 0

    def __post_init__(self) -> None:
        coerce(self)
        require(bool(self.source), "data.source is empty; name a file, a folder or 'corpus'")
        positive(valid_tokens=self.valid_tokens, repeat=self.repeat)
        known = self.tokenizer == "bytes" or self.tokenizer.endswith(".json")
        if not known:
            match = re.fullmatch(r"bpe:(\d+)", self.tokenizer)
            require(
                match is not None and int(match[1]) > 256,
                "tokenizer must be 'bytes', 'bpe:SIZE' with SIZE above 256, or a tokenizer.json, "
                f"got {self.tokenizer!r}",
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update. ``momentum`` is the weight that stays on the OLD buffer (0 = none), as in PyTorch."""

    name: Literal["scion", "adam", "adamw", "muon"] = "scion"
    lr: float = 2**-5
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of a layer group over ``lr``; groups not named have 1."""
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    orthogonalize: Literal["polar_express", "newton_schulz", "svd"] = "newton_schulz"

    def __post_init__(self) -> None:
        coerce(self)
        positive(lr=self.lr, eps=self.eps)
        for group, ratio in self.ratios.items():
            require(group in GROUPS, f"unknown layer group {group!r} in ratios{hint(group, GROUPS)}")
            positive(**{f"ratio of {group}": ratio})
        self._refuse_idle_settings()
        require(0 <= self.momentum < 1, f"momentum is the weight of the old buffer, in [0, 1), got {self.momentum}")
        require(not (self.nesterov and self.momentum == 0), "nesterov needs momentum above 0, got momentum=0")
        require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"weight_decay must be 0 or more, got {self.weight_decay}",
        )
        require(
            self.name != "adam" or self.weight_decay == 0,
            f"adam has no weight decay; use adamw for weight_decay={self.weight_decay}",
        )
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas are two numbers in [0, 1), got {self.betas}",
        )
        object.__setattr__(self, "ratios", {group: float(self.ratios.get(group, 1.0)) for group in GROUPS})

    def _refuse_idle_settings(self) -> None:
        """A setting without effect would give equal runs different ids."""
        steepest, adaptive = ("momentum", "nesterov", "orthogonalize"), ("betas", "eps")
        used = {"scion": steepest, "muon": steepest + adaptive}.get(self.name, adaptive)
        for name in steepest + adaptive:
            fine = name in used or getattr(self, name) == getattr(OptimizerConfig, name)
            require(fine, f"{name} has no effect with {self.name}, which has {', '.join(used)}; leave it out")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warmup, constant, then linear decay to 0 over the last part of the horizon."""

    warmup: int = 0
    """Tokens over which the learning rate rises linearly from 0."""
    decay: float = 0.0
    """Fraction of the horizon, at its end, over which the rate falls to 0."""

    def __post_init__(self) -> None:
        coerce(self)
        require(self.warmup >= 0, f"warmup is a number of tokens, 0 or more, got {self.warmup}")
        require(0 <= self.decay <= 1, f"decay is a fraction of the horizon in [0, 1], got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one run is spread over processes and memory (docs/distributed.md). It changes the rounding only."""

    replicate: int = 1
    """Copies of the model, each trained on a part of the batch: DDP, or with ``shard`` the outer dimension of HSDP."""
    shard: int = 1
    """Processes that share the parameters of a copy, each trained on a part of the batch: FSDP2."""
    tensor: int = 1
    """Processes that share each layer's work on the same tokens: tensor parallelism."""
    micro_batch: int | None = None
    """Tokens of a run that a process takes at a time, gradients adding up; None takes its whole part of the batch."""
    recompute: bool = False
    """Activation checkpointing: activations inside blocks are computed again in the backward pass, not kept."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is a GPU where there is one."""

    def __post_init__(self) -> None:
        coerce(self)
        positive(replicate=self.replicate, shard=self.shard, tensor=self.tensor, micro_batch=self.micro_batch)

    @property
    def data_ranks(self) -> int:
        """Parts into which a batch is cut."""
        return self.replicate * self.shard

    def fits(self, processes: int) -> None:
        """Makes sure that the sizes multiply to the number of processes.

        Raises:
            ConfigError: they do not.
        """
        asked = self.data_ranks * self.tensor
        have = "torchrun started" if processes > 1 else "there is"
        require(
            asked == processes,
            f"parallel.replicate x shard x tensor is {self.replicate} x {self.shard} x {self.tensor} = {asked}, but "
            f"{have} {processes} process{'es' if processes > 1 else ''}; make the sizes multiply to that, or start it "
            f"with torchrun --nproc-per-node {asked} -m disco train ...",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, completely."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: int = 4096
    """Tokens per step, a multiple of the context."""
    horizon: int = 2**20
    """Tokens to train on, a multiple of the batch."""
    seed: int = 0
    """Seeds the initial weights and the order of the data."""
    divergence: float = 3.0
    """A run ends as diverged when its training loss stays above this many times ln(vocabulary) for 20 steps."""
    parent: str | None = None
    """Id of the constant-rate run whose checkpoint this run decays from; None trains from the start."""
    keep: tuple[int, ...] = ()
    """Horizons (tokens) whose checkpoints are kept, for decay branches. Does not change numbers."""
    checkpoint_seconds: float = 20.0
    """Seconds between checkpoints. Does not change numbers."""
    compile: bool = False
    """torch.compile of the model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 by autocast, weights and optimizer in float32; for GPUs."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        coerce(self)
        positive(
            batch=self.batch, horizon=self.horizon, divergence=self.divergence,
            checkpoint_seconds=self.checkpoint_seconds,
        )  # fmt: skip
        require(
            self.batch % self.model.context == 0,
            f"batch must be a multiple of the context, got batch={self.batch} and context={self.model.context} tokens",
        )
        self._check_parts()
        require(
            self.horizon % self.batch == 0,
            f"horizon must be a multiple of the batch, got horizon={self.horizon} and batch={self.batch} tokens",
        )
        require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")
        require(
            self.parent is None or self.schedule.decay > 0,
            f"a run with a parent decays from it: set schedule.decay above 0 (parent={self.parent})",
        )
        require(
            self.branch_tokens % self.batch == 0,
            f"the decay must start at a multiple of the batch, got {self.branch_tokens} tokens and batch={self.batch}",
        )

    def _check_parts(self) -> None:
        require(
            not self.compile or self.parallel.tensor == 1,
            "compile does not go with parallel.tensor above 1: torch keeps compiled graphs with the names of their "
            "process groups, which another run may not have; leave out one of them",
        )
        rows, ranks, micro = self.batch // self.model.context, self.parallel.data_ranks, self.parallel.micro_batch
        require(
            rows % ranks == 0,
            f"parallel.replicate x shard is {ranks}, which does not divide the {rows} sequences of a batch "
            f"(batch={self.batch}, context={self.model.context} tokens)",
        )
        part = self.batch // ranks
        require(
            micro is None or (micro % self.model.context == 0 and part % micro == 0),
            f"parallel.micro_batch must be a multiple of the context of {self.model.context} tokens that divides the "
            f"{part} tokens of a batch that a process takes, got {micro}",
        )

    @property
    def branch_tokens(self) -> int:
        """Tokens after which the decay begins; 0 without a decay."""
        return round(self.horizon * (1 - self.schedule.decay)) if self.schedule.decay else 0

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of a hash over everything that changes numbers.

        Left out: the horizon of a run without decay (a longer horizon continues it), which checkpoints are kept,
        how often they are made, how the run is spread over processes, and the paths of the data (its digest stands for
        them).

        Raises:
            ConfigError: the data have not been prepared, so their digest is unknown.
        """
        require(bool(self.data.digest), "the run id needs prepared data: call disco.train.data.prepare first")
        content = _numerical(self)
        if not self.schedule.decay:
            del content["horizon"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def cohort_key(config: TrainConfig) -> str:
    """Runs alike in this can train as one program: they differ in rates, momentum, weight decay, betas or seed.

    Raises:
        ConfigError: the data have not been prepared, so their digest is unknown.
    """
    require(bool(config.data.digest), "cohorts need prepared data: call disco.train.data.prepare first")
    content = _numerical(config)
    for name in ("seed", "parent"):
        del content[name]
    for name in ("lr", "ratios", "momentum", "weight_decay", "betas"):
        del content["optimizer"][name]
    return json.dumps(content | {"branch": config.parent is not None}, sort_keys=True)


def _numerical(config: TrainConfig) -> dict[str, Any]:
    """What changes numbers; settings that came later are left out where they are as if they were not there."""
    content = to_dict(config)
    for name in ("keep", "checkpoint_seconds", "parallel"):
        del content[name]
    for name in ("source", "tokenizer", "text_field"):
        del content["data"][name]
    if config.data.repeat == 1:
        del content["data"]["repeat"]
    if config.precision == "fp32":
        del content["precision"]
    return content
