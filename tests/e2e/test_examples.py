"""Every example runs and shows what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_study_plans_what_it_says() -> None:
    command = [sys.executable, "-m", "disco", "sweep", "run", EXAMPLES / "study.toml", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "20 runs" in done.stdout  # 2 batches x 5 rates, each with its decay branch
    assert "2^17 (decay from 2^16.58)" in done.stdout


def test_cluster_study_plans_what_it_says() -> None:
    command = [sys.executable, "-m", "disco", "sweep", "run", EXAMPLES / "cluster.toml", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "20 runs" in done.stdout  # 4 batches x 5 rates


@pytest.mark.parametrize(("example", "ranks"), [("fsdp.py", 2), ("tp.py", 4)])
def test_distributed_examples_learn(example: str, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, EXAMPLES / example], capture_output=True, text=True, check=True, timeout=200, env=environment
    )
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[0] > 4
    assert losses[-1] < 0.01
    assert "gram on rank" in done.stdout
