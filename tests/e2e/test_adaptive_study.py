"""An adaptive study through the command line: killed and started again it leaves what an undisturbed one leaves."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import children, records, run, start, write_study

from disco.sweep.adaptive.rounds import ROUNDS

AXES = "[axes]\nbatch = [64, 128]\nlr = ['2^-4', '2^-3', '2^-2']\n[adaptive]\nbudget = '2^13.8'\n"


def disco(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "disco", *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.full)])
def test_killed_and_resumed_it_leaves_the_same_journal_and_records(tmp_path: Path, kills: int) -> None:
    study = write_study(tmp_path / "study.toml", AXES, horizon=2**13, checkpoint_seconds=0.2)
    study.write_text(study.read_text().replace("valid_tokens = 1024", "valid_tokens = 256"))
    result = run(study, tmp_path / "whole", workers=1)
    assert result["finished"] >= 5
    chance = random.Random(0)
    for _ in range(kills):
        sweep = start(study, tmp_path / "out", workers=1)
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / ROUNDS).exists() and sweep.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(1, 5))
        for victim in [*children(sweep.pid), sweep.pid]:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        sweep.communicate()
    assert run(study, tmp_path / "out", workers=1)["finished"] == result["finished"]
    assert (tmp_path / "out" / ROUNDS).read_bytes() == (tmp_path / "whole" / ROUNDS).read_bytes()
    assert records(tmp_path / "out") == records(tmp_path / "whole")

    status = disco("sweep", "status", str(tmp_path / "out"))
    assert "round 1, after 0 tokens: 3 runs\n  started B=2^6: 2^-4 .. 2^-2 to D=2^11\n" in status.stdout
    assert json.loads(disco("sweep", "status", str(tmp_path / "out"), "--json").stdout)["rounds"][0]["round"] == 1
    fitted = disco("fit", str(tmp_path / "out"), "-o", str(tmp_path / "fit.json"))
    assert fitted.returncode == 0, fitted.stderr
    assert {cell["batch"] for cell in json.loads((tmp_path / "fit.json").read_text())["cells"]} <= {64, 128}
    other = write_study(tmp_path / "other.toml", AXES)
    other.write_text(other.read_text().replace('name = "tiny"', 'name = "other"'))
    refused = disco("sweep", "run", str(other), "--out", str(tmp_path / "out"))
    assert refused.returncode == 2
    held = f"{tmp_path / 'out'} holds the study 'tiny', not 'other'"
    assert refused.stderr.strip() == f"disco: error: {held}; give another --out, or the file that name"


def test_a_dry_run_says_what_may_be_run(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study.toml", AXES)
    shown = disco("sweep", "run", str(study), "--dry-run")
    *plan, expected = shown.stdout.splitlines()
    assert plan == [
        "study tiny: adaptive, at most 14.3k tokens, until the best learning rate is known to 0.35 octaves",
        "batches 2^6, 2^7, to 2^13 tokens, learning rates from 2^-4 .. 2^-2 on",
        "left to do: for the budget, 14.3k tokens",
    ]
    assert re.fullmatch(r"expected: \d+s with \d+ processes, \d\.\d GB of memory at most", expected)
