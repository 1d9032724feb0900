"""What a run computes: initial state, determinism, exact resume, divergence, decay branches, the golden run."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disco.errors import UserError
from disco.runs.reader import Run, read_run
from disco.runs.schema import Outcome, deterministic
from disco.train.config import DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from disco.train.data import prepare
from disco.train.loop import train

STEPS = 64
BATCH = 128


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text that can be learned but not at once: pseudo-random sums, spelled out."""
    path = tmp_path_factory.mktemp("data") / "sums.txt"
    numbers = [(7919 * i * i + 104729 * i) % 997 for i in range(6000)]
    path.write_text("\n".join(f"{a} and {b} make {a + b}." for a, b in itertools.pairwise(numbers)))
    return str(path)


def config(text: str, **changes: Any) -> TrainConfig:
    settings = {
        "model": ModelConfig(width=16, depth=2, head_size=8, context=32),
        "data": DataConfig(source=(text,), valid_tokens=512),
        "optimizer": OptimizerConfig(lr=2**-3),
        "batch": BATCH,
        "horizon": STEPS * BATCH,
    }
    return TrainConfig(**(settings | changes))


def run(folder: Path, chosen: TrainConfig) -> tuple[Outcome, Run, TrainConfig]:
    prepared = replace(chosen, data=prepare(chosen.data, folder / "data"))
    outcome = train(prepared, folder)
    return outcome, read_run(folder / prepared.id), prepared


def lines(folder: Path, chosen: TrainConfig) -> list[dict[str, Any]]:
    text = (folder / chosen.id / "metrics.jsonl").read_text()
    return [deterministic(json.loads(line)) for line in text.splitlines()]


def test_initial_norms_and_loss(text: str, tmp_path: Path) -> None:
    _, record, _ = run(tmp_path, config(text))
    start = {key: column[0] for key, column in record.metrics.items()}
    assert start["loss/valid"] == pytest.approx(math.log(256), rel=0.01)
    assert start["norm/weights/one_to_rms/tok_embeddings"] == pytest.approx(1, rel=1e-5)
    assert start["norm/weights/rms_to_inf/output"] == pytest.approx(1, rel=1e-5)
    for layer in (0, 1):
        for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"):
            assert start[f"norm/weights/rms_to_rms/layers.{layer}.{name}"] == pytest.approx(1, rel=1e-4)
        for name in ("attention.wo", "feed_forward.w2"):
            assert start[f"norm/weights/rms_to_rms/layers.{layer}.{name}"] == pytest.approx(0.5, rel=1e-4)  # 1/sqrt(2L)


def test_norms_grow_by_at_most_the_path(text: str, tmp_path: Path) -> None:
    _, record, _ = run(tmp_path, config(text))
    path, output = record.column("path"), record.norm("output", "rms_to_inf")
    np.testing.assert_allclose(path, record.column("step") * 2**-3)
    assert (output <= output[0] + path * (1 + 1e-5)).all()  # the LMO of row norms is exact
    hidden = record.norm("hidden", "rms_to_rms")
    assert (hidden <= hidden[0] + path * 1.2024).all()  # Newton-Schulz's stated maximum
    assert output[-1] > 1.5


def test_same_config_gives_the_same_bits_and_another_seed_does_not(text: str, tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, _, prepared = run(tmp_path / name, config(text, seed=seed))
        results.append(lines(tmp_path / name, prepared))
    assert results[0] == results[1]
    for mine, other in zip(results[0], results[2], strict=True):
        assert mine.get("loss/valid", 0.0) != other.get("loss/valid", 1.0)


@pytest.mark.parametrize("name", ["scion", "adamw", "muon"])
def test_interrupted_anywhere_resumes_bit_for_bit(text: str, tmp_path: Path, name: str) -> None:
    momentum = 0.0 if name == "adamw" else 0.9
    chosen = config(text, optimizer=OptimizerConfig(name=name, lr=2**-6, momentum=momentum))
    _, _, prepared = run(tmp_path / "whole", chosen)

    class InterruptedRunError(Exception):
        pass

    def stop_at(step: int) -> Any:
        def progress(now: int, tokens: int) -> None:
            assert tokens == now * BATCH
            if now == step:
                raise InterruptedRunError

        return progress

    for step in (1, 17, 18, 62, 63):
        with pytest.raises(InterruptedRunError):
            train(prepared, tmp_path / "cut", stop_at(step))
    assert train(prepared, tmp_path / "cut") == Outcome.FINISHED
    assert lines(tmp_path / "cut", prepared) == lines(tmp_path / "whole", prepared)


def test_longer_horizon_continues_and_only_appends(text: str, tmp_path: Path) -> None:
    short = config(text, horizon=32 * BATCH)
    run(tmp_path / "grown", short)
    calls: list[int] = []
    long = replace(config(text), data=prepare(short.data, tmp_path / "grown" / "data"))
    assert train(long, tmp_path / "grown", lambda step, tokens: calls.append(step)) == Outcome.FINISHED
    assert calls == list(range(33, 65))
    run(tmp_path / "straight", long)
    grown = {line["step"]: line for line in lines(tmp_path / "grown", long)}
    for line in lines(tmp_path / "straight", long):
        assert line == grown[line["step"]]


def test_finished_run_is_not_trained_again(text: str, tmp_path: Path) -> None:
    _, _, prepared = run(tmp_path, config(text))

    def never(step: int, tokens: int) -> None:
        raise AssertionError("trained")

    assert train(prepared, tmp_path, never) == Outcome.FINISHED
    assert train(replace(prepared, horizon=BATCH), tmp_path, never) == Outcome.FINISHED


def test_explosion_is_a_result(text: str, tmp_path: Path) -> None:
    wild = config(text, optimizer=OptimizerConfig(name="adamw", lr=1e20, weight_decay=0.5))
    outcome, record, _ = run(tmp_path, wild)
    assert outcome == Outcome.DIVERGED
    assert record.summary is not None
    assert record.summary["outcome"] == "diverged"
    assert "training loss" in record.summary["reason"]
    assert record.summary["step"] <= 25


@pytest.mark.parametrize("kept", [True, False])
def test_decay_branch_equals_a_run_with_the_same_schedule(text: str, tmp_path: Path, kept: bool) -> None:
    parent = config(text, horizon=48 * BATCH, keep=(48 * BATCH,) if kept else ())
    _, _, parent = run(tmp_path, parent)
    branch = replace(parent, horizon=STEPS * BATCH, schedule=ScheduleConfig(decay=0.25), parent=parent.id, keep=())
    steps: list[int] = []
    assert train(branch, tmp_path, lambda step, tokens: steps.append(step)) == Outcome.FINISHED
    assert steps[0] == (49 if kept else 1)
    whole = replace(branch, parent=None)
    assert train(whole, tmp_path) == Outcome.FINISHED
    branched = lines(tmp_path, branch)
    assert branched[0]["step"] > 48
    straight = {line["step"]: line for line in lines(tmp_path, whole)}
    for line in branched[1:]:
        assert line == straight[line["step"]]
    assert branched[-1]["lr/hidden"] == pytest.approx(2**-3 / 16)  # linear: the last of 16 steps has 1/16 of the rate
    record = read_run(tmp_path / branch.id)
    assert record.summary is not None
    assert record.summary["parent"] == parent.id


def test_corpus_too_short_is_said_before_training(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"horizon of 1,048,576 tokens is longer than the data"):
        train(config(text, horizon=2**20), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != "data"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelConfig(width=16, depth=2, head_size=8, context=32, placement="none")},
        {"model": ModelConfig(width=32, depth=1, head_size=8, context=32, kv_heads=2, residual="completep")},
        {"model": ModelConfig(width=16, depth=3, head_size=8, context=32, depth_init="relative")},
        {"optimizer": OptimizerConfig(name="adam", lr=2**-8, betas=(0.0, 0.0))},
        {"optimizer": OptimizerConfig(name="muon", lr=2**-6, momentum=0.9, nesterov=True)},
        {"optimizer": OptimizerConfig(lr=2**-4, ratios={"hidden": 0.125}, weight_decay=0.1)},
        {"schedule": ScheduleConfig(warmup=16 * BATCH, decay=0.5)},
        {"data": "bpe"},
        pytest.param({"compile": True}, marks=pytest.mark.full),
    ],
)
def test_variants_learn(text: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes.get("data") == "bpe":
        changes = {"data": DataConfig(source=(text,), tokenizer="bpe:300", valid_tokens=512)}
    outcome, record, chosen = run(tmp_path, config(text, **changes))
    assert outcome == Outcome.FINISHED
    loss = record.column("loss/valid")
    assert loss[0] == pytest.approx(math.log(chosen.data.vocab), rel=0.02)
    assert loss[-1] < loss[0] - 0.8


GOLDEN = {
    # step: (training loss, rms_to_inf of the output, largest hidden rms_to_rms)
    1: (5.502745628356934, 1.0816854238510132, 1.1254972219467163),
    4: (4.854437351226807, 1.3512016534805298, 1.3365778923034668),
    8: (4.045544624328613, 1.7983089685440063, 1.6037575006484985),
    16: (2.877190589904785, 2.6792004108428955, 1.9319932460784912),
}


def test_golden_trajectory(text: str, tmp_path: Path) -> None:
    """A change here changes results: CHANGELOG.md says which and why."""
    _, record, _ = run(tmp_path, config(text, optimizer=OptimizerConfig(lr=2**-3, momentum=0.5, weight_decay=0.05)))
    columns = (
        record.column("step"),
        record.column("loss/train"),
        record.norm("output", "rms_to_inf"),
        record.norm("hidden", "rms_to_rms"),
    )
    got = {int(step): values for step, *values in zip(*columns, strict=True)}
    for step, expected in GOLDEN.items():
        assert got[step] == pytest.approx(expected, rel=1e-5), step
