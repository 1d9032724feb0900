"""What does it cost to log the assigned norm of every layer at every step?

    python benchmarks/norm_logging.py --width 256 --depth 4 --tokens 8192

Trains the norm-everywhere model on random bytes with ``disco.Disco`` in one process with one thread, and measures all
norms after every step. Both are timed in turn, by CPU time (``time.process_time``). "ms" is the minimum over steps,
"ratio" the median over steps of the time for norms over that of the step before it. The first call, which starts
without known vectors, is reported by itself. "error" is the largest relative difference of a norm from that of an SVD
in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import disco
from disco.norms import norm
from disco.train.config import ModelConfig
from disco.train.model import Llama

BYTES = 256


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def error(optimizer: disco.Disco, found: dict[str, float]) -> float:
    """The largest relative difference of the norms found from the exact ones."""
    worst = 0.0
    for group in optimizer.param_groups:
        operator = norm(group["norm"], layout=group["layout"], batch_dims=group["batch_dims"])
        for name, param in zip(group["names"], group["params"], strict=True):
            exact = float(operator.value(param.detach().double(), exact=True).max())
            worst = max(worst, abs(found[name] / exact - 1))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2**-5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Llama(ModelConfig(width=args.width, depth=args.depth, context=args.context), BYTES)
    disco.init_(model, model.init_scales())
    optimizer = disco.Disco(disco.param_groups(model, lr=args.lr), lr=args.lr, momentum=0.9)
    sequences = args.tokens // args.context

    def step() -> None:
        tokens = torch.randint(BYTES, (sequences, args.context + 1))
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()

    step()
    first, _ = timed(optimizer.norms)
    steps, norms, worst = [], [], 0.0
    for _ in range(args.steps):
        steps.append(timed(step)[0])
        seconds, found = timed(optimizer.norms)
        norms.append(seconds)
        worst = max(worst, error(optimizer, found))
    ratio = statistics.median(n / s for n, s in zip(norms, steps, strict=True))
    print(f"width {args.width}, depth {args.depth}, {args.tokens} tokens, {len(found)} norms, {args.steps} steps")
    print(f"step {1e3 * min(steps):.1f} ms  norms {1e3 * min(norms):.1f} ms  ratio {100 * ratio:.2f}%")
    print(f"first call {1e3 * first:.1f} ms, {100 * first / min(steps):.2f}% of a step  error {worst:.1e}")


if __name__ == "__main__":
    main()
