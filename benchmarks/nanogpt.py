"""Does the sweep find a model as good as a plain GPT with AdamW, tuned alike?

Both are trained on the same blocks of the same text in the same order, for the same number of tokens, at about the same
number of parameters, over a grid of learning rates (octaves) and batches, and judged by the mean of the last three
held-out losses (steps s - 2d, s - d, s with d = s/64). Learning rates are constant; ``--cosine`` adds GPTs with warmup
and decay.

    python benchmarks/nanogpt.py --tokens 2^20 --width 32 --out results.json

The GPT is written in the manner of nanoGPT: LayerNorm, GELU, learned positions, tied embeddings, no biases, normal
initial weights of one standard deviation, 1/sqrt(2L) of it in the last projection of each block; AdamW with betas
(0.9, 0.95), weight decay 0.1 on matrices, gradient norm clipped at 1. nanoGPT's deviation of 0.02 suits widths of about
1,000, so that by default there is also an arm with 1/sqrt(width).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disco.runs.horizons import window
from disco.runs.reader import read_run
from disco.runs.schema import DATA, Metric
from disco.runs.units import power
from disco.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, number
from disco.train.data import TokenStream, check, prepare
from disco.train.loop import train
from disco.train.schedule import factor

WARMUP, MINIMUM = 0.02, 0.1
"""Of the cosine arm: fraction of the steps, and the last learning rate over the peak."""


class GPT(nn.Module):
    """Decoder with learned positions and tied embeddings."""

    def __init__(self, width: int, depth: int, heads: int, context: int, vocab: int, std: float) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(weight, std=std / math.sqrt(2 * depth) if last else std)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.project(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def gpt_parameters(width: int, depth: int, context: int, vocab: int) -> int:
    """Number of parameters of a GPT."""
    return (vocab + context) * width + depth * (12 * width**2 + 2 * width) + width


def gpt_width(config: ModelConfig, vocab: int) -> int:
    """Width, a multiple of the heads, that makes the number of parameters most like that of our model."""
    wanted = config.parameters(vocab)
    widths = range(config.heads, 4 * config.width, config.heads)
    return min(widths, key=lambda width: abs(gpt_parameters(width, config.depth, config.context, vocab) - wanted))


@dataclass(frozen=True)
class Point:
    """One run of the grid; ``config`` holds what both models share, and our model and optimizer."""

    arm: str
    config: TrainConfig
    runs: Path
    std: float | None = None
    """Of the GPT's initial weights; None for our model."""
    cosine: bool = False

    def run(self) -> dict[str, Any]:
        """Trains it and returns the row for the results."""
        torch.set_num_threads(1)
        start = time.perf_counter()
        loss = self._ours() if self.std is None else self._gpt(self.std)
        row = {"arm": self.arm, "lr": self.config.optimizer.lr, "batch": self.config.batch}
        return row | {"loss": loss, "seconds": round(time.perf_counter() - start, 2)}

    def _ours(self) -> float | None:
        if train(self.config, self.runs) != "finished":
            return None
        run = read_run(self.runs / self.config.id)  # it may be longer: the record of an earlier benchmark
        measured = window(self.config.horizon // self.config.batch)
        losses = run.column(Metric.LOSS_VALID)[np.isin(run.column(Metric.STEP), measured)]
        if len(losses) < len(measured) or not np.isfinite(losses).all():
            raise SystemExit(f"{run.folder} was not measured at this horizon: choose another --runs folder")
        return _mean(losses.tolist())

    def _gpt(self, std: float) -> float | None:
        config, model_config = self.config, self.config.model
        stream = TokenStream(config.data, self.runs / DATA, context=model_config.context, seed=config.seed)
        torch.manual_seed(config.seed)
        width, vocab = gpt_width(model_config, config.data.vocab), config.data.vocab
        model = GPT(width, model_config.depth, model_config.heads, model_config.context, vocab, std)
        optimizer = _adamw(model, config.optimizer.lr)
        steps = config.horizon // config.batch
        losses = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.lr * self._factor(step, steps)
            tokens, targets = (torch.from_numpy(part) for part in stream.batch(step, config.batch))
            loss = model.loss(tokens, targets)
            if not math.isfinite(loss.item()):
                return None
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step + 1 in window(steps):
                losses.append(_valid_loss(model, stream))
        return _mean(losses)

    def _factor(self, step: int, steps: int) -> float:
        if not self.cosine:
            return 1.0
        warmup = math.ceil(WARMUP * steps)
        return factor(step, steps=steps, warmup=warmup, decay=steps - warmup, shape="cosine", minimum=MINIMUM)


def _adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


@torch.no_grad()
def _valid_loss(model: GPT, stream: TokenStream) -> float:
    tokens, targets = (torch.from_numpy(part).split(64) for part in stream.valid_blocks())
    total = sum(model.loss(x, y).item() * len(x) for x, y in zip(tokens, targets, strict=True))
    return total / sum(map(len, tokens))


def _mean(losses: list[float]) -> float | None:
    mean = math.fsum(losses) / len(losses)
    return mean if math.isfinite(mean) else None


def grid(options: argparse.Namespace) -> Iterator[Point]:
    """All runs of all arms, the slow small batches first."""
    model = ModelConfig(width=options.width, depth=options.depth, head_size=options.head_size, context=options.context)
    data = DataConfig(source=tuple(options.data), valid_tokens=options.valid_tokens)
    data = prepare(data, options.runs / DATA)
    arms: dict[str, dict[str, Any]] = {"scion": {}}
    for std in options.gpt_std or [0.02, options.width**-0.5]:
        arms[f"gpt-{std:.2g}"] = {"std": std}
        if options.cosine:
            arms[f"gpt-{std:.2g}-cosine"] = {"std": std, "cosine": True}
    for batch in sorted(options.batch):
        shared = TrainConfig(model=model, data=data, batch=batch, horizon=options.tokens, seed=options.seed)
        check(shared, TokenStream(data, options.runs / DATA, context=model.context, seed=options.seed))
        for arm, kind in arms.items():
            for exponent in options.gpt_lr if kind else options.scion_lr:
                optimizer = OptimizerConfig(lr=2**exponent, ratios={"hidden": options.hidden_ratio})
                yield Point(arm, replace(shared, optimizer=optimizer), options.runs, **kind)


def best(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """The row of the arm with the lowest loss, and whether it lies at an edge of the grid."""
    mine = [row for row in rows if row["arm"] == arm]
    finite = [row for row in mine if row["loss"] is not None]
    if not finite:
        raise SystemExit(f"every run of {arm} diverged: lower its learning rates")
    row = min(finite, key=lambda row: row["loss"])
    edges = [name for name in ("lr", "batch") if row[name] in _ends({other[name] for other in mine})]
    return row | {"edge": edges}


def _ends(values: set[float]) -> set[float]:
    return {min(values), max(values)} if len(values) > 1 else set()


def table(rows: list[dict[str, Any]], arm: str) -> str:
    """Losses of an arm: a line for each learning rate, a column for each batch."""
    losses = {(row["lr"], row["batch"]): row["loss"] for row in rows if row["arm"] == arm}
    rates, batches = (sorted({key[i] for key in losses}) for i in (0, 1))
    lines = [f"{arm:>16}" + "".join(f"{power(batch):>9}" for batch in batches)]
    for lr in rates:
        cells = (losses[lr, batch] for batch in batches)
        lines.append(f"{power(lr):>16}" + "".join("        -" if x is None else f"{x:9.4f}" for x in cells))
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    def tokens(text: str) -> int:
        return int(number(text, "a number of tokens"))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=tokens, default=2**20, help="horizon of every run, such as 2^20")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=16)
    parser.add_argument("--context", type=tokens, default=128)
    parser.add_argument("--data", nargs="+", default=["corpus"])
    parser.add_argument("--valid-tokens", type=tokens, default=2**16)
    parser.add_argument("--batch", type=tokens, nargs="+", default=[2**k for k in range(8, 13)], help="tokens per step")
    parser.add_argument("--scion-lr", type=float, nargs="+", default=range(-6, 1), help="as powers of two")
    parser.add_argument("--gpt-lr", type=float, nargs="+", default=range(-10, -3), help="as powers of two")
    parser.add_argument("--gpt-std", type=float, nargs="+", help="of the GPT's initial weights; each is an arm")
    parser.add_argument("--hidden-ratio", type=float, default=1.0, help="Scion's rate of hidden layers over the others")
    parser.add_argument("--cosine", action="store_true", help="also GPTs with warmup and cosine decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("nanogpt-runs"), help="folder for data and our run records")
    parser.add_argument("--out", type=Path, default=Path("nanogpt.json"))
    return parser.parse_args()


def main() -> None:
    options = _parse()
    points = list(grid(options))
    model, vocab = points[0].config.model, points[0].config.data.vocab
    width = gpt_width(model, vocab)
    sizes = {"scion": model.parameters(vocab), "gpt": gpt_parameters(width, model.depth, model.context, vocab)}
    print(f"{len(points)} runs of {power(options.tokens)} tokens; parameters: ours {sizes['scion']:,}, ", end="")
    print(f"GPT {sizes['gpt']:,} (width {width})", flush=True)

    rows = []
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(point.run) for point in points]):
            rows.append(future.result())
            print(f"{len(rows):4d}/{len(points)} {json.dumps(rows[-1])}", flush=True)

    arms = list(dict.fromkeys(point.arm for point in points))
    winners = {arm: best(rows, arm) for arm in arms}
    for arm, row in winners.items():
        edge = f"; at the edge of the grid in {' and '.join(row['edge'])}: widen it" if row["edge"] else ""
        print(
            f"\n{table(rows, arm)}\nbest {row['loss']:.4f} at lr {power(row['lr'])}, batch {power(row['batch'])}{edge}"
        )
    ratios = {arm: winners["scion"]["loss"] / winners[arm]["loss"] for arm in arms if arm != "scion"}
    for arm, ratio in ratios.items():
        print(f"\nloss of ours / loss of {arm}: {ratio:.4f}")
    settings = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(options).items()}
    result = {"settings": settings, "parameters": sizes, "best": winners, "ratios": ratios, "runs": rows}
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
