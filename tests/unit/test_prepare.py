"""Preparing data: text and tokenizers of all kinds, bad input, and a cache that survives neighbours and kills."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import polars
import pytest
from tokenizers import Tokenizer

from disco import corpus
from disco.errors import UserError
from disco.train import data, documents
from disco.train.config import DataConfig
from disco.train.data import TokenStream, prepare


def words(count: int, seed: int = 0) -> str:
    """``count`` random characters in words and lines; some take two or three bytes."""
    characters = [*"etaoinshrdlu", "é", "ß", "—", " ", " ", " ", "\n"]
    return "".join(np.random.default_rng(seed).choice(characters, count)) + "x\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three texts, each of another kind, and the text that they make."""
    folder = tmp_path_factory.mktemp("texts")
    texts = [words(2000, seed) for seed in range(5)]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b").mkdir()
    (folder / "b" / "records.jsonl").write_text("\n".join(json.dumps({"id": i, "text": texts[i]}) for i in (1, 2)))
    polars.DataFrame({"id": [3, 4], "text": texts[3:]}).write_parquet(folder / "c.parquet")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "notes.md").write_text("another kind of file")
    return folder, "".join(text + "\n\n" for text in texts)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def prepared(source, cache, **options):
    return prepare(DataConfig(source=(str(source),), **options), cache)


def tokens_of(config, cache):
    """All tokens of prepared data, read from the cache by hand."""
    meta = json.loads((cache / config.digest / "tokens.json").read_text())
    tokens = np.fromfile(cache / config.digest / "tokens.bin", dtype=meta["dtype"])
    assert len(tokens) == meta["tokens"]
    return tokens


# From text to tokens ---------------------------------------------------------------------------------------------


def test_bytes_round_trip(folder, cache):
    source, text = folder
    config = prepared(source, cache)
    assert config.vocab == 256
    assert tokens_of(config, cache).tobytes().decode() == text


@pytest.mark.parametrize("size", [300, 400])
def test_bpe_round_trip(folder, cache, size):
    source, text = folder
    config = prepared(source, cache, tokenizer=f"bpe:{size}")
    tokens = tokens_of(config, cache)
    assert (config.vocab, tokens.dtype) == (size, np.uint16)
    assert len(tokens) < 0.8 * len(text.encode())
    assert tokens.max() == size - 1  # the last merge is used
    tokenizer = Tokenizer.from_file(str(cache / config.digest / "tokenizer.json"))
    assert tokenizer.decode(tokens.tolist()) == text


def test_bpe_is_trained_alike_in_another_process(folder, cache, tmp_path):
    source, _ = folder
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply(prepare, (DataConfig(source=(str(source),), tokenizer="bpe:400"), tmp_path))
    assert other.digest == prepared(source, cache, tokenizer="bpe:400").digest


def test_tokenizer_file_gives_the_tokens_of_its_library_untruncated(folder, cache, tmp_path):
    source, _ = folder
    trained = prepared(source, cache, tokenizer="bpe:300")
    tokenizer = Tokenizer.from_file(str(cache / trained.digest / "tokenizer.json"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.enable_truncation(16)  # many published files come with a limit
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = prepared(source, cache, tokenizer=str(tmp_path / "tokenizer.json"))
    assert config.vocab == 301
    assert np.array_equal(tokens_of(config, cache), tokens_of(trained, cache))


def test_corpus(cache):
    config = prepare(DataConfig(), cache)
    assert tokens_of(config, cache).tobytes() == corpus.text()
    stream = TokenStream(config, cache, context=128, seed=0)
    assert stream.valid_tokens == 2**16
    assert stream.train_tokens >= 2**23 / 0.75  # a horizon of 2^23 tokens and the decay branch after it


def test_text_files_are_read_in_pieces_that_join_up(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    text = words(2000) + "x" * 1000 + "\r\nlast line, without an end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(documents.pieces([tmp_path / "a.txt"], "text"))
    assert "".join(pieces) == text + "\n\n"
    assert len(pieces) > 20
    assert max(map(len, pieces)) <= 200


def test_parquet_is_read_in_slices_that_join_up(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROWS", 7)
    texts = [str(i) for i in range(50)]
    polars.DataFrame({"body": texts}).write_parquet(tmp_path / "a.parquet")
    assert "".join(documents.pieces([tmp_path / "a.parquet"], "body")) == "".join(f"{text}\n\n" for text in texts)


def test_digest_depends_on_text_and_tokenizer_not_on_path_or_kind_of_file(folder, cache, tmp_path):
    source, text = folder
    digest = prepared(source, cache).digest
    (tmp_path / "other.txt").write_text(text.removesuffix("\n\n"))
    same = prepared(tmp_path / "other.txt", cache)
    assert same.digest == digest
    assert prepared(source, cache, tokenizer="bpe:300").digest != digest
    (tmp_path / "other.txt").write_text(text.removesuffix("\n\n")[:-1] + "!")
    assert prepared(tmp_path / "other.txt", cache).digest != digest


def test_changed_text_of_the_same_size_and_time_is_noticed(cache, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(words(100, seed=1))
    before, times = prepared(file, cache), file.stat()
    time.sleep(0.02)  # past the resolution of file times
    file.write_text(words(100, seed=1).replace("e", "a"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert prepared(file, cache).digest != before.digest
    with pytest.raises(UserError, match=r"text or its tokenizer has changed: digest \w{12}, expected \w{12}"):
        prepare(before, tmp_path / "elsewhere")
    assert prepare(before, cache) == before, "its tokens are still in the cache"


# Bad input -----------------------------------------------------------------------------------------------------


def parquet(path: Path, **columns) -> None:
    polars.DataFrame(columns).write_parquet(path)


BAD = {
    "missing": (lambda p: p / "no.txt", r"no such file or folder: .*no\.txt; data\.source names"),
    "empty": (lambda p: write(p / "a.txt", b""), r"a\.txt is empty: it holds no text"),
    "blank": (lambda p: write(p / "a.txt", b" \n\n"), r"a\.txt is empty: it holds no text"),
    "no records": (lambda p: write(p / "a.jsonl", b"\n"), r"a\.jsonl is empty: it holds no text"),
    "no rows": (lambda p: parquet(p / "a.parquet", text=[""]) or p / "a.parquet", r"a\.parquet is empty"),
    "NUL": (lambda p: write(p / "a.txt", b"MZ\0\0"), r"a\.txt is binary: it holds NUL bytes"),
    "not UTF-8": (lambda p: write(p / "a.txt", b"caf\xe9 au lait"), r"a\.txt is not UTF-8 text \(invalid continuation"),
    "empty folder": (lambda p: p, r"holds no \.txt, \.jsonl or \.parquet files"),
    "suffix": (
        lambda p: write(p / "a.csv", b"a,b"),
        r"a\.csv has an unknown suffix '\.csv'; data are \.txt, \.jsonl or",
    ),
    "not JSON": (lambda p: write(p / "a.jsonl", b'{"text": "a"}\n{"text"'), r"a\.jsonl:2: this line is not JSON"),
    "not an object": (lambda p: write(p / "a.jsonl", b"\n[1]"), r"a\.jsonl:2: this line is not a JSON object"),
    "no field": (
        lambda p: write(p / "a.jsonl", b'{"body": "a", "id": 1}'),
        r"a\.jsonl:1: no field 'text'; the fields are body, id",
    ),
    "field of another type": (lambda p: write(p / "a.jsonl", b'{"text": 5}'), r"a\.jsonl:1: field 'text' is not text"),
    "surrogate": (
        lambda p: write(p / "a.jsonl", rb'{"text": "\ud800"}'),
        r"a\.jsonl:1: field 'text' is not valid Unicode",
    ),
    "jsonl not UTF-8": (lambda p: write(p / "a.jsonl", b'{"text": "\xe9"}'), r"a\.jsonl:1: this line is not JSON"),
    "deep": (lambda p: write(p / "a.jsonl", b"[" * 100_000), r"a\.jsonl:1: this line is not JSON"),
    "not parquet": (lambda p: write(p / "a.parquet", b"PAR2"), r"a\.parquet is not a readable \.parquet file"),
    "no column": (
        lambda p: parquet(p / "a.parquet", body=["a"]) or p / "a.parquet",
        r"a\.parquet has no column 'text'; the columns are body",
    ),
    "column of another type": (
        lambda p: parquet(p / "a.parquet", text=[1]) or p / "a.parquet",
        r"a\.parquet: column 'text' is not text but Int64",
    ),
    "null": (
        lambda p: parquet(p / "a.parquet", text=["a", None]) or p / "a.parquet",
        r"a\.parquet: row 2 has no 'text'",
    ),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_text(tmp_path, make, message):
    (tmp_path / "in").mkdir()
    source, cache = make(tmp_path / "in"), tmp_path / "cache"
    with pytest.raises(UserError, match=message) as caught:
        prepared(source, cache)
    assert "\n" not in str(caught.value)
    assert [path.name for path in cache.rglob("*") if path.name not in ("sources", "lock")] == []


def test_named_twice(folder, cache):
    source, _ = folder
    with pytest.raises(UserError, match=r"a\.txt is named 2 times in data\.source; the training text must not repeat"):
        prepare(DataConfig(source=(str(source), str(source / "a.txt"))), cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the tokenizer .*tokenizer.json: No such file or directory"),
        (b"", "tokenizer.json is not a Hugging Face tokenizer.json: "),
        (b'{"a": 1}', "tokenizer.json is not a Hugging Face tokenizer.json: "),
        (
            b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}',
            "the tokenizer cannot encode the text: ",
        ),
    ],
)
def test_bad_tokenizer(folder, tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepared(folder[0], tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(caught.value)


def test_text_too_short_for_the_bpe(tmp_path):
    (tmp_path / "a.txt").write_text("the cat and the hat")
    with pytest.raises(UserError, match=r"the text yields only 2\d\d BPE tokens, not bpe:1000; ask for fewer"):
        prepared(tmp_path / "a.txt", tmp_path / "cache", tokenizer="bpe:1000")


def test_unwritable_cache(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the cache .*cache: Not a directory; choose another folder"):
        prepared(folder[0], tmp_path / "file" / "cache")


# The cache ---------------------------------------------------------------------------------------------------------


def test_second_call_reads_no_text(folder, tmp_path, monkeypatch):
    first = prepared(folder[0], tmp_path)
    monkeypatch.setattr(documents, "pieces", lambda *_: pytest.fail("read the text again"))
    assert prepared(folder[0], tmp_path) == first
    assert prepare(first, tmp_path) == first


def test_known_digest_needs_no_sources_while_its_tokens_are_intact(tmp_path):
    write(tmp_path / "a.txt", words(100).encode())
    config, cache = prepared(tmp_path / "a.txt", tmp_path / "cache"), tmp_path / "cache"
    (tmp_path / "a.txt").rename(tmp_path / "moved.txt")
    assert prepare(config, cache) == config
    (cache / config.digest / "tokens.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no such file or folder: .*a\.txt"):
        prepare(config, cache)


@pytest.mark.parametrize("harm", ["flip", "cut", "lose", "garble"])
def test_damaged_tokens_are_made_again(folder, tmp_path, harm):
    config = prepared(folder[0], tmp_path)
    tokens, meta = tmp_path / config.digest / "tokens.bin", tmp_path / config.digest / "tokens.json"
    content = bytearray(tokens.read_bytes())
    if harm == "flip":
        tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif harm == "cut":
        tokens.write_bytes(content[:-1])
    elif harm == "lose":
        tokens.unlink()
    else:
        meta.write_text("{")
    with pytest.warns(UserWarning, match="was damaged; made it again"):
        assert prepared(folder[0], tmp_path) == config
    assert tokens.read_bytes() == content
    with warnings.catch_warnings(action="error"):
        prepared(folder[0], tmp_path)


def test_tokens_whose_writer_was_killed_before_it_said_so_are_found(folder, tmp_path):
    config = prepared(folder[0], tmp_path)
    (known,) = (tmp_path / "sources").iterdir()
    known.rename(tmp_path / "unfinished.json")
    written = (tmp_path / config.digest).stat().st_mtime_ns
    with warnings.catch_warnings(action="error"):
        assert prepared(folder[0], tmp_path) == config
    assert (tmp_path / config.digest).stat().st_mtime_ns == written
    assert list((tmp_path / "sources").iterdir()) == [known]


CHILD = """
import sys, time
from pathlib import Path
from disco.train import data, documents
from disco.train.config import DataConfig

source, cache, stop, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
original, build = documents.pieces, data._build

def pieces(*arguments):
    for number, piece in enumerate(original(*arguments)):
        if number == stop:
            print("writing", flush=True)
            time.sleep(seconds)
        yield piece

def counted(*arguments):
    print("building", flush=True)
    return build(*arguments)

documents.pieces, data._build = pieces, counted
print("ready", flush=True)
sys.stdin.readline()
print(data.prepare(DataConfig(source=(source,)), cache).digest, flush=True)
"""


@pytest.fixture
def child(folder, tmp_path):
    """Starts processes that prepare once they get a line; they sleep before they write piece ``stop``."""
    started = []

    def start(stop: int, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(folder[0]), str(tmp_path), str(stop), str(seconds)]
        environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_several_processes_at_once_build_once(child, folder, cache, tmp_path):
    children = [child(stop=1, seconds=0.3) for _ in range(4)]
    assert [process.stdout.readline() for process in children] == 4 * ["ready\n"]
    for process in children:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = "".join(process.communicate(timeout=60)[0] for process in children)
    assert said.count("building") == 1
    assert re.findall(r"\w{64}", said) == 4 * [prepared(folder[0], cache).digest]


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_killed_while_it_writes(child, folder, cache, tmp_path, stop):
    process = child(stop, seconds=60)
    process.stdin.write("go\n")
    process.stdin.flush()
    assert [process.stdout.readline() for _ in range(3)] == ["ready\n", "building\n", "writing\n"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "unfinished" / "tokens.bin").exists()
    assert list(tmp_path.glob("*/tokens.json")) == []
    config = prepared(folder[0], tmp_path)
    assert config == prepared(folder[0], cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([config.digest, "lock", "sources"])
