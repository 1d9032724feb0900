"""A loop of your own with Disco: groups found from the modules, norms and losses in a record for ``disco fit``.

python examples/plain_loop.py [RUNS]
"""

import sys
from pathlib import Path

import torch
from torch import nn

import disco
from disco.integrations import Recorder

BATCH, STEPS = 256, 100  # tokens, optimizer steps
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/plain") / "toy-0.0625-256"

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
disco.init_(model)  # weights of norm 1

groups = disco.param_groups(model, lr=2**-4, ratios={"hidden": 1 / 8})
print(groups.describe(), "\n")


def loss_of(tokens: torch.Tensor) -> torch.Tensor:
    """The next token is a function of this one."""
    return nn.functional.cross_entropy(model(tokens), (tokens * 5 + 3) % 64)


optimizer = disco.Disco(groups, momentum=0.9)
recorder = Recorder(folder, optimizer, batch=BATCH, horizon=STEPS * BATCH, model={"name": "toy"})
for step in range(1, STEPS + 1):
    loss = loss_of(torch.randint(64, (BATCH,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if recorder.due(step):  # where disco fit looks
        with torch.no_grad():
            recorder.record(step, loss=loss.item(), valid=loss_of(torch.arange(64)).item())
        print(f"step {step:3d}  loss {loss.item():.3f}  output norm {recorder.norms['norm/output/rms_to_inf']:.2f}")
recorder.finish()
print(f"\nrecord: {folder}")
