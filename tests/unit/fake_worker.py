"""A worker whose training is a record of two lines, or the trouble that a run's seed asks for. No torch.

seed 0: finishes   1: raises   2: is killed in its first two attempts   3: is always killed   4: diverges at half
5: waits until told to stop   6: the worker cannot start   7: cannot start, and says so
8: finds the disk full in its first attempt
"""

import os
import signal
import sys
import time
from pathlib import Path

from disco.errors import NoSpaceError, UserError
from disco.runs.lock import LOCK, locked
from disco.runs.schema import SCHEMA_VERSION, Outcome
from disco.runs.writer import RunWriter
from disco.sweep.worker import Ended, Progress, serve
from disco.train.config import TrainConfig, to_dict


def train(configs: list[TrainConfig], runs: Path, progress: Progress, ended: Ended, compiled: bool) -> None:
    (runs / "cohorts.log").open("a").write(" ".join(config.id for config in configs) + "\n")
    for config in configs:
        ended(config.id, train_one(config, runs, progress))


def train_one(config: TrainConfig, runs: Path, progress: Progress) -> Outcome | UserError:
    folder = runs / config.id
    with locked(folder / LOCK, wait=5.0), RunWriter(folder) as writer:
        writer.start(
            {"schema": SCHEMA_VERSION, "id": config.id, "config": to_dict(config), "parameters": 1, "groups": {}}
        )
        with (folder / "attempts").open("a") as file:
            file.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {time.monotonic()}\n")
        attempts = len((folder / "attempts").read_text().splitlines())
        writer.append({"step": 0, "tokens": 0})
        if config.seed == 1:
            raise ValueError("the loss has the wrong shape\nand more")
        if config.seed == 8 and attempts == 1:
            raise NoSpaceError(f"cannot write {folder}: No space left on device")
        if config.seed == 7:
            return UserError("its checkpoint is damaged")
        if config.seed == 3 or (config.seed == 2 and attempts <= 2):
            os.kill(os.getpid(), signal.SIGKILL)
        while config.seed == 5:
            progress(1, config.batch)
            time.sleep(0.01)
        tokens = config.horizon // (2 if config.seed == 4 else 1)
        print("a library prints something")
        progress(tokens // config.batch, tokens)
        writer.append({"step": tokens // config.batch, "tokens": tokens})
        outcome = Outcome.DIVERGED if config.seed == 4 else Outcome.FINISHED
        writer.finish(outcome, tokens=tokens)
        return outcome


if __name__ == "__main__":
    if "broken" in sys.argv:
        sys.exit("no such library")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    serve(train, sys.stdin.buffer, replies)
