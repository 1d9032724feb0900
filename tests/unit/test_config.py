"""A configuration is one value with one run id, however its numbers are written; mistakes are one clear line."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disco.train.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    cohort_key,
    from_dict,
    number,
    to_dict,
)

DATA = DataConfig(digest="ab", vocab=256)


def numbers(*values: float) -> st.SearchStrategy[Any]:
    """Any of these numbers, as a float, as text, or as an int where it is whole."""
    return st.sampled_from([s for v in values for s in (v, str(v), *([int(v)] if v == int(v) else []))])


RATES = {"lr": numbers(1.0, 2.0, 2**-5.5), "ratios": st.fixed_dictionaries({"hidden": numbers(1.0, 0.125)})}
MOMENTUM = {"momentum": numbers(-0.0, 0.0, 0.5), "orthogonalize": st.sampled_from(["newton_schulz", "svd"])}
BETAS = {"betas": st.tuples(numbers(0.0, 0.9), numbers(0.0, 0.95)) | st.just([0, 0]), "eps": numbers(1.0, 1e-8)}
CONFIGS = st.builds(
    TrainConfig,
    model=st.builds(ModelConfig, width=numbers(64.0, 128.0), rope_theta=numbers(1.0, 1e4), kv_heads=st.none()),
    data=st.builds(DataConfig, digest=st.just("ab"), vocab=numbers(256.0), source=st.just("corpus")),
    optimizer=st.one_of(
        st.builds(OptimizerConfig, name=st.just("scion"), **RATES, **MOMENTUM),
        st.builds(OptimizerConfig, name=st.just("adam"), **RATES, **BETAS),
        st.builds(OptimizerConfig, name=st.just("muon"), weight_decay=numbers(0.0, 1.0), **RATES, **MOMENTUM, **BETAS),
    ),
    schedule=st.builds(ScheduleConfig, decay=numbers(0.0, 0.5, 1.0), warmup=numbers(0.0, 4096.0)),
    divergence=numbers(2.5, 3.0),
    seed=numbers(0.0, 7.0) | st.integers(2**53, 2**70),
    keep=st.lists(numbers(4096.0), max_size=1),
)


@settings(deadline=None)
@given(CONFIGS)
def test_the_id_survives_a_round_trip(config: TrainConfig) -> None:
    again = from_dict(TrainConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert again.id == config.id
    assert to_dict(again) == to_dict(config)


@pytest.mark.parametrize(
    ("kind", "name", "spellings"),
    [
        (OptimizerConfig, "lr", (1, 1.0, "1", "2^0")),
        (OptimizerConfig, "momentum", (0, 0.0, -0.0)),
        (OptimizerConfig, "ratios", ({}, {"hidden": 1}, {"output": "2^0"})),
        (ScheduleConfig, "decay", (0, 0.0)),
        (ScheduleConfig, "warmup", (4096, 4096.0, "2^12")),
        (ModelConfig, "rope_theta", (10000, 1e4)),
        (TrainConfig, "divergence", (3, 3.0)),
        (TrainConfig, "batch", (4096, 4096.0)),
    ],
)
def test_equal_numbers_have_one_id(kind: type, name: str, spellings: tuple[Any, ...]) -> None:
    fields = {OptimizerConfig: "optimizer", ScheduleConfig: "schedule", ModelConfig: "model"}
    ids = set()
    for value in spellings:
        part = {name: value} if kind is TrainConfig else {fields[kind]: kind(**{name: value})}
        ids.add(TrainConfig(data=DATA, **part).id)
    assert len(ids) == 1


def test_ids_of_this_version_never_change() -> None:
    assert TrainConfig(data=DATA).id == "35474720e00c"


def test_whole_numbers_are_exact_whatever_their_size() -> None:
    seeds = [2**60, 2**60 + 1]
    assert [from_dict(TrainConfig, {"seed": seed}).seed for seed in seeds] == seeds
    assert len({replace(TrainConfig(data=DATA), seed=seed).id for seed in seeds}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamw", "momentum": 0.9}, "momentum has no effect with adamw, which has betas, eps; leave it out"),
        ({"name": "adam", "nesterov": True}, "nesterov has no effect with adam, which has betas, eps; leave it out"),
        ({"name": "adam", "orthogonalize": "svd"}, "orthogonalize has no effect with adam"),
        ({"betas": (0, 0)}, "betas has no effect with scion, which has momentum, nesterov, orthogonalize; leave it"),
        ({"eps": 1e-6}, "eps has no effect with scion"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


def test_settings_at_their_defaults_are_fine() -> None:
    OptimizerConfig(name="adamw", momentum=0, orthogonalize="newton_schulz")
    OptimizerConfig(name="scion", betas=(0.9, 0.95), eps=1e-8)
    OptimizerConfig(name="muon", momentum=0.9, betas=(0, 0))


@pytest.mark.parametrize("value", ["2^5000", "0^-1", "inf", math.inf, math.nan, "nan", 10**400, True, None, [1], "x"])
def test_what_is_no_finite_number_is_one_clear_line(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'^lr must be a number such as 0\.03 or "2\^-5", got '):
        number(value, "lr")
    with pytest.raises(ConfigError, match="horizon must be"):
        TrainConfig(horizon=value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("20k", 20e3), ("3.5M", 3.5e6), ("1B", 1e9), ("1.1B", 1.1e9), ("10 b", 1e10), ("2G", 2e9), ("1T", 1e12),
     ("1_000_000", 1e6), ("1_500k", 1.5e6), ("2^30", 2.0**30), ("1e9", 1e9)],
)  # fmt: skip
def test_counts_in_short(text: str, value: float) -> None:
    assert number(text, "horizon") == value


def test_a_table_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model must be a table, got 3$"):
        from_dict(TrainConfig, {"model": 3})


def test_how_a_run_is_spread_is_no_part_of_it() -> None:
    plain = TrainConfig(data=DATA, batch=2**14)
    spread = {"replicate": 2, "shard": 2, "tensor": 3, "micro_batch": 4096, "recompute": True, "device": "cpu"}
    many = replace(plain, parallel=ParallelConfig(**spread))
    assert many.id == plain.id
    assert cohort_key(many) == cohort_key(plain)
    assert from_dict(TrainConfig, to_dict(many)) == many


def test_precision_and_repetition_are_part_of_a_run_unless_they_are_as_ever() -> None:
    plain = TrainConfig(data=DATA)
    half, twice = replace(plain, precision="bf16"), replace(plain, data=replace(DATA, repeat=2))
    assert len({each.id for each in (plain, half, twice)}) == 3
    assert len({cohort_key(each) for each in (plain, half, twice)}) == 3


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"replicate": 3}, r"replicate x shard is 3, which does not divide the 4 sequences of a batch \(batch=16384"),
        ({"micro_batch": 1000}, "micro_batch must be a multiple of the context of 4096 tokens that divides the 16384"),
        ({"shard": 2, "micro_batch": 3 * 4096}, "divides the 8192 tokens of a batch that a process takes, got 12288"),
        ({"tensor": 0}, "tensor must be a positive number, got 0"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, got 'gpu'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(batch=2**14, parallel=ParallelConfig(**parallel))


def test_compiled_graphs_and_tensor_parallelism_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^compile does not go with parallel\.tensor above 1"):
        TrainConfig(compile=True, parallel=ParallelConfig(tensor=2))


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (1, r"= 24, but there is 1 process; make .* with torchrun --nproc-per-node 24 -m disco train \.\.\.$"),
        (8, r"is 2 x 3 x 4 = 24, but torchrun started 8 processes; make the sizes multiply to that"),
    ],
)
def test_sizes_must_multiply_to_the_processes(processes: int, message: str) -> None:
    sizes = ParallelConfig(replicate=2, shard=3, tensor=4)
    sizes.fits(24)
    with pytest.raises(ConfigError, match=message):
        sizes.fits(processes)
