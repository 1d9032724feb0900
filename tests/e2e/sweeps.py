"""Real sweeps of tiny models through the command line, and what is deterministic in their records."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from disco.runs.schema import CONFIG, METRICS, SUMMARY, deterministic

MODEL = "model = { width = 16, depth = 1, head_size = 8, context = 64 }\ndata = { valid_tokens = 1024 }\n"


def write_study(path: Path, *lines: str, horizon: int = 2**13, checkpoint_seconds: float = 0.2) -> Path:
    """A study of a tiny model on the embedded text, with frequent checkpoints."""
    base = f"[base]\nhorizon = {horizon}\nbatch = 256\ncheckpoint_seconds = {checkpoint_seconds}\n"
    path.write_text('name = "tiny"\n' + base + MODEL + "\n".join(lines) + "\n")
    return path


def start(study: Path, out: Path, workers: int = 2) -> subprocess.Popen[str]:
    """Starts a sweep."""
    command = [sys.executable, "-m", "disco", "sweep", "run", str(study), "--out", str(out), "--workers", str(workers)]
    return subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(study: Path, out: Path, workers: int = 2) -> dict[str, Any]:
    """Runs a sweep to its end and returns its result."""
    process = start(study, out, workers)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode in (0, 1), errors
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def children(pid: int) -> list[int]:
    """Process ids of a process's children; none if it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def records(out: Path) -> dict[str, tuple[Any, list[bytes], Any]]:
    """By run id: configuration, the deterministic part of each metrics line in bytes, and the summary without times."""
    return {folder.name: _record(folder) for folder in sorted(out.iterdir()) if (folder / CONFIG).exists()}


def _record(folder: Path) -> tuple[Any, list[bytes], Any]:
    metrics = folder / METRICS
    lines = [json.loads(line) for line in metrics.read_bytes().splitlines()] if metrics.exists() else []
    summary = json.loads((folder / SUMMARY).read_bytes())
    summary.pop("wall", None)
    kept = [json.dumps(deterministic(line), sort_keys=True).encode() for line in lines]
    return json.loads((folder / CONFIG).read_bytes()), kept, summary
