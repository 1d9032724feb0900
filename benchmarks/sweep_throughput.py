"""How many tokens a second do 16 runs train on together, one by one, and in a plain loop?

    python benchmarks/sweep_throughput.py [--members 16] [--seconds 3] [--rounds 3] [--plot FILE] [--profile]

Everything runs in one process with one thread, in rounds that take turns; the fastest step of each counts, by CPU time,
so that other processes disturb less. A step is data, forward and backward pass, update, and reading the loss. Arms:

    cohort     members as one program
    grouped    members in programs of the size that ``disco sweep run`` chooses for this batch
    compiled   the same, compiled, as long cohorts are
    one by one members alone, by the same code
    plain      the same model and Scion in the usual idioms: ``F.rms_norm``, cosines and sines, one Linear for each
               weight, [B, T, D] activations, one LMO after the other
    nanoGPT    a GPT as in nanogpt.py (LayerNorm, GELU, fused qkv, tied embeddings) with torch.optim.Muon and AdamW, at
               the same width and depth: another model with fewer operations, which Muon orthogonalises in bfloat16

Shares of the peak are of the fastest fp32 product of two 1,024 x 1,024 matrices in this call; matrix products and
attention count (causal attention as half), elementwise work and the optimizer's products do not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nanogpt import GPT
from torch import Tensor, nn

import disco
from disco.sweep.cohorts import largest
from disco.train.cohort import Program
from disco.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig

SIZES = ((32, 2, 16), (64, 4, 32), (128, 4, 32))
"""(width, depth, head size)."""
BATCHES = (256, 1024, 8192)
CONTEXT, VOCAB = 128, 256
GOALS = {(32, 256): 3.0, (32, 1024): 2.0, (32, 8192): 1.5, (64, 256): 2.0, (64, 1024): 1.5, (64, 8192): 1.3}
"""Wanted speed of the cohort over a plain loop by (width, batch); 1 where there is none."""

MEMBERS = (1, 2, 4, 8, 16, 32)
COLOURS = {"grouped": "#1f77b4", "compiled": "#2ca02c", "plain": "#d62728"}

Step = Callable[[], Any]
TEXT = torch.randint(VOCAB, (2**20,), generator=torch.Generator().manual_seed(0))


def draw(batch: int) -> tuple[Tensor, Tensor]:
    """A random batch in the manner of nanoGPT's get_batch."""
    starts = torch.randint(len(TEXT) - CONTEXT - 1, (batch // CONTEXT,)).tolist()
    return (
        torch.stack([TEXT[i : i + CONTEXT] for i in starts]),
        torch.stack([TEXT[i + 1 : i + 1 + CONTEXT] for i in starts]),
    )


# Ours --------------------------------------------------------------------------------------------------------------


def ours(config: TrainConfig, members: int, compiled: bool = False) -> Step:
    """A step of some runs as one program, which share their blocks as the runs of a study do."""
    rates = [replace(config.optimizer, lr=2.0 ** (-5 - i / 4)) for i in range(members)]
    program = Program([replace(config, optimizer=optimizer) for optimizer in rates])
    for run in range(members):
        program.initialise(run)
    loss = torch.compile(program.model.loss, dynamic=False) if compiled else program.model.loss

    def step() -> list[float]:
        tokens, targets = (part.expand(members, -1, -1) for part in draw(config.batch))
        program.set_rates(1.0)
        program.optimizer.zero_grad()
        losses = loss(tokens, targets)
        losses.sum().backward()
        program.optimizer.step()
        return losses.tolist()

    return step


def in_turn(steps: list[Step]) -> Step:
    """One step of each."""
    return lambda: [step() for step in steps]


# The usual idioms --------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """``F.rms_norm`` without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-20)


class PlainBlock(nn.Module):
    """Attention and SwiGLU with a norm before every Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, width, hidden = config.heads, config.width, config.hidden
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.norm = Norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (self.norm(w(y).unflatten(-1, (self.heads, -1))).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = (_rotated(part, cos, sin) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.wo(self.norm(mixed))
        y = self.norm(x)
        return x + self.w2(self.norm(F.silu(self.w1(y)) * self.w3(y)))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Plain(nn.Module):
    """Our model, written plainly."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.output = nn.Linear(config.width, VOCAB, bias=False)
        self.norm = Norm()
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_size, 2) / config.head_size)
        angles = torch.outer(torch.arange(CONTEXT), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), targets.flatten())


class PlainScion(torch.optim.Optimizer):
    """Scion without momentum as one would write it: one parameter after the other."""

    def __init__(self, params: list[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                g = weight.grad
                if group["kind"] == "input":
                    g = g / (g.norm(dim=1, keepdim=True) + 1e-20) * math.sqrt(g.shape[1])
                elif group["kind"] == "output":
                    g = g / (g.norm(dim=1, keepdim=True) + 1e-20) / math.sqrt(g.shape[1])
                else:
                    g = _newton_schulz(g) * math.sqrt(g.shape[0] / g.shape[1])
                weight.add_(g, alpha=-group["lr"])


def _newton_schulz(g: Tensor) -> Tensor:
    """The quintic of Jordan et al. (2024), five steps in fp32, as ours."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-20)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def plain(config: TrainConfig) -> Step:
    """A step of the plain form of our model with the plain form of Scion."""
    model = Plain(config.model)
    disco.init_(model)
    hidden = [p for block in model.blocks for p in block.parameters()]
    groups = [("input", [model.embedding.weight]), ("hidden", hidden), ("output", [model.output.weight])]
    optimizer = PlainScion([{"params": params, "kind": kind} for kind, params in groups], lr=2**-6)
    return _loop(model, [optimizer], config.batch)


def gpt(config: TrainConfig) -> Step:
    """A step of nanoGPT's model with Muon for the matrices of its blocks and AdamW for the rest."""
    width = config.model.width
    model = GPT(width, config.model.depth, config.model.heads, CONTEXT, VOCAB, width**-0.5)
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return _loop(model, [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)], config.batch)


def _loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: int) -> Step:
    def step() -> float:
        tokens, targets = draw(batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model.loss(tokens, targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    return step


# Measuring ---------------------------------------------------------------------------------------------------------


def fastest(arms: dict[str, tuple[Step, int]], seconds: float, rounds: int) -> dict[str, float]:
    """Tokens per second in the fastest step of each arm; an arm is a step and the tokens that it trains on."""
    best = dict.fromkeys(arms, math.inf)
    for step, _ in arms.values():
        step()
        step()
    for _ in range(rounds):
        for name, (step, _) in arms.items():
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.process_time()
                step()
                best[name] = min(best[name], time.process_time() - start)
    return {name: tokens / best[name] for name, (_, tokens) in arms.items()}


def peak() -> float:
    """Floating-point operations per second of a large product in fp32."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = math.inf
    for _ in range(20):
        start = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def operations(model: ModelConfig) -> float:
    """Floating-point operations of products and causal attention for a token, forward and backward."""
    weights = model.parameters(VOCAB) - VOCAB * model.width  # the look-up is none
    attention = 2 * CONTEXT * model.width * model.depth  # scores and mixtures, half of them masked
    return 6.0 * weights + 3.5 * attention  # attention's backward pass computes the scores again


def profiled(step: Step, rows: int = 10) -> list[tuple[str, float]]:
    """Operations with their share of a step's time."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(5):
            step()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [(event.key, event.self_cpu_time_total / total) for event in events[:rows]]


def base(width: int, depth: int, head: int, batch: int) -> TrainConfig:
    """A run of this size."""
    model = ModelConfig(width=width, depth=depth, head_size=head, context=CONTEXT)
    data = DataConfig(digest="random", vocab=VOCAB)
    return TrainConfig(model=model, data=data, batch=batch, horizon=batch, optimizer=OptimizerConfig(lr=2**-5))


def compare(config: TrainConfig, members: int, seconds: float, rounds: int) -> dict[str, float]:
    """Tokens per second of all arms."""
    size = min(members, largest(config, 2**33))
    sizes = [size] * (members // size) + ([members % size] if members % size else [])
    torch.compiler.reset()
    arms = {
        "cohort": (ours(config, members), members * config.batch),
        "grouped": (in_turn([ours(config, each) for each in sizes]), members * config.batch),
        "compiled": (in_turn([ours(config, each, compiled=True) for each in sizes[:1]]), sizes[0] * config.batch),
        "one by one": (ours(config, 1), config.batch),
        "plain": (plain(config), config.batch),
        "nanoGPT": (gpt(config), config.batch),
    }
    return fastest(arms, seconds, rounds)


def main() -> None:
    """Measures, prints a table in Markdown and, if asked, the profile and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each arm in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="an .html file: cost against members and size")
    parser.add_argument("--profile", action="store_true", help="where the time of the cohort goes")
    parser.add_argument("--out", type=Path, help="a .json file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    top = peak()
    print(f"{options.members} members; peak {top / 1e9:.0f} GFLOP/s\n")
    print("| width, depth | batch | over plain (goal) | compiled | over nanoGPT | over one by one | in one | of peak |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for (width, depth, head), batch in ((size, batch) for size in SIZES for batch in BATCHES):
        config = base(width, depth, head, batch)
        speed = compare(config, options.members, options.seconds, options.rounds)
        ours_ = speed["grouped"]
        programs = math.ceil(options.members / largest(config, 2**33))
        share = ours_ * operations(config.model) / top
        ratio = {name: ours_ / speed[name] for name in ("plain", "nanoGPT", "one by one")}
        goal = GOALS.get((width, batch), 1.0)
        print(
            f"| {width}, {depth} | {batch:,} | {ratio['plain']:.2f} ({goal:g}) | "
            f"{speed['compiled'] / speed['plain']:.2f} | {ratio['nanoGPT']:.2f} | {ratio['one by one']:.2f} | "
            f"{speed['cohort'] / ours_:.2f} ({programs}) | {share:.2f} |",
            flush=True,
        )
        results.append({"width": width, "depth": depth, "batch": batch, "share": share, **speed})
        if options.profile:
            size = min(options.members, largest(config, 2**33))
            print("".join(f"    {100 * part:4.1f}% {name}\n" for name, part in profiled(ours(config, size))))
    costs = members_costs(options.seconds / 2, options.rounds)
    if options.out:
        options.out.write_text(json.dumps({"arms": results, "costs": costs}, indent=1) + "\n")
    if options.plot:
        picture(results, costs, options.plot)


def members_costs(seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Time per token by the number of members, over that of a run alone, for each size at small batches."""
    costs = []
    for width, depth, head in SIZES:
        for batch in BATCHES[:2]:
            config = base(width, depth, head, batch)
            arms = {str(count): (ours(config, count), count * batch) for count in MEMBERS}
            speed = fastest(arms, seconds, rounds)
            cost = [speed["1"] / speed[str(count)] for count in MEMBERS]
            name = f"width {width}, depth {depth}, batch {batch:,}"
            print(f"{name}: time per token over that of a run alone, {MEMBERS} members:", [round(c, 2) for c in cost])
            costs.append({"name": name, "cost": cost})
    return costs


def picture(results: list[dict[str, Any]], costs: list[dict[str, Any]], path: Path) -> None:
    """Cost against members (left) and against model size (right), as a page."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("a token of a cohort", "a token of a 16-member sweep"))
    for item in costs:
        figure.add_scatter(x=MEMBERS, y=item["cost"], name=item["name"], mode="lines+markers", row=1, col=1)
    for batch, dash in zip(BATCHES, ("solid", "dash", "dot"), strict=True):
        for arm in ("grouped", "compiled", "plain"):
            own = [item for item in results if item["batch"] == batch]
            cost = [1e6 / item[arm] for item in own]
            figure.add_scatter(
                x=[operations(base(*size, batch).model) / 1e6 for size in SIZES], y=cost,
                name=f"{arm}, batch {batch:,}",
                mode="lines+markers", line={"dash": dash, "color": COLOURS[arm]}, row=1, col=2,
            )  # fmt: skip
    figure.update_xaxes(type="log", title="members", tickvals=MEMBERS, row=1, col=1)
    figure.update_yaxes(title="time over that of a run alone", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(type="log", title="million operations per token", dtick=1, row=1, col=2)
    figure.update_yaxes(type="log", title="microseconds", dtick=1, row=1, col=2)
    figure.update_layout(template="plotly_white", width=1200, height=560)
    figure.write_html(path, config={"displayModeBar": False})


if __name__ == "__main__":
    main()
