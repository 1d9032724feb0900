"""What a run is: frozen, validated dataclasses, their dictionary form, and the run id. No torch.

Units: batch, horizon, warmup and context are in tokens; a learning rate is the size of one step in the layer's norm.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from disco.errors import UserError

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


class ConfigError(UserError):
    """A configuration that cannot be run; the message says what, what was given and what to do."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _coerce(config: Any) -> None:
    """Gives every field its declared type, so that 1 and 1.0 are one configuration and have one run id."""
    cls: type = type(config)
    for name, kind in _types(cls).items():
        object.__setattr__(config, name, _convert(kind, getattr(config, name), name))


def _positive(**values: float | int | None) -> None:
    for name, value in values.items():
        ok = value is None or (math.isfinite(value) and value > 0)
        _require(ok, f"{name} must be a positive number, got {value!r}")


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
        _coerce(self)
        _positive(
            width=self.width, depth=self.depth, head_size=self.head_size, kv_heads=self.kv_heads,
            ffn_width=self.ffn_width, context=self.context, rope_theta=self.rope_theta, norm_eps=self.norm_eps,
        )  # fmt: skip
        _require(self.head_size % 2 == 0, f"head_size must be even for rotary positions, got {self.head_size}")
        _require(
            self.width % self.head_size == 0,
            f"width must be a multiple of head_size, got width={self.width} and head_size={self.head_size}",
        )
        _require(
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
    """"corpus" is the embedded text; anything else is a file or folder of .txt, .jsonl or .parquet."""
    tokenizer: str = "bytes"
    """"bytes", "bpe:SIZE" (trained on the text itself), or the path of a Hugging Face tokenizer.json."""
    text_field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    valid_tokens: int = 2**16
    """Held-out tokens, the same ones for every run on this data."""
    digest: str = ""
    """Hash of the tokens (so of text and tokenizer); part of the run id in place of paths."""
    vocab: int = 0

    def __post_init__(self) -> None:
        _coerce(self)
        _require(bool(self.source), "data.source is empty; name a file, a folder or 'corpus'")
        _positive(valid_tokens=self.valid_tokens)
        known = self.tokenizer == "bytes" or self.tokenizer.endswith(".json")
        if not known:
            match = re.fullmatch(r"bpe:(\d+)", self.tokenizer)
            _require(
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
        _coerce(self)
        _positive(lr=self.lr, eps=self.eps)
        for group, ratio in self.ratios.items():
            _require(group in GROUPS, f"unknown layer group {group!r} in ratios{_hint(group, GROUPS)}")
            _positive(**{f"ratio of {group}": ratio})
        self._refuse_idle_settings()
        _require(0 <= self.momentum < 1, f"momentum is the weight of the old buffer, in [0, 1), got {self.momentum}")
        _require(not (self.nesterov and self.momentum == 0), "nesterov needs momentum above 0, got momentum=0")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"weight_decay must be 0 or more, got {self.weight_decay}",
        )
        _require(
            self.name != "adam" or self.weight_decay == 0,
            f"adam has no weight decay; use adamw for weight_decay={self.weight_decay}",
        )
        _require(
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
            _require(fine, f"{name} has no effect with {self.name}, which has {', '.join(used)}; leave it out")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warmup, constant, then linear decay to 0 over the last part of the horizon."""

    warmup: int = 0
    """Tokens over which the learning rate rises linearly from 0."""
    decay: float = 0.0
    """Fraction of the horizon, at its end, over which the rate falls to 0."""

    def __post_init__(self) -> None:
        _coerce(self)
        _require(self.warmup >= 0, f"warmup is a number of tokens, 0 or more, got {self.warmup}")
        _require(0 <= self.decay <= 1, f"decay is a fraction of the horizon in [0, 1], got {self.decay}")


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

    def __post_init__(self) -> None:
        _coerce(self)
        _positive(
            batch=self.batch, horizon=self.horizon, divergence=self.divergence,
            checkpoint_seconds=self.checkpoint_seconds,
        )  # fmt: skip
        _require(
            self.batch % self.model.context == 0,
            f"batch must be a multiple of the context, got batch={self.batch} and context={self.model.context} tokens",
        )
        _require(
            self.horizon % self.batch == 0,
            f"horizon must be a multiple of the batch, got horizon={self.horizon} and batch={self.batch} tokens",
        )
        _require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")
        _require(
            self.parent is None or self.schedule.decay > 0,
            f"a run with a parent decays from it: set schedule.decay above 0 (parent={self.parent})",
        )
        _require(
            self.branch_tokens % self.batch == 0,
            f"the decay must start at a multiple of the batch, got {self.branch_tokens} tokens and batch={self.batch}",
        )

    @property
    def branch_tokens(self) -> int:
        """Tokens after which the decay begins; 0 without a decay."""
        return round(self.horizon * (1 - self.schedule.decay)) if self.schedule.decay else 0

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of a hash over everything that changes numbers.

        Left out: the horizon of a run without decay (a longer horizon continues it), which checkpoints are kept,
        how often they are made, and the paths of the data (its digest stands for them).

        Raises:
            ConfigError: the data have not been prepared, so their digest is unknown.
        """
        _require(bool(self.data.digest), "the run id needs prepared data: call disco.train.data.prepare first")
        content = to_dict(self)
        for name in ("keep", "checkpoint_seconds"):
            del content[name]
        if not self.schedule.decay:
            del content["horizon"]
        for name in ("source", "tokenizer", "text_field"):
            del content["data"][name]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def cohort_key(config: TrainConfig) -> str:
    """Runs alike in this can train as one program: they differ in rates, momentum, weight decay, betas or seed.

    Raises:
        ConfigError: the data have not been prepared, so their digest is unknown.
    """
    _require(bool(config.data.digest), "cohorts need prepared data: call disco.train.data.prepare first")
    content = to_dict(config)
    for name in ("seed", "parent", "keep", "checkpoint_seconds"):
        del content[name]
    for name in ("lr", "ratios", "momentum", "weight_decay", "betas"):
        del content["optimizer"][name]
    for name in ("source", "tokenizer", "text_field"):
        del content["data"][name]
    return json.dumps(content | {"branch": config.parent is not None}, sort_keys=True)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionary (JSON types) of a configuration; ``from_dict`` is its inverse."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(config)
    return result


THOUSANDS = {"K": 3, "M": 6, "B": 9, "G": 9, "T": 12}
"""Powers of ten of a count in short."""


def number(value: Any, where: str) -> float:
    """A finite number; as text also a power, ``"2^-5"``, ``"2**-5.5"``, or a count in short, ``"20k"``, ``"10B"``.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:\^|\*\*)\s*\(?(-?\d+(?:\.\d+)?)\)?\s*", value)
            in_short = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([kKMBbGT])\s*", value)
            if match:
                result = float(match[1]) ** float(match[2])
            else:
                result = float(f"{in_short[1]}e{THOUSANDS[in_short[2].upper()]}" if in_short else value)
        else:
            result = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except (ValueError, ArithmeticError):  # not a number, or one too large for a float
        result = math.nan
    _require(math.isfinite(result), f'{where} must be a number such as 0.03 or "2^-5", got {value!r}')
    return result + 0.0  # no negative zero


def from_dict(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Builds a configuration dataclass from nested dictionaries (TOML, JSON).

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, or one that is not valid.
    """
    name = where.rstrip(".") or "the configuration"
    _require(isinstance(values, Mapping), f"{name} must be a table, got {values!r}")
    known = _types(kind)
    for key in values:
        _require(key in known, f"unknown key {where + key!r}{_hint(key, known)}")
    return kind(**{key: _convert(known[key], value, where + key) for key, value in values.items()})


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    """The declared types of a dataclass's fields."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        return None if value is None else _convert(arguments[0], value, where)
    if origin is Literal:
        _require(value in arguments, f"{where} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(arguments[0], item, where) for item in items)
    if dataclasses.is_dataclass(kind):
        made = isinstance(value, typing.cast(type, kind))
        return value if made else from_dict(typing.cast(type, kind), value, where + ".")
    if kind is int:
        whole = number(value, where)
        _require(whole == int(whole), f"{where} must be a whole number, got {value!r}")
        return int(value if isinstance(value, numbers.Integral) else whole)  # a float is exact to 2^53 only
    if kind is float:
        return number(value, where)
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping), f"{where} must be a table, got {value!r}")
        return {key: number(item, f"{where}.{key}") for key, item in value.items()}
    _require(isinstance(value, kind), f"{where} must be {kind.__name__}, got {value!r}")
    return value


def _hint(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
