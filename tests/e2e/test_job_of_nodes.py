"""A job of two nodes, both of them this machine: told to stop, started again, and the record of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from disco.runs.reader import read_run
from disco.runs.schema import CHECKPOINTS, DATA, Metric
from disco.train.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig, to_dict
from disco.train.data import prepare
from disco.train.loop import train

pytestmark = pytest.mark.full
SECONDS = 300.0
CODE = """
import pathlib, sys
from disco.sweep.engines.task import perform
sys.exit(bool(perform(pathlib.Path(sys.argv[1]), node=int(sys.argv[2]), rendezvous=sys.argv[3:])))
"""
"""Exit code 1 if a signal stopped it."""


def start(order: Path) -> list[subprocess.Popen[bytes]]:
    """The launchers of the two nodes, as srun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meet = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(order), str(node), *meet, f"--node-rank={node}"], env=environment
        )
        for node in range(2)
    ]


def test_two_nodes_train_one_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = prepare(DataConfig(valid_tokens=1024), out / DATA)
    model = ModelConfig(width=16, depth=1, head_size=8, context=64)
    alone = TrainConfig(model=model, data=data, batch=256, horizon=2**14, checkpoint_seconds=0.2)
    config = replace(alone, parallel=ParallelConfig(replicate=2))
    order = tmp_path / "disco-1.0.json"
    shape = {"threads": 1, "processes": 1, "nodes": 2}
    order.write_text(json.dumps({"configs": [to_dict(config)], "runs": str(out), "compiled": False} | shape))
    nodes = start(order)
    deadline = time.monotonic() + SECONDS
    while not list((out / config.id).glob(f"{CHECKPOINTS}/latest-*")):
        assert time.monotonic() < deadline
        assert [node.poll() for node in nodes] == [None, None], order.with_suffix(".log").read_text()
        time.sleep(0.05)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    assert [node.wait(SECONDS) for node in nodes] == [1, 1]
    assert read_run(out / config.id).outcome is None
    assert [node.wait(SECONDS) for node in start(order)] == [0, 0]
    said = [json.loads(line)["event"] for line in order.with_suffix(".jsonl").read_text().splitlines()]
    assert [event for event in said if event != "progress"] == ["ready", "stopped", "ready", "ended", "done"]
    assert order.with_suffix(".1.log").exists()
    train(alone, tmp_path / "alone")
    here, there = read_run(out / config.id), read_run(tmp_path / "alone" / config.id)
    assert here.outcome == there.outcome == "finished"
    for metric in (Metric.LOSS_TRAIN, Metric.LOSS_VALID):
        assert here.column(metric) == pytest.approx(there.column(metric), rel=1e-4, nan_ok=True)
