"""One rank of one optimizer, in a process of its own: builds it, then steps when told.

Started by ``cases.Case`` with its configuration as JSON in the last argument. Commands come as lines on standard input,
answers go as lines of JSON to the original standard output; whatever else is printed goes to standard error.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from peers import ADAPTERS, Built, World, problem
from peers.counters import SentElements, extra_memory, state_bytes


class Worker:
    """Answers commands; see the methods without underscore, whose docstrings say what they return."""

    def __init__(self, config: dict[str, Any], world: World) -> None:
        self._config, self._world = config, world
        self._adapter = importlib.import_module(f"peers.{ADAPTERS[config['name']]}")
        shapes = problem.model_shapes(config["layers"], config["width"])
        self._weights = problem.place(shapes, world)
        problem.set_gradients(self._weights, seed=0)

    def costs(self) -> dict[str, Any]:
        """Bytes of parameters and of extra memory, and elements sent in a step by operation; all of this rank."""
        extra = extra_memory(lambda: self._build(self._weights, lr=1e-3))
        built = self._build(self._weights, lr=1e-3)
        with SentElements() as sent:
            built.step()
        return {
            "parameter_bytes": sum(problem.local(weight.param).nbytes for weight in self._weights),
            "state_bytes": state_bytes(built.optimizers),
            "extra_bytes": extra,
            "sent": dict(sent.elements),
            "collectives": dict(sent.calls),
        }

    def build(self, steps: int) -> dict[str, Any]:
        """Nothing; builds what ``step`` times, and takes ``steps`` to warm up."""
        self._built = self._build(self._weights, lr=1e-3)
        for _ in range(steps):
            self._built.step()
        return {}

    def step(self, seed: int) -> dict[str, float]:
        """CPU and wall seconds of one step, all ranks starting together."""
        problem.set_gradients(self._weights, seed)
        problem.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        self._built.step()
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}

    def errors(self) -> dict[str, float]:
        """Spectrum -> ||D - U V^T|| / ||U V^T|| (Frobenius) of the first update D of a fresh optimizer."""
        if self._adapter.scale is None:
            return {}
        result = {}
        for name, gradient in problem.spectra(self._config["small"]).items():
            weights = problem.place([("layers.0.attention.wq.weight", "matrix", tuple(gradient.shape))], self._world)
            problem.copy_(weights[0].grad, gradient.float())
            self._build(weights, lr=1.0).step()
            update = -problem.full(weights[0].param.detach()).double() / self._adapter.scale(gradient.shape)
            exact = problem.polar_factor(gradient)
            result[name] = float((update - exact).norm() / exact.norm())
        return result

    def _build(self, weights: Any, lr: float) -> Built:
        return self._adapter.build(weights, self._world, lr, self._config["folders"])


def _join(config: dict[str, Any]) -> World:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{config['rendezvous']}",
        rank=config["rank"],
        world_size=config["ranks"],
        timeout=datetime.timedelta(seconds=config["timeout"]),
    )
    mesh = init_device_mesh("cpu", (config["ranks"],), mesh_dim_names=("dp_shard",))
    return World(config["layout"], config["rank"], config["ranks"], mesh)


def main() -> None:
    config = json.loads(sys.argv[-1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        worker = Worker(config, _join(config))
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            answers.write(json.dumps(getattr(worker, command)(*arguments)) + "\n")
    except Exception as error:
        traceback.print_exc()
        message = next((text for text in str(error).splitlines() if text.strip()), "")
        answers.write(json.dumps({"error": f"{type(error).__name__}: {message}"}) + "\n")
        answers.flush()
        os._exit(1)  # ranks that wait for this one would hold it back


if __name__ == "__main__":
    main()
