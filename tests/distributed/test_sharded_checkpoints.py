"""Checkpoints of many ranks: written while the tensors go on changing, whole or not there, never half."""

from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import mesh_of
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from disco.distributed import checkpoint
from disco.errors import UserError

SHAPES = {"rows": (10, 4), "columns": (3, 8), "few": (1, 5), "plain": (6,), "number": ()}


def made(size: int, start: float = 0.0) -> dict[str, Tensor]:
    """Tensors cut in different ways, one plain and one number, the same on every rank."""
    full = {
        name: torch.arange(float(torch.Size(shape).numel())).reshape(shape) + start for name, shape in SHAPES.items()
    }
    mesh = mesh_of(size)
    cuts: dict[str, Any] = {"rows": Shard(0), "columns": Shard(1), "few": Shard(0)}
    return {name: distribute_tensor(x, mesh, [cuts[name]]) if name in cuts else x for name, x in full.items()}


def whole(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).tolist() for name, x in tensors.items()}


def saved(rank: int, size: int, path: str) -> list[dict[str, list[Any]]]:
    saver, tensors, done = checkpoint.Saver(), made(size), []
    before = whole(tensors)
    saver.save(Path(path), tensors, {"rank": rank}, lambda: done.append(True))
    for tensor in tensors.values():
        tensor.mul_(0)
    saver.settle()
    assert bool(done) == (rank == 0)
    filled = made(size, start=7.0)
    checkpoint.restore(Path(path), filled)
    return [before, whole(filled)]


def loaded(rank: int, size: int, path: str) -> dict[str, list[Any]]:
    tensors = made(size, start=7.0)
    tensors["rows"] = distribute_tensor(torch.zeros(10, 4), mesh_of(size), [Replicate()])
    checkpoint.restore(Path(path), tensors)
    return whole(tensors)


def test_what_is_saved_is_what_was_there(world, tmp_path):
    path = tmp_path / "a.dcp"
    for _ in range(2):  # the second takes the place of the first
        answers = world(2).run(saved, str(path))
        for before, after in answers:
            assert after == before
    assert checkpoint.read_header(path) == {"rank": 0}
    assert [item.name for item in tmp_path.iterdir()] == ["a.dcp"]
    for found in world(4).run(loaded, str(path)):
        assert found == answers[0][0]
    alone = {name: torch.full(shape, -1.0) for name, shape in SHAPES.items()}
    checkpoint.restore(path, alone)
    assert whole(alone) == answers[0][0]


def test_it_is_a_checkpoint_of_torch(world, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    ((before, _), _) = world(2).run(saved, str(tmp_path / "a.dcp"))
    dcp_to_torch_save(tmp_path / "a.dcp", tmp_path / "a.pt")
    assert whole(torch.load(tmp_path / "a.pt", weights_only=True)) == before


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "index.json"])
def test_missing_and_changed_files_are_noticed(world, tmp_path, name):
    path = tmp_path / "a.dcp"
    world(2).run(saved, str(path))
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"is not as it was written|Expecting|Unterminated|delimiter"):
        checkpoint.read_header(path)
    (path / name).unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.read_header(path)


def failing(rank: int, size: int, path: str) -> str:
    saver = checkpoint.Saver()
    saver.save(Path(path), made(size), None, lambda: None)
    with pytest.raises(UserError) as caught:
        saver.settle()
    return str(caught.value)


def test_what_cannot_be_written_is_said_on_every_rank(world, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for message in world(2).run(failing, str(tmp_path / "file" / "a.dcp")):
        assert message.startswith(f"cannot write {tmp_path / 'file' / 'a.dcp'}: ")
        assert "\n" not in message


def interrupted(rank: int, size: int, path: str) -> str:
    def stop(*_: Any) -> None:
        raise OSError("killed")

    finish, checkpoint._Writer.finish = checkpoint._Writer.finish, stop  # type: ignore[method-assign]
    try:
        return failing(rank, size, path)
    finally:
        checkpoint._Writer.finish = finish  # type: ignore[method-assign]


def test_until_the_end_there_is_the_one_before(world, tmp_path):
    path = tmp_path / "a.dcp"
    ((before, _), _) = world(2).run(saved, str(path))
    world(2).run(interrupted, str(path))
    assert {item.name for item in tmp_path.iterdir()} == {"a.dcp", ".a.dcp.tmp"}
    for found in world(4).run(loaded, str(path)):
        assert found == before


def unlike(rank: int, size: int, path: str) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.restore(Path(path), {**made(size), "other": torch.zeros(2)})
    return str(caught.value)


def test_a_checkpoint_of_something_else_is_refused(world, tmp_path):
    world(2).run(saved, str(tmp_path / "a.dcp"))
    for message in world(2).run(unlike, str(tmp_path / "a.dcp")):
        assert "a.dcp cannot be loaded: " in message
