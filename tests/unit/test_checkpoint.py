"""Checkpoints: what is damaged is noticed, what is old makes room, what is unfinished is removed."""

from pathlib import Path

import pytest
import torch

from disco.errors import UserError
from disco.train import checkpoint

HEADER = {"schema": 1, "offset": 7, "state": {"step": 3, "losses": torch.tensor([1.0, 0.1], dtype=torch.float64)}}


def test_a_header_comes_back_as_numbers(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", {**HEADER, "model": {}})
    assert checkpoint.read_header(tmp_path / "a.pt") == {**HEADER, "state": {"step": 3, "losses": [1.0, 0.1]}}
    assert checkpoint.read_header(tmp_path / "b.pt") is None
    assert checkpoint.read_header(tmp_path / "b.dcp") is None


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "text", "other"])
def test_any_damage_is_noticed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "latest.pt"
    checkpoint.save(path, {**HEADER, "model": {"weight": torch.arange(1000.0)}})
    content = path.read_bytes()
    middle = content.index(torch.arange(400.0, 402.0).numpy().tobytes())
    flipped = content[:middle] + b"\xff" + content[middle + 1 :]
    path.write_bytes({"flip": flipped, "cut": content[:-100], "empty": b"", "text": b"?", "other": b""}[how])
    if how == "other":
        torch.save({"something": 1}, path)
    with pytest.raises(UserError, match=r"latest\.pt is damaged \(\w+\); delete it to start the run over"):
        checkpoint.read_header(path)


def test_a_folder_without_its_index_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "latest-5.dcp").mkdir()
    with pytest.raises(UserError, match=r"latest-5\.dcp is damaged \(FileNotFoundError\)"):
        checkpoint.read_header(tmp_path / "latest-5.dcp")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_last_two_of_many_processes_stay_and_the_kept(tmp_path: Path) -> None:
    for name in ("latest-90.dcp", "latest-100.dcp", "latest-1000.dcp", "50.dcp", "40.pt"):
        (tmp_path / name).mkdir()
    (tmp_path / checkpoint.LATEST).touch()
    (tmp_path / checkpoint.PREVIOUS).touch()
    assert [path.name for path in checkpoint.sharded(tmp_path)] == [
        "latest-1000.dcp",
        "latest-100.dcp",
        "latest-90.dcp",
    ]
    checkpoint.make_room(tmp_path)
    assert names(tmp_path) == {"latest-100.dcp", "latest-1000.dcp", "50.dcp", "40.pt"}


def test_one_of_many_processes_leaves_those_of_one(tmp_path: Path) -> None:
    (tmp_path / "latest-100.dcp").mkdir()
    (tmp_path / checkpoint.LATEST).touch()
    checkpoint.make_room(tmp_path)
    assert names(tmp_path) == {"latest-100.dcp", checkpoint.LATEST}


def test_two_of_one_process_replace_those_of_many(tmp_path: Path) -> None:
    for name in ("latest-90.dcp", "latest-100.dcp", "50.dcp"):
        (tmp_path / name).mkdir()
    checkpoint.rotate(tmp_path, HEADER)
    assert names(tmp_path) == {checkpoint.LATEST, "latest-90.dcp", "latest-100.dcp", "50.dcp"}
    checkpoint.rotate(tmp_path, HEADER)
    assert names(tmp_path) == {checkpoint.LATEST, checkpoint.PREVIOUS, "50.dcp"}


def test_unfinished_files_and_folders_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".latest-5.dcp.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".latest-5.dcp.tmp" / ".index.json.1.tmp").touch()
    (tmp_path / "checkpoints" / "latest-4.dcp").mkdir()
    (tmp_path / ".summary.json.1.tmp").touch()
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == {"checkpoints"}
    assert names(tmp_path / "checkpoints") == {"latest-4.dcp"}


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a tensor of shape \(3,\) for one of \(2,\)"):
        checkpoint.fill(torch.zeros(2), torch.zeros(3))
