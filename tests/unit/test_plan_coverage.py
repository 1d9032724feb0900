"""A small fixed-seed form of benchmarks/coverage/plan.py: on known truth the plan's intervals cover."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.coverage import plan as benchmark


def test_intervals_of_the_plan_cover() -> None:
    """Six studies of three shapes, three horizons each: far too few to tell 85% from 95%, enough to tell 60%."""
    settings = [benchmark.Setting("octaves", shape, 0.006) for shape in benchmark.SHAPES[:3]]
    tally = benchmark.run(6, 100, seed=11, settings=settings, write=False)
    for name in (
        "best batch", "learning rate at the planned batch", "learning rate at a given batch", "optimal norm",
        "norm of the run, at the end",
    ):  # fmt: skip
        assert sum(each.covered is not None for each in tally.outcomes[name, "all"]) >= 15
        assert tally.covered(name) >= 0.85
    expected, lost = (sum(pair[i] for pair in tally.costs["all"]) for i in (0, 1))
    assert 0.5 < expected / lost < 5
