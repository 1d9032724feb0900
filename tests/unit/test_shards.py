"""Shards: the tokens of the small path, whatever the workers and the cuts; bad input; damage; folders that go on."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import polars
import pytest
from tokenizers import Tokenizer

from disco.errors import UserError
from disco.train import documents
from disco.train.config import DataConfig
from disco.train.data import prepare
from disco.train.documents import Span
from disco.train.shards import index as index_file
from disco.train.shards import plan, worker
from disco.train.shards.prepare import Request, prepare_folder


def words(count: int, seed: int = 0) -> str:
    """``count`` random characters in words and lines; some take two or three bytes."""
    characters = [*"etaoinshrdlu", "é", "ß", "—", " ", " ", " ", "\n"]
    return "".join(np.random.default_rng(seed).choice(characters, count)) + "x\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with files of all kinds, large and small."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(words(20_000))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": words(300, i)}) for i in range(50)) + "\n")
    polars.DataFrame({"text": [words(200, i) for i in range(70)]}).write_parquet(folder / "c.parquet")
    for number in range(20):
        (folder / f"d{number:02d}.txt").write_text(words(100, number))
    (folder / "empty.txt").write_text("")
    return folder


def request(source: Path, **options) -> Request:
    return Request(source=(str(source),), **{"shard_bytes": 7000, **options})


def read(folder: Path, index: index_file.Index) -> np.ndarray:
    return np.concatenate([np.fromfile(folder / shard.file, index.stored) for shard in index.shards])


def contents(folder: Path) -> dict[str, bytes]:
    """Files that must not depend on how the folder was made."""
    names = ["index.json", *([index_file.TOKENIZER] if (folder / index_file.TOKENIZER).exists() else [])]
    return {path.name: path.read_bytes() for path in [*folder.glob("shard-*"), *(folder / name for name in names)]}


# From text to shards -------------------------------------------------------------------------------------------------


def test_bytes_are_the_text_and_do_not_depend_on_the_number_of_workers(source, tmp_path):
    one = prepare_folder(request(source), tmp_path / "one")
    text = "".join(documents.pieces([p for p in documents.files([str(source)]) if p.stat().st_size], "text"))
    assert read(tmp_path / "one", one).astype(np.uint8).tobytes().decode() == text
    assert len(one.shards) > 8
    assert sum(shard.documents for shard in one.shards) == 1 + 50 + 70 + 20
    assert (one.vocab, one.dtype, one.tokenizer, one.boundary) == (256, "uint8", "bytes", "\n\n")
    many = prepare_folder(request(source), tmp_path / "many", workers=3)
    assert many == one
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_tokens_of_documents_are_those_of_the_small_path(source, tmp_path):
    """With the same tokenizer and files that are not cut, the shards hold what train.data.prepare would."""
    (source / "empty.txt").rename(tmp_path / "empty.txt")
    small = prepare(DataConfig(source=(str(source),), tokenizer="bpe:400"), tmp_path / "cache")
    (tmp_path / "empty.txt").rename(source / "empty.txt")
    tokenizer = tmp_path / "cache" / small.digest / "tokenizer.json"
    index = prepare_folder(request(source, tokenizer=str(tokenizer), shard_bytes=40_000), tmp_path / "shards")
    assert len(index.shards) > 1
    expected = np.fromfile(tmp_path / "cache" / small.digest / "tokens.bin", np.uint16)
    assert np.array_equal(read(tmp_path / "shards", index), expected)


def test_bpe_is_trained_on_a_sample_and_documents_end_with_a_token(source, tmp_path):
    options = {"tokenizer": "bpe:400", "boundary": "<|end|>", "sample": 20_000}
    index = prepare_folder(request(source, **options), tmp_path / "a")
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    tokens = read(tmp_path / "a", index)
    end = tokenizer.token_to_id("<|end|>")
    assert np.sum(tokens == end) == 141
    text = "".join(documents.pieces([p for p in documents.files([str(source)]) if p.stat().st_size], "text"))
    decoded = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert decoded.replace("<|end|>", "\n\n") == text
    assert (index.vocab, index.dtype, index.boundary) == (400, "uint16", "<|end|>")
    assert index.tokenizer_sha256 == index_file.checksum(tmp_path / "a" / "tokenizer.json")


def test_long_documents_are_encoded_in_parts_that_join_up(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "WHOLE", 100)
    monkeypatch.setattr(worker, "BATCH", 250)
    text = words(3000) + "x" * 1000 + "\r\nlast line, without an end"
    (tmp_path / "a.txt").write_text(text, newline="")
    (tmp_path / "out").mkdir()
    parts = list(worker.cut(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) == 100
    maker = worker.Maker(tmp_path / "out", "text", "\n\n")
    shard, made = maker.make("s.bin", plan.Unit((Span(tmp_path / "a.txt"),)), None)
    assert made
    assert (tmp_path / "out" / "s.bin").read_bytes().decode() == text + "\n\n"
    assert (shard.tokens, shard.documents) == (len(text.encode()) + 2, 1)


def test_files_are_cut_between_lines_rows_or_characters(tmp_path):
    (tmp_path / "lines.txt").write_text(words(5000))
    (tmp_path / "one_line.txt").write_text("é—x" * 2000)
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"text": words(n)}) for n in (10, 3000, *range(300, 310))))
    polars.DataFrame({"text": [words(90, i) for i in range(50)]}).write_parquet(tmp_path / "c.parquet")
    for path in tmp_path.iterdir():
        units = list(plan.units(plan.identities([str(path)]), 1000))
        assert all(len(unit.parts) == 1 for unit in units)
        spans = [unit.parts[0] for unit in units]
        assert (spans[0].start, spans[-1].stop) == (0, None)
        assert [span.stop for span in spans[:-1]] == [span.start for span in spans[1:]]
        whole = "".join(documents.pieces([path], "text"))
        assert "".join(text for span in spans for text in documents.read(span, "text")) == whole
        assert len(spans) > 2
    assert list(map(plan.Unit.from_json, (unit.to_json() for unit in units))) == units


def test_small_files_share_a_shard(source):
    units = list(plan.units(plan.identities([str(source)]), 7000))
    small = [unit for unit in units if len(unit.parts) > 1]
    assert sum(len(unit.parts) for unit in small) >= 20
    assert not any(span.path.name == "empty.txt" for unit in units for span in unit.parts)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_an_error_in_a_cut_file_names_its_line_and_keeps_what_is_finished(tmp_path):
    lines = [json.dumps({"text": words(300, i)}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:33], "{broken", *lines[33:]]))
    with pytest.raises(UserError, match=r"a\.jsonl:34: this line is not JSON"):
        prepare_folder(request(tmp_path / "a.jsonl", shard_bytes=2000), tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    shards = len(list((tmp_path / "out").glob("shard-*.bin")))
    assert shards >= 4
    assert len((tmp_path / "out" / "progress.jsonl").read_text().splitlines()) == shards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ()}, "no source; name a folder"),
        ({"tokenizer": "gpt2"}, "a tokenizer is bytes, bpe:SIZE or a tokenizer.json, got 'gpt2'"),
        ({"tokenizer": "bpe:256"}, "needs a SIZE above 256"),
        ({"boundary": "<|end|>"}, "bytes have no special token '<|end|>'"),
        ({"shard_bytes": 0}, "shard bytes must be 1 or more, got 0"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        Request(**{"source": ("corpus",), **options})


def test_sources_that_cannot_be_prepared(source, tmp_path):
    for names, message in (
        ([tmp_path / "no.txt"], "no such file or folder"),
        ([source / "empty.txt"], "all files are empty"),
        ([source, source / "a.txt"], "is named 2 times"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_folder(Request(source=tuple(map(str, names))), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for tokenizer in ("no.json", str(source / "a.txt") + ".json"):
        with pytest.raises(UserError, match="cannot read the tokenizer"):
            prepare_folder(request(source, tokenizer=tokenizer), tmp_path / "out")


def test_a_token_to_end_documents_that_is_not_there(source, tmp_path):
    prepare_folder(request(source, tokenizer="bpe:300"), tmp_path / "a")
    tokenizer = str(tmp_path / "a" / "tokenizer.json")
    with pytest.raises(UserError, match=r"has no token '<\|end\|>' to end documents with"):
        prepare_folder(request(source, tokenizer=tokenizer, boundary="<|end|>"), tmp_path / "b")


# Folders that go on --------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_left_as_it_is(source, tmp_path):
    index = prepare_folder(request(source), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    with warnings.catch_warnings(action="error"):
        assert prepare_folder(request(source), tmp_path) == index
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_damaged_and_lost_shards_are_made_again_alone(source, tmp_path):
    index = prepare_folder(request(source), tmp_path)
    whole = contents(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    flipped, lost, cut = (tmp_path / index.shards[number].file for number in (0, 3, 5))
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    lost.unlink()
    os.truncate(cut, 100)
    with pytest.raises(UserError, match=r"000000\.bin is corrupt, .*000003\.bin: No such .*, .*000005\.bin is corrupt"):
        index_file.verify(tmp_path, index, {})
    with pytest.warns(UserWarning, match="was lost or damaged; made it again") as caught:
        assert prepare_folder(request(source), tmp_path) == index
    assert len(caught) == 3
    assert contents(tmp_path) == whole
    made = {name for name, time in times.items() if (tmp_path / name).stat().st_mtime_ns != time}
    assert made == {flipped.name, lost.name, cut.name}
    assert len(index_file.verify(tmp_path, index, {})) == len(index.shards)


def test_what_a_killed_process_leaves_is_finished_to_the_same_bytes(source, tmp_path):
    """Its state by hand: some shards said, one there but unsaid, a line and a temporary file that were cut."""
    whole, left = tmp_path / "whole", tmp_path / "left"
    index = prepare_folder(request(source, tokenizer="bpe:300"), whole)
    left.mkdir()
    for name in ("plan.json", "tokenizer.json", *(shard.file for shard in index.shards[:3])):
        (left / name).write_bytes((whole / name).read_bytes())
    lines = (whole / "progress.jsonl").read_bytes().splitlines(keepends=True)
    (left / "progress.jsonl").write_bytes(lines[0] + lines[1] + lines[2][:20])
    (left / ".shard-000004.bin.123.tmp").write_bytes(b"half")
    seen = []
    with warnings.catch_warnings(action="error"):
        done = prepare_folder(request(source, tokenizer="bpe:300"), left, 2, lambda *numbers: seen.append(numbers))
    assert done == index
    assert contents(left) == contents(whole)
    assert not list(left.glob(".*.tmp"))
    assert len((left / "progress.jsonl").read_bytes().splitlines()) == len(index.shards)
    assert seen[-1] == (len(index.shards), len(index.shards), index.tokens)


def test_another_plan_is_not_continued(tmp_path):
    (tmp_path / "a.txt").write_text(words(1000))
    prepare_folder(request(tmp_path / "a.txt"), tmp_path / "out")
    for options, what in (({"tokenizer": "bpe:300"}, "tokenizer"), ({"shard_bytes": 500}, "shard_bytes")):
        with pytest.raises(UserError, match=f"out holds data made with another {what}; choose another folder"):
            prepare_folder(request(tmp_path / "a.txt", **options), tmp_path / "out")
    (tmp_path / "a.txt").write_text(words(1001))
    with pytest.raises(UserError, match="out holds data made with another source"):
        prepare_folder(request(tmp_path / "a.txt"), tmp_path / "out")


def test_without_a_plan_nothing_that_another_left_is_used(tmp_path):
    """As after a kill between tokenizer and plan, or when somebody deleted the plan."""
    (tmp_path / "a.txt").write_text(words(3000))
    prepare_folder(request(tmp_path / "a.txt", tokenizer="bpe:300", shard_bytes=1000), tmp_path / "out")
    (tmp_path / "out" / "plan.json").unlink()
    index = prepare_folder(request(tmp_path / "a.txt", shard_bytes=1000), tmp_path / "out")
    assert read(tmp_path / "out", index).astype(np.uint8).tobytes().decode() == words(3000) + "\n\n"
    assert index.tokenizer_sha256 is None


def test_a_text_that_gives_other_tokens_than_before_is_not_mixed_in(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("aaaa\n" * 100)
    times = path.stat()
    index = prepare_folder(request(path), tmp_path / "out")
    (tmp_path / "out" / index.shards[0].file).unlink()
    path.write_text("bbbb\n" * 100)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"the text of shard-000000\.bin is not what it was"):
        prepare_folder(request(path), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-30], "is damaged; delete it"),
        (lambda text: text.replace('"vocab": 256', '"vocab": 257'), "its digest is not that of its shards"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "made by another version"),
        (lambda text: "[]", "is damaged; delete it"),
    ],
)
def test_a_damaged_index(tmp_path, change, message):
    (tmp_path / "a.txt").write_text("some text")
    index = prepare_folder(request(tmp_path / "a.txt"), tmp_path / "out")
    path = tmp_path / "out" / "index.json"
    assert index_file.load(tmp_path / "out") == index
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        index_file.load(tmp_path / "out")
