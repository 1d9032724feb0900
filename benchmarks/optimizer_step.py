"""What does one step cost? Disco, Scion, torch.optim.Muon and other projects' optimizers side by side.

    python benchmarks/optimizer_step.py --peers FOLDER --ranks 1 2 4 --json results.json

FOLDER holds checkouts named as ``--help`` lists them at its end; ``--peer NAME=PATH`` gives one. The same parameters
and gradients for all, float32, one thread in each process, each optimizer in processes of its own. Layouts: one process
(single), replicas (ddp), and DTensors in Shard(0) as FSDP2 keeps them (fsdp). An optimizer runs in the layouts that its
documentation names; replicas that do not share the work cost what one process does and are left out.

How it is measured: all optimizers of a layout and number of ranks are alive at a time and step in turn while the others
idle, in ``--rounds`` rounds after two steps to warm up. CPU time is ``time.process_time``; wall time starts after a
barrier; of both the largest of the ranks counts. "ms" is the minimum over rounds. "x best" and "x floor" are medians
over rounds of the ratio, within a round, to the best peer (the one with the least CPU time) and to the floors: the
matrix products of the standard quintic alone, spread over the ranks (``problem.floor``), and those of the forms that
Disco takes (``problem.own_floor``). torch.compile is off unless
``--compile``; on a CPU it brings little but to dion, and not every peer can do it.

* extra: peak of resident memory during a step beyond parameters, gradients and optimizer state, over the bytes of this
  rank's parameters, the largest of the ranks; in processes of its own (``counters.extra_memory``). Buffers kept between
  steps count. Good to 1 MB, so not for ``--small``.
* sent: elements that leave a rank in a step, in millions, the largest of the ranks; ``counters.SentElements`` has the
  convention.
* error: ||D - U V^T|| / ||U V^T|| (Frobenius) of the first update D, its documented scale and learning rate divided out
  and nothing fitted, for Gaussian 256 x 1024 and 512 x 512, and for 512 x 512 with singular values from 1 to 1e-3.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import ADAPTERS, OURS
from peers.cases import Case

MODEL, SMALL = {"layers": 8, "width": 512}, {"layers": 2, "width": 128}
HEADER = ("optimizer", "CPU ms", "x best", "x floor", "x own floor", "wall ms", "x best", "extra", "sent M", "error")
RATIOS = ("cpu_over_best_peer", "cpu_over_floor", "cpu_over_own_floor")
LOG = 4000
"""Characters kept of what a failed optimizer wrote to standard error."""
WARM_UP = 2
"""Steps before the first round."""


def adapter(name: str) -> Any:
    """The module of an optimizer."""
    return importlib.import_module(f"peers.{ADAPTERS[name]}")


def run(cases: Sequence[Case], rounds: int, config: Mapping[str, Any]) -> None:
    """Measures the cases one after the other, then lets them step in turn, and ends them."""
    try:
        for case in cases:
            case.measure(config)
        for case in cases:
            case.build(config, WARM_UP)
        for index in range(rounds):
            turn = index % len(cases)
            for case in [*cases[turn:], *cases[:turn]]:
                case.step(index + 1)
    finally:
        for case in cases:
            case.stop()


def best_peer(cases: Sequence[Case]) -> Case | None:
    """The peer with the least CPU time."""
    peers = [case for case in cases if case.name not in OURS and case.seconds["cpu"] and case.failure is None]
    return min(peers, key=lambda case: min(case.seconds["cpu"]), default=None)


def ratio(case: Case, other: Case | None, kind: str) -> float | None:
    """Median over rounds of the times of ``case`` over those of ``other`` in the same round."""
    if other is None or case.failure is not None or other.failure is not None:
        return None
    pairs = zip(case.seconds[kind], other.seconds[kind], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Results of one layout and number of ranks, the fastest first, failures last."""
    best = best_peer(cases)
    floor, own_floor = (next((case for case in cases if case.name == name), None) for name in ("floor", "own-floor"))
    result = []
    for case in cases:
        module = adapter(case.name)
        row = {"name": case.name, "how": module.LAYOUTS[case.layout], "settings": module.SETTINGS}
        if case.failure is not None:
            row |= {"failure": case.failure, "log": case.log[-LOG:]}
        else:
            row |= {
                "cpu_ms": 1e3 * min(case.seconds["cpu"]),
                "wall_ms": 1e3 * min(case.seconds["wall"]),
                "cpu_over_best_peer": ratio(case, best, "cpu"),
                "wall_over_best_peer": ratio(case, best, "wall"),
                "cpu_over_floor": ratio(case, floor, "cpu"),
                "cpu_over_own_floor": ratio(case, own_floor, "cpu"),
                "polar_error": case.errors,
                "seconds": case.seconds,
                **case.costs,
            }
        result.append(row)
    return sorted(result, key=lambda row: row.get("cpu_ms", float("inf")))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as text."""
    lines = [HEADER]
    for row in results:
        if "failure" in row:
            lines.append((row["name"], f"failed: {row['failure']}", *[""] * (len(HEADER) - 2)))
            continue
        numbers = [_number(row[key], 2) for key in RATIOS]
        wall = _number(row["wall_over_best_peer"], 2)
        errors = " ".join(f"{name} {value:.3f}" for name, value in row["polar_error"].items())
        costs = [_number(row["extra"], 2), _number(row["sent"] / 1e6, 3)] if row["polar_error"] else ["", ""]
        lines.append((row["name"], f"{row['cpu_ms']:.1f}", *numbers, f"{row['wall_ms']:.1f}", wall, *costs, errors))
    failed = {index for index, line in enumerate(lines) if line[1].startswith("failed")}
    kept = [line for index, line in enumerate(lines) if index not in failed]
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    widths[0] = max(len(line[0]) for line in lines)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, len(HEADER) - 1) or index in failed else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for index, line in enumerate(lines)
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def notes(names: Sequence[str]) -> str:
    """How each optimizer was run."""
    lines = []
    for name in names:
        lines.append(f"{name}: {adapter(name).SETTINGS}")
        lines += [f"    {layout}: {how}" for layout, how in adapter(name).LAYOUTS.items()]
    return "\n".join(lines)


def _checkouts(options: argparse.Namespace) -> dict[str, str]:
    known = sorted({folder for name in ADAPTERS for folder in adapter(name).FOLDERS})
    found = {}
    if options.peers is not None:
        found = {name: str(options.peers / name) for name in known if (options.peers / name).is_dir()}
    for item in options.peer:
        name, _, path = item.partition("=")
        if name not in known or not Path(path).is_dir():
            raise SystemExit(f"--peer takes NAME=PATH with NAME one of {', '.join(known)}; got {item!r}")
        found[name] = path
    return {name: str(Path(path).resolve()) for name, path in found.items()}


def _parse() -> argparse.Namespace:
    checkouts = "\n".join(f"  {name:20}needs {' and '.join(adapter(name).FOLDERS) or 'nothing'}" for name in ADAPTERS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"optimizers, and the checkouts they need:\n{checkouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", type=Path, help="folder of checkouts")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="one checkout; repeatable")
    parser.add_argument("--only", nargs="+", choices=list(ADAPTERS), help="these optimizers; default all that can run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layouts", nargs="+", choices=["single", "ddp", "fsdp"], default=["single", "ddp", "fsdp"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="2 layers of width 128: seconds, for tests")
    parser.add_argument("--compile", action="store_true", help="time peers with torch.compile where they use it")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that an answer may take")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args()
    if options.rounds < 1 or min(options.ranks) < 1:
        parser.error("--rounds and --ranks must be 1 or more")
    return options


def main() -> None:
    options = _parse()
    folders = _checkouts(options)
    names = [
        name
        for name in ADAPTERS
        if name in (options.only or ADAPTERS) and all(folder in folders for folder in adapter(name).FOLDERS)
    ]
    left_out = [name for name in options.only or ADAPTERS if name not in names]
    if left_out:
        print(f"no checkout given, left out: {', '.join(left_out)}")
    config = {**(SMALL if options.small else MODEL), "folders": folders}
    config |= {key: getattr(options, key) for key in ("small", "compile", "timeout")}
    record: dict[str, Any] = {
        "settings": {**config, "folders": sorted(folders), "rounds": options.rounds, "optimizers": names},
        "machine": {
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "results": [],
    }
    for ranks in options.ranks:
        for layout in options.layouts:
            if (layout == "single") != (ranks == 1):
                continue
            cases = [Case(name, layout, ranks) for name in names if layout in adapter(name).LAYOUTS]
            run(cases, options.rounds, config)
            results = rows(cases)
            best = best_peer(cases)
            print(f"\n{layout}, {ranks} rank{'s' * (ranks > 1)}; best peer: {best.name if best else 'none'}")
            print(table(results), flush=True)
            record["results"].append(
                {"layout": layout, "ranks": ranks, "best_peer": best and best.name, "optimizers": results}
            )
            if options.json:
                options.json.write_text(json.dumps(record, indent=1))
    print(f"\n{notes(names)}")


if __name__ == "__main__":
    main()
