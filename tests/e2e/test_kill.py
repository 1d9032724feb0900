"""Sweeps and workers killed at random moments, and started again, leave the records of an undisturbed sweep."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from sweeps import children, records, run, start, write_study

from disco.runs.schema import CHECKPOINTS, SUMMARY

AXES = "[axes]\nlr = ['2^-4', '2^-2']\noptimizer = ['scion', {name = 'adamw', momentum = 0}]\n"
DIVERGES = "[[axes]]\nlr = ['2^8']\n"
DECAY = "[decay]\nfraction = 0.25\nat = [6144, 12288]\n"


def _kill(victims: list[int]) -> None:
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _half_done(out: Path) -> int:
    """Runs that have a checkpoint to resume from and no end."""
    return sum(not (file.parents[1] / SUMMARY).exists() for file in out.glob(f"*/{CHECKPOINTS}/latest.pt"))


def _wait_until_half_done(sweep: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 60
    while not _half_done(out) and sweep.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _disturb(study: Path, out: Path, kills: int, chance: random.Random) -> tuple[int, int]:
    """Kills the sweep, its workers, or both, ``kills`` times; fewer if it finishes before.

    Returns how often it did, and how many runs it left half done.
    """
    sweep, half_done = start(study, out), 0
    for done in range(kills):
        if chance.random() < 0.75:  # otherwise the kill may hit the start, or the time between two runs
            _wait_until_half_done(sweep, out)
            time.sleep(chance.uniform(0, 0.1))
        else:
            time.sleep(chance.uniform(0, 4))
        if sweep.poll() is not None:
            return done, half_done
        workers = children(sweep.pid)
        whom = chance.choice(["parent", "worker", "all"])
        one = chance.sample(workers, min(1, len(workers)))
        _kill({"parent": [sweep.pid], "worker": one, "all": [sweep.pid, *workers]}[whom])
        half_done += _half_done(out)
        if whom != "worker":
            sweep.communicate()
            sweep = start(study, out)  # at once, while orphans may still be alive
    _kill([sweep.pid])
    sweep.communicate()
    return kills, half_done


@pytest.mark.parametrize(
    ("kills", "seeds"), [pytest.param(4, 6, id="few"), pytest.param(20, 4, id="twenty", marks=pytest.mark.full)]
)
def test_killed_at_random_moments_the_records_are_the_same(tmp_path: Path, kills: int, seeds: int) -> None:
    grid = AXES.replace("[axes]", "[[axes]]") + f"seed = {list(range(seeds))}\n" + DIVERGES
    study = write_study(tmp_path / "study.toml", grid, DECAY, horizon=2**15, checkpoint_seconds=0.05)
    chance = random.Random(kills)
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    killed, half_done = _disturb(study, disturbed, kills, chance)
    result = run(study, disturbed)
    if result["failed"]:  # one run's worker was killed three times: it is taken up again
        result = run(study, disturbed)
    assert run(study, undisturbed) | {"out": ""} == result | {"out": ""}
    expected = records(undisturbed)
    assert {run["outcome"] for _, _, run in expected.values()} == {"finished", "diverged", "pruned"}
    assert records(disturbed) == expected
    assert killed == kills
    assert half_done >= kills / 4, "the kills must hit runs, not only the time between them"
