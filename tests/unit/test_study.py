"""A study file is the runs that it says, once each, in a good order; mistakes are one line with file and key."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from disco.sweep import study as study_files
from disco.sweep.adaptive.settings import Adaptive
from disco.sweep.study import Study, build_study, load_study, new_tokens, rows, scan_key, scan_names
from disco.train.config import ConfigError, DataConfig
from disco.train.gpus import Gpu

BASE = {"horizon": 2**14, "model": {"width": 16, "depth": 1, "head_size": 8, "context": 64}}


def prepare(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, digest=f"digest of {data.source}", vocab=256)


def study(base: dict[str, Any] | None = None, **sections: Any) -> Study:
    return build_study({"base": BASE | {"batch": 256} | (base or {}), **sections}, prepare)


def lrs(result: Study, batch: int = 256) -> list[float]:
    return sorted(config.optimizer.lr for config in result.configs if config.batch == batch)


def test_the_product_of_the_axes() -> None:
    result = study(axes={"lr": ["2^-5", 0.125], "batch": [256, 512], "seed": [0, 1, 2]})
    points = {(c.optimizer.lr, c.batch, c.seed) for c in result.configs}
    assert points == {(lr, batch, seed) for lr in (2**-5, 0.125) for batch in (256, 512) for seed in (0, 1, 2)}
    assert len(result.configs) == 12
    assert result.tokens == 12 * 2**14


def test_without_axes_a_study_is_its_base() -> None:
    assert len(study().configs) == len(study(axes={}).configs) == 1


@pytest.mark.parametrize("step", ["sqrt2", "sqrt(2)", "2^0.5", math.sqrt(2)])
def test_a_range_lies_on_powers_of_its_step_whatever_its_ends(step: object) -> None:
    low = lrs(study(axes={"lr": {"from": "2^-5", "to": "2^-3", "step": step}}))
    high = lrs(study(axes={"lr": {"from": "2^-4.5", "to": "2^-2", "step": step}}))
    assert low == [2**-5, 2**-4.5, 2**-4, 2**-3.5, 2**-3]
    assert high[:4] == low[1:]  # the same floats, so that runs of two studies have the same id


def test_a_range_of_whole_numbers() -> None:
    axes = {"width": {"from": 16, "to": 64, "step": 2}, "batch": {"from": 192, "to": 768, "step": 2}}
    result = study({"horizon": 768 * 16}, axes=axes)
    assert {c.model.width for c in result.configs} == {16, 32, 64}
    assert {c.batch for c in result.configs} == {192, 384, 768}


def test_learning_rates_centred_by_batch_lie_on_one_grid() -> None:
    lr = {"centre": "2^-5", "at_batch": 256, "exponent": 0.5, "octaves": 1, "step": "sqrt2"}
    result = study(axes={"batch": [256, 512, 1024], "lr": lr})
    assert lrs(result) == [2**-6, 2**-5.5, 2**-5, 2**-4.5, 2**-4]
    assert lrs(result, 512) == [2**-5.5, 2**-5, 2**-4.5, 2**-4, 2**-3.5]
    assert lrs(result, 1024) == [2**-5, 2**-4.5, 2**-4, 2**-3.5, 2**-3]


def test_ratios_as_tables_and_one_by_one() -> None:
    tables = study(axes={"ratios": [{}, {"hidden": 0.125}]}).configs
    assert [c.optimizer.ratios["hidden"] for c in tables] == [1, 0.125]
    single = study(axes={"ratio": {"hidden": ["2^-3"], "input": [2, 1]}}).configs
    assert {(c.optimizer.ratios["hidden"], c.optimizer.ratios["input"]) for c in single} == {(0.125, 2), (0.125, 1)}


def test_optimizers_are_names_or_tables_and_keep_the_rest_of_the_base() -> None:
    axes = {"optimizer": ["scion", {"name": "adamw", "betas": [0, 0]}], "weight_decay": [0.1]}
    scion, adamw = sorted(
        study({"optimizer": {"lr": 0.5}}, axes=axes).configs, key=lambda c: c.optimizer.name != "scion"
    )
    assert (scion.optimizer.name, scion.optimizer.lr, scion.optimizer.weight_decay) == ("scion", 0.5, 0.1)
    assert (adamw.optimizer.name, adamw.optimizer.lr, adamw.optimizer.betas) == ("adamw", 0.5, (0, 0))


def test_any_dotted_key_is_an_axis() -> None:
    result = study(axes={"model": {"kv_heads": [1, 2]}, "schedule": [{}, {"decay": 0.25}], "depth_init": ["relative"]})
    assert {(c.model.kv_heads, c.schedule.decay) for c in result.configs} == {(1, 0), (1, 0.25), (2, 0), (2, 0.25)}
    assert {c.model.depth_init for c in result.configs} == {"relative"}


def test_several_grids_are_united_and_duplicates_merged_to_the_longest() -> None:
    grids = [{"lr": [0.1, 0.2]}, {"lr": [0.2, 0.3], "horizon": ["2^15"]}]
    result = study({"keep": [1024]}, axes=grids)
    assert {c.optimizer.lr: c.horizon for c in result.configs} == {0.1: 2**14, 0.2: 2**15, 0.3: 2**15}
    assert result.notes == ("1 duplicate runs merged",)


def test_branches_decay_from_kept_checkpoints_at_equal_tokens_for_all_batches() -> None:
    decay = {"fraction": 0.25, "at": ["2^13", 12288]}
    result = study(axes={"batch": [256, 512], "lr": [0.1, 0.2]}, decay=decay)
    assert len(result.configs) == 4
    assert len(result.branches) == 8
    for config in result.configs:
        assert config.keep == (7680, 12288)  # multiples of 3 x 512
        own = [branch for branch in result.branches if branch.parent == config.id]
        assert {(b.branch_tokens, b.horizon) for b in own} == {(7680, 10240), (12288, 16384)}
        assert {b.schedule.decay for b in own} == {0.25}
        assert all(dataclasses.replace(b.optimizer) == config.optimizer and b.keep == () for b in own)
    assert result.notes == ("decay from 7680 tokens instead of 8192, so that all batches divide it",)
    assert result.tokens == 4 * 2**14 + 4 * (2560 + 4096)
    assert len({config.id for config in result.runs}) == 12


def test_branches_only_within_the_parents_horizon() -> None:
    grids = [{"lr": [0.1]}, {"lr": [0.2], "horizon": ["2^13"]}]
    result = study(axes=grids, decay={"fraction": 0.5, "at": ["2^14"]})
    assert [(b.optimizer.lr, b.horizon) for b in result.branches] == [(0.1, 2**15)]


def test_decays_of_a_third_are_exact_too() -> None:
    branch = study(decay={"fraction": 1 / 3, "at": [10240]}).branches[0]
    assert (branch.branch_tokens, branch.horizon) == (10240, 15360)


def test_a_fraction_that_is_rounded_is_said() -> None:
    result = study({"horizon": 2**16}, decay={"fraction": 0.123, "at": ["2^14"]})
    branch = result.branches[0]
    assert branch.schedule.decay == 8 / 65
    assert (branch.branch_tokens, branch.horizon) == (57 * 256, 65 * 256)
    assert "decay over 8/65 of the horizon instead of 0.123, so that all batches divide it" in result.notes
    assert not study(decay={"fraction": 0.25, "at": [12288]}).notes


def test_long_runs_first_then_the_middle_of_the_learning_rates() -> None:
    axes = {"width": [16, 64], "lr": {"from": "2^-6", "to": "2^-2", "step": 2}, "seed": [0, 1]}
    order = [(c.model.width, c.seed, math.log2(c.optimizer.lr)) for c in study(axes=axes).configs]
    assert [width for width, _, _ in order] == [64] * 10 + [16] * 10
    assert order[:5] == [(64, 0, -4), (64, 0, -5), (64, 0, -3), (64, 0, -6), (64, 0, -2)]


def test_data_are_prepared_once_and_only_when_all_runs_are_valid() -> None:
    calls: list[DataConfig] = []

    def counting(data: DataConfig) -> DataConfig:
        calls.append(data)
        return prepare(data)

    build_study({"base": BASE, "axes": {"lr": [0.1, 0.2], "data": {"tokenizer": ["bytes", "bpe:300"]}}}, counting)
    assert [data.tokenizer for data in calls] == ["bytes", "bpe:300"]
    calls.clear()
    with pytest.raises(ConfigError):
        build_study({"base": BASE, "axes": {"lr": [0.1, -1]}}, counting)
    assert not calls


def test_the_plan_as_a_table_shows_what_varies() -> None:
    result = study(axes={"batch": [256, 512], "lr": [0.25, 0.5], "momentum": [0, 0.9]})
    table = rows(result)
    assert len(table) == 4
    assert table[0]["batch"] == "2^8"
    assert table[0]["learning rates"] == "2^-2 .. 2^-1"
    assert {row["also"] for row in table} == {"momentum=0.0", "momentum=0.9"}
    assert sum(int(row["runs"]) for row in table) == 8
    assert sum(int(row["tokens"].replace(",", "")) for row in table) == sum(map(new_tokens, result.runs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae = 'x'", "unknown key 'nmae'; did you mean 'name'?"),
        ("name = 3", "name must be letters, digits, spaces and ._- (it names a folder), got 3"),
        ("name = '../x'", "name must be letters, digits, spaces and ._- (it names a folder), got '../x'"),
        ("base = 3", "base must be a table, got 3"),
        ("[base]\nhorizn = 4", "unknown key 'horizn'; did you mean 'horizon'?"),
        ("[base.model]\nwidht = 4", "unknown key 'model.widht'; did you mean 'width'?"),
        ("axes = 3", "axes must be a table such as lr = [0.1, 0.2], got 3"),
        ("[axes]\nlearning_rate = [1]", "unknown key 'axes.learning_rate'; "),
        ("[axes]\nwidht = [1]", "unknown key 'axes.widht'; did you mean 'width'?"),
        ("[axes]\nratio.hiden = [1]", "unknown key 'axes.ratio.hiden'; did you mean 'ratio.hidden'?"),
        ("[axes]\nparent = ['a']", "unknown key 'axes.parent'; "),
        ("[axes]\nlr = []", "axes.lr is an empty list"),
        ("[axes]\nlr = [-0.1]", "lr must be a positive number, got -0.1"),
        ("[axes]\nlr = [0]", "lr must be a positive number, got 0.0"),
        ("[axes]\nlr = ['fast']", "optimizer.lr must be a number such as 0.03 or \"2^-5\", got 'fast'"),
        ("[axes]\nlr = {from = 0, to = 1, step = 2}", "axes.lr.from must be above 0, got 0"),
        ("[axes]\nlr = {from = 1, to = 0.5, step = 2}", "axes.lr: to (0.5) is below from (1)"),
        ("[axes]\nlr = {from = 1, to = 2, step = 1}", "axes.lr.step must be above 1, got 1"),
        ("[axes]\nlr = {from = 1, to = 2}", "axes.lr needs from, to, step; step is missing"),
        ("[axes]\nlr = {from = 1, to = 2, stp = 2}", "unknown key 'axes.lr.stp'; did you mean 'step'?"),
        ("[axes]\nbatch = {centre = 1, step = 2}", "axes.batch: only lr has a centre that follows the batch"),
        (
            "[axes]\nlr = {centre = 1, at_batch = 0, exponent = 1, octaves = 1, step = 2}",
            "axes.lr.at_batch must be above",
        ),
        (
            "[base]\nbatch = 0\n[axes]\nlr = {centre = 1, at_batch = 1, exponent = 1, octaves = 1, step = 2}",
            "batch must be above 0, got 0",
        ),
        (
            "[axes]\nlr = {centre = 1, at_batch = 1, exponent = 1e308, octaves = 1, step = 2}",
            "axes.lr: 2^inf and 1 octaves around it, at batch 4096, is too far",
        ),
        ("[axes]\nlr = {from = 1, to = 'inf', step = 2}", "axes.lr.to must be a number such as"),
        ("[axes]\nlr = ['2^5000']", "optimizer.lr must be a number such as 0.03 or \"2^-5\", got '2^5000'"),
        (
            "[base]\noptimizer = 'adam'\n[axes]\nlr = [0.1]",
            "optimizer must be a table for its axes, such as { name = ... }, got 'adam'",
        ),
        ("[base]\nmodel = 3", "model must be a table, got 3"),
        ("[base]\nmodel = 3\n[axes]\nwidth = [16]", "model must be a table for its axes"),
        ("[axes]\nbatch = [100]", "batch must be a multiple of the context, got batch=100 and context=4096"),
        ("[decay]\nfraction = 2\nat = [1]", "decay.fraction must lie between 0.01 and 0.99, got 2"),
        ("[decay]\nfraction = 0.996\nat = [1]", "decay.fraction must lie between 0.01 and 0.99, got 0.996"),
        ("[decay]\nfraction = 0.25\nat = []", "decay.at is an empty list"),
        ("[decay]\nfraction = 0.25\nat = ['inf']", "decay.at must be a number such as 0.03 or \"2^-5\", got 'inf'"),
        (
            "base.horizon = 16384\n[decay]\nfraction = 0.126\nat = [3584]",
            "multiple of 339968 tokens, so that all batches divide it, but no run is longer than 16384; choose",
        ),
        ("[decay]\nfraction = 0.25", "decay is a table such as { fraction = 0.25"),
        ("[decay]\nfraction = 0.25\nat = ['2^40']", "decay.at must lie between 12288 (a multiple of all batches) and"),
        ("[decay]\nfraction = 0.25\nat = [4096]", "decay.at must lie between 12288 (a multiple of all batches) and"),
        ("[base.schedule]\ndecay = 0.5\n[decay]\nfraction = 0.25\nat = [1]", "decay needs runs at a constant rate"),
        ("[axes\n", "is not TOML: "),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_study(path, prepare)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the study .*nothing.toml: No such file"):
        load_study(tmp_path / "nothing.toml", prepare)


def test_an_adaptive_study_is_a_key_or_a_table() -> None:
    assert study().adaptive is None
    assert study(adaptive=False).adaptive is None
    assert study(adaptive=True).adaptive == Adaptive()
    table = {"budget": "2^24", "quantity": "plan", "tokens": "2^26", "width": 0.5, "error_rate": 0.01}
    assert study(adaptive=table).adaptive == Adaptive(
        budget=2**24, quantity="plan", tokens=2**26, width=0.5, error_rate=0.01
    )


@pytest.mark.parametrize(
    ("adaptive", "why"),
    [
        (3, "adaptive is true, or a table such as"),
        ({"buget": 1}, "unknown key 'adaptive.buget'; did you mean 'budget'?"),
        ({"budget": 0}, "adaptive.budget must be above 0, got 0"),
        ({"width": "wide"}, "adaptive.width must be a number"),
        ({"quantity": "loss"}, "adaptive.quantity must be one of eta, norm, plan, got 'loss'"),
        ({"error_rate": 0.7}, "adaptive.error_rate must be above 0 and at most 0.5, got 0.7"),
        ({"quantity": "plan"}, "adaptive.tokens is the horizon of the planned run"),
        ({"tokens": 2**20}, "adaptive.tokens is the horizon of the planned run"),
    ],
)
def test_what_is_wrong_with_an_adaptive_table_is_one_line(adaptive: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        study(adaptive=adaptive)


def test_an_adaptive_study_has_no_decay() -> None:
    for sections in ({"decay": {"fraction": 0.25, "at": 2**13}}, {"axes": {"schedule.decay": [0.5]}}):
        with pytest.raises(ConfigError, match="leave out decay or adaptive"):
            study(adaptive=True, **sections)


def test_scans_are_what_differs_in_more_than_rate_batch_and_horizon() -> None:
    configs = study(axes={"lr": [0.1, 0.2], "batch": [256, 512], "momentum": [0, 0.9]}).configs
    assert len({scan_key(config) for config in configs}) == 2
    names = {scan_names(configs)[i] for i, config in enumerate(configs) if config.optimizer.momentum}
    assert names == {"d16-L1, momentum=0.9"}


@pytest.mark.parametrize(
    ("engine", "settings", "parallel", "message"),
    [
        ("local", {}, {"shard": 2}, "1 x 2 x 1 = 2, but a local sweep trains a run in one process; jobs of --engine "),
        ("slurm", {}, {"shard": 2}, "1 x 2 x 1 = 2, but slurm.processes is 1; make them the same"),
        ("slurm", {"processes": 2}, {}, "1 x 1 x 1 = 1, but slurm.processes is 2; make them the same"),
        (
            "slurm",
            {"processes": 2, "nodes": 3},
            {"replicate": 2, "tensor": 2},
            "2 x 1 x 2 = 4, but slurm.nodes x slurm.processes is 3 x 2 = 6; make them the same",
        ),
        ("ray", {"processes": 4}, {"shard": 2}, "1 x 2 x 1 = 2, but ray.processes is 4; make them the same"),
        ("local", {"processes": 2}, {}, ""),
        ("ray", {"processes": 2}, {"tensor": 2}, ""),
        ("slurm", {"processes": 2, "nodes": 2}, {"replicate": 2, "tensor": 2}, ""),
    ],
)
def test_a_run_is_for_as_many_processes_as_a_job_has(
    engine: str, settings: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    table = {"base": BASE | {"batch": 256, "parallel": parallel}} | ({} if engine == "local" else {engine: settings})
    if message:
        with pytest.raises(ConfigError) as error:
            build_study(table, prepare, engine=engine)
        assert str(error.value).startswith(f"parallel.replicate x shard x tensor is {message}")
    else:
        (run,) = build_study(table, prepare, engine=engine).configs
        assert run.id == study().configs[0].id


@pytest.mark.parametrize("asked", [{"parallel": {"device": "cuda"}}, {"precision": "bf16"}])
def test_a_local_sweep_needs_the_gpu_that_it_asks_for(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"base": BASE | {"batch": 256} | asked}
    monkeypatch.setattr(study_files, "gpus", lambda: ())
    with pytest.raises(ConfigError, match=r"torch finds no GPU, but (parallel\.device|precision) is .*; set parallel"):
        build_study(table, prepare)
    monkeypatch.setattr(study_files, "gpus", lambda: (Gpu("0", 2**34),))
    build_study(table, prepare)
    build_study(table, prepare, engine="slurm")
    on_cpu = table["base"] | {"parallel": {"device": "cpu"}}
    assert build_study({"base": on_cpu}, prepare).configs[0].parallel.device == "cpu"
