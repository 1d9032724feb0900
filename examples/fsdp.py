"""FSDP2 with disco.Disco: torchrun --nproc-per-node 2 examples/fsdp.py

The optimizer is built after the model is sharded; nothing else differs from one device.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import disco

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
vocabulary, width = 64, 64
model = nn.Sequential(
    nn.Embedding(vocabulary, width),
    nn.Linear(width, 4 * width),
    nn.ReLU(),
    nn.Linear(4 * width, width),
    nn.Linear(width, vocabulary),
)
disco.init_(model)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

optimizer = disco.Disco(disco.param_groups(model, lr=2**-4, ratios={"hidden": 1 / 4}), momentum=0.9)
if dist.get_rank() == 0:
    print(optimizer.describe())
generator = torch.Generator().manual_seed(dist.get_rank())
for step in range(101):
    tokens = torch.randint(vocabulary, (128,), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens), (tokens * 7 + 3) % vocabulary)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 25 == 0:
        norms = optimizer.norms()  # a collective: every rank calls it
        if dist.get_rank() == 0:
            print(f"step {step}  loss {loss.item():.4f}  output norm {norms['4.weight']:.3f}")
dist.barrier()
dist.destroy_process_group()
