"""A full disk, a corrupt shard, a corrupt checkpoint: one clear line, and with the fault gone the same command ends
with the record of an undisturbed run. ``disco data prepare`` on a full disk is in test_data_prepare.py, a full queue in
test_sweep_cluster.py and, with a real Slurm, in tests/cluster.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_disk import SmallDisk, small_disk
from sweeps import MODEL, records, write_study

from disco import corpus
from disco.cli import main
from disco.runs.reader import read_run, read_runs
from disco.runs.schema import CHECKPOINTS, METRICS
from disco.train import checkpoint

ROOM = 200_000
"""Kilobytes, which is enough for all."""
NO_SPACE = ": No space left on device; make room, then give the same command again"
AXES = "[axes]\nlr = ['2^-5', '2^-4', '2^-3', '2^-2']\n"


def write_run(folder: Path, horizon: int = 2**15) -> Path:
    path = folder / "run.toml"
    path.write_text(f"horizon = {horizon}\nbatch = 64\ncheckpoint_seconds = 0.05\n{MODEL}")
    return path


def disco(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    code = main(list(map(str, arguments)))
    return code, capsys.readouterr().err


def error(said: str) -> str:
    """The line of an error, which is the last one and the only one."""
    assert said.count("disco: error: ") == 1
    assert "Traceback" not in said
    return said.splitlines()[-1].removeprefix("disco: error: ")


@contextmanager
def when(ready: Callable[[], Any], act: Callable[[], None]) -> Iterator[None]:
    """Acts from another thread as soon as it is time, which has to come within the block."""
    done, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            if ready():
                act()
                done.set()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()
    assert done.is_set()


def saved(out: Path, name: str = checkpoint.PREVIOUS) -> list[Path]:
    return list(out.glob(f"*/{CHECKPOINTS}/{name}"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", ROOM) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of ``write_run`` by its id."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["train", str(write_run(folder)), "--out", str(folder / "runs")]) == 0
    return records(folder / "runs")


def test_training(
    tmp_path: Path, disk: SmallDisk, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = disk.path / "runs"
    command = ("train", write_run(tmp_path), "--out", out)
    with when(lambda: saved(out), disk.fill):
        code, said = disco(capsys, *command)
    assert code == 2
    assert error(said).startswith(f"cannot write {out}/")
    assert error(said).endswith(NO_SPACE)
    (run,) = read_runs(out).runs
    assert run.outcome is None
    assert any(checkpoint.load(path) is not None for path in [*saved(out), *saved(out, checkpoint.LATEST)])
    lines = (run.folder / METRICS).read_bytes()
    assert disco(capsys, *command)[0] == 2, "still no room"
    assert lines.startswith((run.folder / METRICS).read_bytes()), "cut to the checkpoint, and no more"
    disk.resize(ROOM)
    assert disco(capsys, *command)[0] == 0
    assert records(out) == undisturbed


def test_a_sweep(tmp_path: Path, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study.toml", AXES, horizon=2**15, checkpoint_seconds=0.02)
    out = disk.path / "runs"
    command = ("sweep", "run", study, "--workers", 1, "--out")
    assert disco(capsys, *command, tmp_path / "undisturbed")[0] == 0
    with when(lambda: saved(out), disk.fill):
        code, said = disco(capsys, *command, out)
    assert code == 2
    assert error(said).startswith(f"cannot write {out}/")
    assert error(said).endswith(NO_SPACE)
    assert not [run for run in read_runs(out).runs if run.outcome == "failed"], "the runs are not to blame"
    disk.resize(ROOM)
    assert disco(capsys, *command, out)[0] == 0
    assert records(out) == records(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("command", "name"),
    [(("fit", "--bootstraps", 0), "fit.json"), pytest.param(("report",), "report.html", marks=pytest.mark.full)],
)
def test_what_is_made_of_runs(
    command: tuple[object, ...], name: str, tmp_path: Path, disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert disco(capsys, "train", write_run(tmp_path, 2**13), "--out", disk.path / "runs")[0] == 0
    output = disk.path / name
    output.write_text("an old one")
    disk.fill()
    code, said = disco(capsys, *command, disk.path / "runs", "-o", output)
    assert (code, error(said)) == (2, f"cannot write {output}{NO_SPACE}")
    assert output.read_text() == "an old one"
    assert {file.name for file in disk.path.iterdir()} == {"runs", name}
    disk.resize(ROOM)
    assert disco(capsys, *command, disk.path / "runs", "-o", output)[0] == 0
    assert output.stat().st_size > 1000


def interrupt(capsys: pytest.CaptureFixture[str], out: Path, *command: object) -> Path:
    """Trains until there are two checkpoints; returns the run's folder."""
    with small_disk(out, ROOM) as disk, when(lambda: saved(out), disk.fill):
        assert disco(capsys, *command, "--out", out)[0] == 2
        (folder,) = (path.parents[1] for path in saved(out))
        kept = out.with_name("kept")
        shutil.copytree(out, kept)
    return kept / folder.name


def flip(path: Path, where: float) -> None:
    """Inverts eight bytes, as a fault of the disk might."""
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * where))
        old = file.read(8)
        file.seek(-8, 1)
        file.write(bytes(byte ^ 255 for byte in old))


def test_the_last_good_checkpoint_is_used_and_said(
    tmp_path: Path, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path)
    folder = interrupt(capsys, tmp_path / "runs", "train", config)
    latest = folder / CHECKPOINTS / checkpoint.LATEST
    flip(latest, 0.5)
    with pytest.warns(UserWarning, match=f"the checkpoint {latest} is damaged .*: went on from the one before"):
        assert disco(capsys, "train", config, "--out", folder.parent)[0] == 0
    head, lines, summary = records(folder.parent)[folder.name]
    assert any(f"{latest} is damaged" in note for note in summary.pop("notes"))
    assert {folder.name: (head, lines, summary)} == undisturbed


def test_without_a_good_checkpoint_nothing_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    folder = interrupt(capsys, tmp_path / "runs", "train", config)
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        flip(folder / CHECKPOINTS / name, 0.5)
    before = (folder / METRICS).read_bytes()
    code, said = disco(capsys, "train", config, "--out", folder.parent)
    assert code == 2
    assert "is damaged" in error(said)
    assert (folder / METRICS).read_bytes() == before


def test_a_corrupt_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, tokens = tmp_path / "texts", tmp_path / "tokens"
    texts.mkdir()
    for name, text in list(corpus.documents())[:12]:
        (texts / f"{name.replace('/', '-')}.txt").write_text(text)
    make = ("data", "prepare", texts, "--out", tokens, "--shard-bytes", "2^15", "--workers", 1)
    assert disco(capsys, *make)[0] == 0
    train = ("train", write_run(tmp_path, 2**14), "--data", tokens)
    assert disco(capsys, *train, "--out", tmp_path / "undisturbed")[0] == 0
    out = interrupt(capsys, tmp_path / "runs", *train).parent
    index, shards = (tokens / "index.json").read_bytes(), sorted(tokens.glob("shard-*.bin"))
    assert len(shards) > 3
    flip(shards[2], 0.5)
    before = {run.folder: (run.folder / METRICS).read_bytes() for run in read_runs(out).runs}
    for command in (("data", "check", tokens), (*train, "--out", out), (*train, "--out", tmp_path / "new")):
        code, said = disco(capsys, *command)
        assert code == 2
        assert error(said).startswith(
            f"shards are damaged: {shards[2]} is corrupt; run the same disco data prepare again"
        )
    assert {folder: (folder / METRICS).read_bytes() for folder in before} == before
    assert not list((tmp_path / "new").glob(f"*/{METRICS}")), "nothing was trained"
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    with pytest.warns(UserWarning, match=r"shard-000002.bin was lost or damaged; made it again"):
        assert disco(capsys, *make)[0] == 0
    assert [shard for shard in shards if shard.stat().st_mtime_ns != times[shard]] == [shards[2]]
    assert (tokens / "index.json").read_bytes() == index
    assert disco(capsys, "data", "check", tokens)[0] == 0
    assert disco(capsys, *train, "--out", out)[0] == 0
    assert records(out) == records(tmp_path / "undisturbed")
    assert all(read_run(folder).outcome == "finished" for folder in before)
