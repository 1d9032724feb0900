"""Trainers that people use train with Disco, and leave records that ``disco fit`` and ``disco report`` read."""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from disco import Disco, init_, param_groups
from disco.cli import main
from disco.corpus import documents
from disco.distributed.spectral import TOLERANCE
from disco.errors import UserError
from disco.integrations import Recorder
from disco.runs.reader import Run, read_run
from disco.runs.schema import Outcome, deterministic

ROOT = Path(__file__).parents[2]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(folder: Path) -> list[dict[str, Any]]:
    return [deterministic(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_records(one: Path, other: Path) -> None:
    """Same steps, keys and numbers; norms, which are measured from known vectors on, to twice their tolerance."""
    first, second = lines(one), lines(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            rel = 2 * TOLERANCE if key.startswith("norm/") else 1e-6
            assert right[key] == pytest.approx(value, rel=rel), f"{key} at step {left['step']}"
    assert read_run(one).outcome == read_run(other).outcome == Outcome.FINISHED


def exact(name: str, weight: torch.Tensor, group: str, layout: str) -> float:
    """The layer's norm by its definition, in float64."""
    matrix = weight.detach().double() if layout == "out_in" else weight.detach().double().T
    d_out, d_in = matrix.shape
    if group == "hidden":
        parts = matrix.chunk(3) if "c_attn" in name else [matrix]
        return max(float(torch.linalg.matrix_norm(m, 2)) * math.sqrt(m.shape[1] / m.shape[0]) for m in parts)
    if group == "input":
        return float(matrix.norm(dim=0).max()) / math.sqrt(d_out)
    return float(matrix.norm(dim=1).max()) * math.sqrt(d_in)


def assert_norms_of(model: nn.Module, run: Run) -> int:
    """The last norms in the record are those of the model's matrices; returns how many."""
    matrices = [d for d in param_groups(model).decisions if d.param.ndim == 2]
    for d in matrices:
        measured = run.column(f"norm/weights/{d.norm}/{d.name.removesuffix('.weight')}")
        assert measured[-1] == pytest.approx(exact(d.name, d.param, d.group, d.layout), rel=2 * TOLERANCE), d.name
    return len(matrices)


def test_a_grid_of_runs_of_a_plain_loop_is_fitted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 runs of a bigram model on real text: the fit finds the best rate of each batch, the page is written."""
    _, text = next(documents())
    tokens = torch.tensor(list(text.encode()[: 2**14]))
    inputs, targets = tokens[:-1], tokens[1:]
    held_out = slice(-1024, None)
    losses: dict[tuple[int, int], list[float]] = {}
    for batch, power in itertools.product((64, 128), range(-5, 0)):
        torch.manual_seed(0)
        model = init_(nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 256, bias=False)))
        optimizer = Disco(param_groups(model, lr=2.0**power), momentum=0.5)
        folder = tmp_path / "runs" / f"{batch}-{power}"
        recorder = Recorder(folder, optimizer, batch=batch, horizon=2**12, model={"name": "bigram", "width": 16})
        for step in range(2**12 // batch + 1):
            if step:
                rows = slice((step - 1) * batch, step * batch)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                optimizer.step()
            if recorder.due(step):
                with torch.no_grad():
                    valid = nn.functional.cross_entropy(model(inputs[held_out]), targets[held_out]).item()
                recorder.record(step, valid=valid)
                losses.setdefault((batch, power), []).append(valid)
        recorder.finish()
    runs = str(tmp_path / "runs")
    assert main(["runs", "ls", runs]) == 0
    assert capsys.readouterr().out.count("bigram") == 10
    assert main(["fit", runs, "-o", str(tmp_path / "fit.json"), "--bootstraps", "100"]) == 0
    fitted = json.loads((tmp_path / "fit.json").read_text())
    for batch in (64, 128):
        (cell,) = (cell for cell in fitted["cells"] if (cell["batch"], cell["tokens"]) == (batch, 2**12))
        found = {round(point["lr"]): point["loss"] for point in cell["points"]}
        last = 3 if batch == 64 else 1  # evaluations in the last 1/32 of the run; at least three, or the last one
        assert found == {power: pytest.approx(np.mean(losses[batch, power][-last:])) for power in range(-5, 0)}
        assert cell["lr"]["x"] == pytest.approx(min(found, key=lambda power: found[power]), abs=1)
    assert main(["report", runs, "-o", str(tmp_path / "page.html")]) == 0
    assert "bigram" in (tmp_path / "page.html").read_text()


def test_the_plain_loop_learns_and_leaves_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, ROOT / "examples" / "plain_loop.py", tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert re.search(r"1\.weight +hidden +rms_to_rms +out_in +64x32 +0\.007812", done.stdout)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    norms = [float(x) for x in re.findall(r"output norm ([\d.]+)", done.stdout)]
    assert losses[0] > 3.5  # ln 64 = 4.16 at the start
    assert losses[-1] < 0.01
    assert norms == sorted(norms)
    assert norms[-1] <= 1 + 100 * 2**-4
    assert main(["runs", "show", str(tmp_path / "runs"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["summary"]["outcome"] == "finished"
    assert shown["last"]["step"] == 100
    assert shown["last"]["path"] == pytest.approx(100 * 2**-4)
    assert shown["last"]["norm/weights/rms_to_inf/3"] == pytest.approx(norms[-1], abs=0.01)
    assert shown["config"]["optimizer"]["ratios"]["hidden"] == 1 / 8


class KilledError(Exception):
    pass


def hugging_face(tmp_path: Path, kind: str, sizes: list[str], killed_at: int) -> tuple[Run, int]:
    """Trains undisturbed, then again, killed and resumed; returns the undisturbed run and its number of matrices."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == killed_at:
                raise KilledError

    huggingface = example("huggingface")
    whole, _ = huggingface.trainer_of(["--model", kind, *sizes, "--out", str(tmp_path / "whole")])
    whole.train()
    cut, _ = huggingface.trainer_of(["--model", kind, *sizes, "--out", str(tmp_path / "cut")])
    cut.add_callback(Kill())
    with pytest.raises(KilledError):
        cut.train()
    again, resume = huggingface.trainer_of(["--model", kind, *sizes, "--out", str(tmp_path / "cut"), "--resume"])
    assert resume
    again.args.restore_callback_states_from_checkpoint = kind == "gpt2"  # both ways
    again.train(resume_from_checkpoint=True)
    (one,) = (tmp_path / "whole").glob("*/config.json")
    (other,) = (tmp_path / "cut").glob("*/config.json")
    assert_same_records(one.parent, other.parent)
    run = read_run(one.parent)
    logged = [entry["norm/output/rms_to_inf"] for entry in whole.state.log_history if "norm/output/rms_to_inf" in entry]
    assert len(logged) == 12
    assert logged[-1] == pytest.approx(run.norm("output", "rms_to_inf")[-1])
    return run, assert_norms_of(whole.model, run)


def test_llama_trains_with_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    run, matrices = hugging_face(tmp_path, "llama", ["--steps", "24", "--width", "32"], killed_at=17)
    assert matrices == 2 + 2 * 7
    valid = run.column("loss/valid")
    assert valid[np.isfinite(valid)][-1] < 3.6  # ln 256 = 5.55 at the start
    assert run.config["batch"] == 8 * 64
    assert run.config["horizon"] == 24 * 8 * 64
    assert run.config["schedule"] == {"warmup": 0, "decay": 0.0}
    assert run.config["model"]["name"] == "llama-d32-L2"


def test_tied_gpt2_trains_with_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    run, matrices = hugging_face(tmp_path, "gpt2", ["--steps", "24", "--width", "32"], killed_at=17)
    assert matrices == 2 + 2 * 4
    assert run.groups["output"] == ("transformer.wte",)
    assert run.groups["input"] == ("transformer.wpe",)
    valid = run.column("loss/valid")
    assert valid[np.isfinite(valid)][-1] < 3.6


@pytest.mark.full
@pytest.mark.parametrize(("kind", "loss"), [("llama", 2.65), ("gpt2", 3.15)])
def test_a_few_million_parameters_with_the_trainer_of_hugging_face(tmp_path: Path, kind: str, loss: float) -> None:
    run, _ = hugging_face(tmp_path, kind, ["--steps", "60", "--width", "256", "--depth", "4"], killed_at=37)
    assert run.parameters is not None
    assert run.parameters > 3e6
    valid = run.column("loss/valid")
    assert valid[np.isfinite(valid)][-1] < loss  # ln 256 = 5.55 at the start


def test_a_checkpoint_without_the_record_is_refused(tmp_path: Path) -> None:
    from disco.integrations import TransformersCallback

    huggingface = example("huggingface")
    arguments = ["--steps", "12", "--width", "16", "--depth", "1", "--out", str(tmp_path)]
    bare, _ = huggingface.trainer_of(arguments)
    bare.remove_callback(TransformersCallback)
    bare.train()
    (first, *_) = sorted((tmp_path / "checkpoints").glob("*/checkpoint-*"))
    again, _ = huggingface.trainer_of(arguments)
    with pytest.raises(UserError, match="the checkpoint knows nothing of the record"):
        again.train(resume_from_checkpoint=str(first))


def test_a_lightning_module_trains(tmp_path: Path) -> None:
    from lightning.pytorch import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 100:
                raise KilledError

    bytes_ = example("lightning_module")
    trainer, module, _ = bytes_.trainer_of(["--out", str(tmp_path / "whole")])
    trainer.fit(module, *bytes_.loaders())
    cut, other, _ = bytes_.trainer_of(["--out", str(tmp_path / "cut")])
    cut.callbacks.insert(0, Kill())
    with pytest.raises(KilledError):
        cut.fit(other, *bytes_.loaders())
    again, other, checkpoint = bytes_.trainer_of(["--out", str(tmp_path / "cut"), "--resume"])
    assert checkpoint is not None
    again.fit(other, *bytes_.loaders(), ckpt_path=checkpoint)
    assert_same_records(tmp_path / "whole" / "bytes-0.0625", tmp_path / "cut" / "bytes-0.0625")
    run = read_run(tmp_path / "whole" / "bytes-0.0625")
    assert run.column("step").tolist() == list(range(16, 193, 16))
    assert run.config["horizon"] == 192 * 8 * 32
    assert assert_norms_of(module, run) == 3
    valid = run.column("loss/valid")
    assert np.isfinite(valid).sum() == 3  # after each epoch
    assert valid[-1] < 3.0


@pytest.fixture(scope="session")
def titan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torchtitan 0.3.0 and the three packages that it needs to be imported, without their own needs."""
    folder = tmp_path_factory.mktemp("titan")
    wanted = ["torchtitan==0.3.0", "spmd_types==0.2.3", "torchdata==0.11.0", "torch_checkpointing==0.1.1"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"torchtitan cannot be installed here:\n{done.stderr}"
    return folder


def in_titan(titan: Path, case: str, folder: Path, timeout: float = 300) -> dict[str, Any]:
    """Runs a case of titan.py in a process that can import torchtitan; returns what it prints last, as JSON."""
    path = os.pathsep.join([str(titan), *sys.path, str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("titan.py"), case, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_optimizer_of_torchtitan(titan: Path, tmp_path: Path) -> None:
    """Built from its configuration, scheduled, saved and loaded into other model parts by torchtitan's own code."""
    told = in_titan(titan, "optimizer", tmp_path)
    assert max(told["differences"].values()) == 0
    assert told["names"] == [
        {"input": ["tok_embeddings.weight"], "hidden": ["layers.0.weight"]},
        {"hidden": ["layers.1.weight"], "vector": ["layers.1.bias"]},
        {"hidden": ["layers.2.weight"], "output": ["lm_head.weight"]},
    ]
    assert not [key for key in told["keys"] if key.endswith(".names")]
    assert "state.layers.1.weight.momentum" in told["keys"]
    assert "state.layers.0.weight.second" in told["keys"]
    first, second = (sorted(set(rates.values())) for rates in told["rates"])
    assert first == [0.25 / 16, 0.125]  # half way through the warmup; hidden and the others
    assert second == [0.25 / 8, 0.25]


def debug_model(titan: Path, folder: Path, case: str, layers: int) -> None:
    told = in_titan(titan, case, folder)
    assert told["step"] == 6
    assert {group: len(names) for group, names in told["groups"].items()} == {
        "input": 1, "hidden": 5 * layers, "vector": 2 * layers + 1, "output": 1
    }  # fmt: skip
    assert_same_records(folder / "whole" / "run", folder / "cut" / "run")
    run = read_run(folder / "whole" / "run")
    assert run.column("step").tolist() == [1, 2, 3, 4, 5, 6]
    assert run.column("tokens")[-1] == run.config["horizon"] == 6 * 128
    losses = run.column("loss/train")
    assert losses[-1] < losses[0] - 0.5
    weights = torch.load(folder / "weights.pt", weights_only=True)
    norms = {"input": ("one_to_rms", "in_out"), "hidden": ("rms_to_rms", "out_in"), "output": ("rms_to_inf", "out_in")}
    for group, (which, layout) in norms.items():
        for name in told["groups"][group]:
            measured = run.column(f"norm/weights/{which}/{name.removesuffix('.weight')}")[-1]
            assert measured == pytest.approx(exact(name, weights[name], group, layout), rel=2 * TOLERANCE)


def test_two_layers_of_torchtitans_debug_model_train(titan: Path, tmp_path: Path) -> None:
    debug_model(titan, tmp_path, "two layers", 2)


@pytest.mark.full
def test_torchtitans_debug_model_trains(titan: Path, tmp_path: Path) -> None:
    debug_model(titan, tmp_path, "debugmodel", 6)


@pytest.mark.full
def test_torchtitan_does_not_run_on_a_cpu_by_itself(titan: Path, tmp_path: Path) -> None:
    """If this fails, stand-ins have become needless: docs/trainers.md says which there are."""
    path = os.pathsep.join([str(titan), *sys.path, str(ROOT)])
    command = [sys.executable, "-c", "from examples.torchtitan_config import debugmodel; debugmodel()"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'triton'"


def test_snippets_of_the_document_are_from_examples() -> None:
    texts = [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trainers.md").read_text(), re.DOTALL)
    assert len(snippets) == 6
    for snippet in snippets:
        assert any(snippet in text for text in texts), snippet
