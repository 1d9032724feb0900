"""Scion in a loop of your own: groups found from the modules, norms of every layer as it trains."""

import torch
from torch import nn

import disco

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
disco.init_(model)  # weights of norm 1

groups = disco.param_groups(model, lr=2**-4, ratios={"hidden": 1 / 8})
print(groups.describe(), "\n")
optimizer = disco.Scion(groups, momentum=0.9)

for step in range(101):
    tokens = torch.randint(64, (256,))
    loss = nn.functional.cross_entropy(model(tokens), (tokens * 5 + 3) % 64)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        output = optimizer.norms("rms_to_inf", groups=["output"])["3.weight"]
        print(f"step {step:3d}  loss {loss.item():.3f}  output norm {output:.2f}")
