"""``disco train`` under torchrun, without torchrun: which process says what is wrong, and when."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from disco.cli import _train, main
from disco.errors import UserError
from disco.train.config import DataConfig, TrainConfig
from disco.train.team import Team
from disco.train.trainer import device_of

CONFIG = str(Path(__file__).parents[2] / "examples" / "train.toml")


@pytest.mark.parametrize(
    ("rank", "happened", "said"), [("0", ["left"], "no room"), ("3", ["waited", "left"], "rank 3: no room")]
)
def test_an_error_of_one_rank_is_said_while_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str,
    happened: list[str], said: str,
) -> None:  # fmt: skip
    """Those that lead wait within the group: leaving it makes the others fail, with errors that hide the cause."""
    events: list[str] = []

    @contextmanager
    def started(config: TrainConfig) -> Iterator[Team]:
        try:
            yield Team()
        finally:
            events.append("left")

    def prepared(*_: object, **__: object) -> DataConfig:
        raise UserError("no room")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("disco.train.team.started", started)
    monkeypatch.setattr(_train, "prepare", prepared)
    monkeypatch.setattr("time.sleep", lambda seconds: events.append("waited"))
    assert main(["train", CONFIG, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"disco: error: {said}\n"
    assert events == happened


def test_a_wrong_tracker_is_said_before_data_are_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", CONFIG, "--out", str(tmp_path), "--track", "mlflow", "--set", "parallel.shard=1"]
    assert main(arguments) == 2
    assert "trackers are " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_more_processes_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    config = TrainConfig()
    with pytest.raises(UserError, match=r"torchrun started process 2 .*from 0.*, but torch finds 2 GPUs"):
        device_of(config)
