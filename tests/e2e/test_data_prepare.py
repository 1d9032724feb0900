"""``disco data prepare`` as a process: killed, out of space, on a data set of the hub, and what trains on it."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from benchmarks.data_prepare import Memory, write_texts
from sweeps import children, write_study

from disco import corpus
from disco.cli import main
from disco.errors import UserError
from disco.train.shards import index as index_file
from disco.train.shards.prepare import Request, prepare_folder

SPARE = 4
"""Tries for each kill: some come too late."""


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "disco", "data", "prepare", str(source), "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(out: Path) -> int:
    """Shards that are finished."""
    path = out / "progress.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def checksums(out: Path) -> dict[str, str]:
    files = [*out.glob("shard-*"), out / "index.json", out / "tokenizer.json"]
    return {path.name: index_file.checksum(path) for path in files}


def kill(process: subprocess.Popen[str], whom: str) -> None:
    """Kills the command, a worker if it has any by now, or all."""
    workers = children(process.pid)
    for pid in {"parent": [process.pid], "worker": workers[:1] or [process.pid], "all": [process.pid, *workers]}[whom]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The embedded corpus, a file for each document."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in list(corpus.documents())[:40]:
        (folder / f"{name.replace('/', '-')}.txt").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("kills", "megabytes"), [pytest.param(4, 0, id="few"), pytest.param(10, 200, id="ten", marks=pytest.mark.full)]
)
def test_killed_at_random_moments_the_shards_are_the_same(tmp_path, texts, kills, megabytes, capsys):
    source, options = texts, ["--tokenizer", "bpe:1024", "--sample", "2^19", "--shard-bytes", "2^17"]
    if megabytes:
        source, options = tmp_path / "text", ["--tokenizer", "bpe:16384", "--shard-bytes", "2^21"]
        size = write_texts(source, megabytes * 10**6)
    undisturbed = start(source, tmp_path / "undisturbed", *options, "--workers", "1")
    begun, memory = time.monotonic(), Memory(undisturbed.pid)
    errors = undisturbed.communicate()[1]
    assert undisturbed.returncode == 0, errors
    seconds, shards = time.monotonic() - begun, finished(tmp_path / "undisturbed")

    chance, killed, midway, disturbed = random.Random(kills), 0, 0, tmp_path / "disturbed"
    for _ in range(SPARE * kills):
        before = finished(disturbed)
        process = start(source, disturbed, *options, "--workers", "2")
        wait = chance.random() < 0.75  # otherwise the kill may hit the start
        while wait and finished(disturbed) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, seconds / kills))
        whom = chance.choice(["parent", "worker", "all"])
        if process.poll() is None:
            kill(process, whom)
            killed += 1
            midway += 0 < finished(disturbed) < shards
        said = process.communicate()[1]
        assert process.returncode in (-signal.SIGKILL, 2, 0), said
        if process.returncode == 2:
            assert "a worker was killed by signal 9" in said
        assert finished(disturbed) >= before, "nothing that was finished is lost"
        if killed == kills:
            break
    assert killed == kills
    assert midway > 0
    last = start(source, disturbed, *options, "--workers", "2")
    errors = last.communicate()[1]
    assert last.returncode == 0, errors
    assert checksums(disturbed) == checksums(tmp_path / "undisturbed")
    assert not list(disturbed.glob(".*.tmp"))
    assert memory.stop() < 10**9
    if megabytes:
        with capsys.disabled():
            print(
                f"\n{size:,} bytes, {shards} shards, {seconds:.0f} s undisturbed, {memory.peak / 1e6:.0f} MB of memory"
            )
            print(f"{killed} kills, {midway} of them between the first shard and the last")


def test_two_at_once(tmp_path, texts):
    first = start(texts, tmp_path / "out", "--shard-bytes", "2^14")
    while not finished(tmp_path / "out"):
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=rf"out is in use by process {first.pid}; wait for it"):
        prepare_folder(Request(source=(str(texts),), shard_bytes=2**14), tmp_path / "out")
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0


def test_a_full_disk_loses_nothing(texts):
    """On a tmpfs of 1 MB, which needs root or a user namespace; then with room, as another process would find it."""
    with tempfile.TemporaryDirectory() as name:
        script = f"""
            set -e
            mount -t tmpfs -o size=1m tmpfs {name}
            cd {name}
            prepare() {{ {sys.executable} -m disco data prepare {texts} --out out --shard-bytes 2^17 --workers 2; }}
            prepare 2>full.txt && exit 9 || test $? -eq 2
            tail -n 1 full.txt; ls out | grep -c ^shard; wc -l <out/progress.jsonl; ls -A out | grep -c tmp || true
            mount -o remount,size=64m tmpfs {name}
            touch mark; prepare 2>&1; find out -name 'shard*' ! -newer mark | wc -l
            {sys.executable} -m disco data check out --json
        """
        ran = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script], capture_output=True
        )
    assert ran.returncode == 0, f"no user namespace with a tmpfs on this machine? {ran.stderr.decode()}"
    error, shards, lines, temporary, *_, kept, checked = ran.stdout.decode().splitlines()
    assert error.startswith("disco: error: cannot write ")
    assert "No space left on device" in error
    assert int(shards) >= int(lines) >= 2
    assert temporary == "0"
    assert int(kept) >= int(lines), "what was finished is not made again"
    assert json.loads(checked)["tokens"] == sum(len(path.read_text().encode()) + 2 for path in texts.iterdir())


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """A data set that ``datasets`` streams from a folder: no network in tests."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    for part in range(3):
        records = [json.dumps({"body": f"document {document} of part {part}"}) for document in range(4)]
        (tmp_path / "set" / f"train-{part}.jsonl").write_text("\n".join(records))
    source = f"hf:{tmp_path / 'set'}"
    request = Request(source=(source,), text_field="body")
    index = prepare_folder(request, tmp_path / "out", workers=2)
    expected = "".join(f"document {d} of part {p}\n\n" for p in range(3) for d in range(4))
    assert b"".join((tmp_path / "out" / s.file).read_bytes() for s in index.shards).decode() == expected
    assert [shard.documents for shard in index.shards] == [4, 4, 4]
    with pytest.raises(UserError, match=r"part 1, row 1: no text in 'text'; the fields are body"):
        prepare_folder(Request(source=(source,)), tmp_path / "other")
    with pytest.raises(UserError, match=r"cannot read hf:.*@test: ValueError: Bad split: test"):
        prepare_folder(Request(source=(source + "@test",)), tmp_path / "other")
    with pytest.raises(UserError, match="a data set is named hf:NAME"):
        prepare_folder(Request(source=("hf:",)), tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no source; name a folder, files, or hf:NAME"),
        (["no.txt"], "no such file or folder: no.txt"),
        (["a.txt", "--shard-bytes", "0"], "--shard-bytes must be a positive whole number, got '0'"),
        (["a.txt", "--sample", "2^0.5"], "--sample must be a positive whole number, got '2^0.5'"),
        (["a.txt", "--workers", "0"], "--workers must be 1 or more, got 0"),
        (["a.txt", "--tokenizer", "a.txt"], "a tokenizer is bytes, bpe:SIZE or a tokenizer.json, got 'a.txt'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    assert main(["data", "prepare", *arguments, "--out", "made"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["a.txt"]


def test_runs_and_sweeps_train_on_a_prepared_folder(tmp_path, texts, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["data", "prepare", str(texts), "--out", "made", "--tokenizer", "bpe:300", "--shard-bytes", "2^18"]
    assert main([*command, "--sample", "2^17", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    study = write_study(Path("study.toml"), "[axes]\nlr = ['2^-4', '2^-3']\n", horizon=1024)
    study.write_text(study.read_text().replace("data = {", "data = { source = 'made',"))
    assert main(["sweep", "run", str(study), "--out", "sweep", "--workers", "1"]) == 0
    assert "2 finished, 0 diverged, 0 failed" in capsys.readouterr().out
    (config,) = {json.dumps(json.loads(p.read_text())["config"]["data"]) for p in Path("sweep").glob("*/config.json")}
    assert json.loads(config)["digest"] == made["digest"]
    table = study.read_text().partition("[axes]")[0].replace('name = "tiny"', "").replace("[base]", "")
    Path("run.toml").write_text(table.replace("'made'", "'corpus'"))
    assert main(["train", "run.toml", "--data", "made", "--out", "runs", "--json"]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((Path(run["folder"]) / "config.json").read_text())["config"]["data"]["digest"] == made["digest"]
    assert main(["data", "check", "made"]) == 0
    assert f"{made['tokens']:,} tokens of 300 kinds (bpe:300) from 40 documents" in capsys.readouterr().out
    Path("made/shard-000001.bin").write_bytes(b"")
    assert main(["data", "check", "made"]) == 2
    assert "shards are damaged: made/shard-000001.bin is corrupt" in capsys.readouterr().err
    assert main(["train", "run.toml", "--data", "made", "--out", "others", "--json"]) == 2
    assert "shard-000001.bin is corrupt" in capsys.readouterr().err
