"""What a run computes: initial state, determinism, exact resume, divergence, decay branches, the golden run."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import disco.groups
from disco.errors import UserError
from disco.groups import init_
from disco.norms import OneToRms, RmsToInf, RmsToRms
from disco.runs.horizons import window
from disco.runs.reader import Run, read_run
from disco.runs.schema import Outcome, deterministic
from disco.train.calibrate import tokens_per_second
from disco.train.cohort import build_optimizer
from disco.train.config import GROUPS, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from disco.train.data import TokenStream, prepare
from disco.train.loop import train
from disco.train.model import Llama

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
        measured = {key for key in mine if key.startswith("loss/") and not key.endswith("_count")}
        assert mine["step"] == other["step"]
        assert measured == {key for key in other if key.startswith("loss/") and not key.endswith("_count")}
        assert measured
        assert all(mine[key] != other[key] for key in measured)


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


def small(text: str, **changes: Any) -> TrainConfig:
    """Runs of a few hundred steps in a second."""
    changes = {"horizon": 260 * 32, "batch": 32} | changes
    return config(text, model=ModelConfig(width=8, depth=1, head_size=8, context=32), **changes)


@pytest.fixture(scope="module")
def undisturbed(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    _, _, prepared = run(folder, small(text))
    return {line["step"]: line for line in lines(folder, prepared)}


@pytest.mark.parametrize("steps", [180, 181, 255])
def test_any_horizon_continues_and_only_appends(
    text: str, tmp_path: Path, undisturbed: dict[int, dict[str, Any]], steps: int
) -> None:
    run(tmp_path, small(text, horizon=steps * 32))
    _, _, prepared = run(tmp_path, small(text))
    grown = {line["step"]: line for line in lines(tmp_path, prepared)}
    assert undisturbed.keys() <= grown.keys()
    for step, line in undisturbed.items():
        own = step in window(steps)  # the shorter run's own horizon has a held-out loss there
        assert line == {key: value for key, value in grown[step].items() if key in line or not own}, step
    assert undisturbed[256]["loss/train_count"] == 4


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


@pytest.mark.parametrize("orthogonalize", ["svd", "newton_schulz", "polar_express"])
@pytest.mark.parametrize("horizon", [2, STEPS])
def test_a_loss_that_is_not_finite_ends_the_run(text: str, tmp_path: Path, orthogonalize: Any, horizon: int) -> None:
    muon = OptimizerConfig(name="muon", lr=1.9e38, momentum=0.9, orthogonalize=orthogonalize)
    outcome, record, _ = run(tmp_path, config(text, optimizer=muon, horizon=horizon * BATCH))
    assert outcome == Outcome.DIVERGED
    assert record.summary is not None
    assert (record.summary["step"], record.summary["tokens"]) == (2, 2 * BATCH)
    assert record.summary["reason"] == f"{'held-out' if horizon == 2 else 'training'} loss nan at step 2"
    assert record.column("step").tolist() == [0, 1, 2]
    assert math.isnan(record.column("loss/valid")[2])


def test_a_damaged_checkpoint_is_passed_over_and_said(text: str, tmp_path: Path) -> None:
    """The run goes on from the checkpoint before, to the same record; the damage is in its summary."""
    chosen = small(text, horizon=24 * 32)
    _, _, prepared = run(tmp_path / "whole", chosen)
    for name in ("one", "both"):
        run(tmp_path / name, replace(chosen, horizon=12 * 32, checkpoint_seconds=1e-9))
        latest = tmp_path / name / prepared.id / "checkpoints" / "latest.pt"
        latest.write_bytes(latest.read_bytes()[:-100])
    steps: list[int] = []
    with pytest.warns(UserWarning, match=r"latest\.pt is damaged \(BadZipFile\), now latest\.pt\.damaged: went on"):
        train(prepared, tmp_path / "one", lambda step, tokens: steps.append(step))
    assert steps[0] == 12
    assert lines(tmp_path / "one", prepared)[-1] == lines(tmp_path / "whole", prepared)[-1]
    summary = read_run(tmp_path / "one" / prepared.id).summary
    assert summary is not None
    assert len(summary["notes"]) == 1
    (tmp_path / "both" / prepared.id / "checkpoints" / "previous.pt").write_bytes(b"?")
    with pytest.raises(UserError, match=r"previous\.pt is damaged \(BadZipFile\); delete it to start the run over"):
        train(prepared, tmp_path / "both")


def test_repeated_text_is_recorded(text: str, tmp_path: Path) -> None:
    once = small(text)
    prepared = replace(once, data=prepare(once.data, tmp_path / "data"))
    tokens = TokenStream(prepared.data, tmp_path / "data", context=32, seed=0).train_tokens
    steps = round(1.5 * tokens / 2048)
    longer = replace(prepared, batch=2048, horizon=steps * 2048)
    with pytest.raises(UserError, match="without repeating"):
        train(longer, tmp_path)
    again = replace(longer, data=replace(prepared.data, repeat=2))
    assert train(again, tmp_path) == Outcome.FINISHED
    assert train(prepared, tmp_path) == Outcome.FINISHED
    summaries = [read_run(tmp_path / each.id).summary for each in (again, prepared)]
    assert summaries[0] is not None
    assert summaries[0]["passes"] == pytest.approx(1.5, abs=0.02)
    assert summaries[1] is not None
    assert "passes" not in summaries[1]


def test_what_a_killed_save_left_is_deleted(text: str, tmp_path: Path) -> None:
    _, _, prepared = run(tmp_path, small(text, horizon=64))
    folder = tmp_path / prepared.id
    left = [folder / "checkpoints" / ".latest.pt.123.tmp", folder / ".summary.json.123.tmp"]
    for file in left:
        file.touch()
    train(prepared, tmp_path)
    assert not any(file.exists() for file in left)


def test_a_branch_from_the_end_of_its_parent_needs_no_kept_checkpoint(text: str, tmp_path: Path) -> None:
    _, _, parent = run(tmp_path, small(text, horizon=48 * 32))
    branch = replace(parent, horizon=64 * 32, schedule=ScheduleConfig(decay=0.25), parent=parent.id)
    steps: list[int] = []
    assert train(branch, tmp_path, lambda step, tokens: steps.append(step)) == Outcome.FINISHED
    assert steps == list(range(49, 65))


def test_the_source_may_be_gone_once_the_tokens_are_cached(text: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(text).read_text())
    prepared = small(str(copy), horizon=64)
    prepared = replace(prepared, data=prepare(prepared.data, tmp_path / "runs" / "data"))
    copy.unlink()
    assert train(prepared, tmp_path / "runs") == Outcome.FINISHED


def test_every_line_has_the_norms_that_the_paper_compares(text: str, tmp_path: Path) -> None:
    _, _, prepared = run(tmp_path, small(text, horizon=64))
    layers = {"tok_embeddings": ("one_to_rms", "rms_to_rms", "rms_to_inf")}
    layers["output"] = ("rms_to_inf", "rms_to_rms", "one_to_rms")
    for line in lines(tmp_path, prepared):
        for layer, norms in layers.items():
            assert all(line[f"norm/weights/{norm}/{layer}"] > 0 for norm in norms)


def test_ratios_reach_the_steps() -> None:
    """An update's size is the group's learning rate: exact for rows and columns, near it for hidden matrices."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(width=16, depth=2, head_size=8, context=32), 64)
    init_(model, model.init_scales())
    optimizer = build_optimizer(model, OptimizerConfig(lr=2**-3, ratios={"hidden": 2**-3, "input": 2.0}))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tokens = torch.randint(64, (4, 33))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    moved = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    assert float(RmsToInf().value(moved["output.weight"])) == pytest.approx(2**-3, rel=1e-4)
    embeddings = OneToRms(layout="in_out").value(moved["tok_embeddings.weight"])
    assert float(embeddings) == pytest.approx(2 * 2**-3, rel=1e-4)
    hidden = RmsToRms(orthogonalize="newton_schulz")
    sizes = [float(hidden.value(move)) for name, move in moved.items() if name.startswith("layers.")]
    assert len(sizes) == 14
    assert min(sizes) > 2**-6 / 2
    assert max(sizes) <= 2**-6 * hidden.maximum * (1 + 1e-4)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_loss_at_the_start_is_that_of_guessing(text: str, tmp_path: Path, tokenizer: str) -> None:
    data = DataConfig(source=(text,), tokenizer=tokenizer, valid_tokens=512)
    _, record, chosen = run(tmp_path, config(text, data=data, horizon=BATCH))
    assert record.column("loss/valid")[0] == pytest.approx(math.log(chosen.data.vocab), rel=0.01)


def test_layer_groups_have_one_set_of_names() -> None:
    assert tuple(GROUPS) == tuple(disco.groups.GROUPS)


def test_calibration_says_why_it_failed(text: str, tmp_path: Path) -> None:
    long = small(text, batch=2**20, horizon=2**20)
    prepared = replace(long, data=prepare(long.data, tmp_path))
    with pytest.raises(UserError, match=r"speed failed \(exit code 1\): .*UserError: step 0 of 1,048,576 tokens ends"):
        tokens_per_second([[prepared]], tmp_path, workers=1)


@pytest.mark.parametrize("kept", [True, False])
def test_decay_branch_equals_a_run_with_the_same_schedule(text: str, tmp_path: Path, kept: bool) -> None:
    parent = config(text, horizon=56 * BATCH, keep=(48 * BATCH,) if kept else ())
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
    for line in branched:
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
