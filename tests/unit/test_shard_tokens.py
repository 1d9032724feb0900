"""Reading shards and .bin files: the same interface and promises as the small path, at any size and world."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from disco.errors import UserError
from disco.train.config import DataConfig, ModelConfig, TrainConfig
from disco.train.data import TokenStream, check, prepare
from disco.train.shards import index as index_file
from disco.train.shards import tokens
from disco.train.shards.prepare import Request, prepare_folder

CONTEXT, COUNT = 8, 3000


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A folder of shards of odd sizes over the tokens 0, 1, 2, ..., so that a token says where it stands."""
    folder = tmp_path_factory.mktemp("numbered")
    sizes, shards, start = [1, 700, 3, 0, 5, 1291, 1000], [], 0
    for number, size in enumerate(sizes):
        path = folder / f"shard-{number:06d}.bin"
        np.arange(start, start + size, dtype="<u2").tofile(path)
        shards.append(index_file.Shard(file=path.name, tokens=size, sha256=index_file.checksum(path)))
        start += size
    assert start == COUNT
    index_file.write(folder, index_file.Index(vocab=COUNT, dtype="uint16", shards=tuple(shards)))
    return folder


@pytest.fixture
def stream(numbered, tmp_path):
    def open_(seed=0, repeat=1, **options):
        config = prepare(DataConfig(source=(str(numbered),), valid_tokens=10 * CONTEXT, **options), tmp_path / "cache")
        assert config.vocab == COUNT
        return TokenStream(config, tmp_path / "cache", context=CONTEXT, seed=seed, repeat=repeat)

    return open_


def all_batches(stream, batch, **part):
    steps = stream.usable_tokens // batch
    return np.concatenate([stream.batch(step, batch, **part)[0] for step in range(steps)])


# The stream over shards ----------------------------------------------------------------------------------------------


def test_every_block_comes_once_across_shards_and_train_and_valid_share_no_token(stream):
    trained, held = all_batches(stream(), CONTEXT), stream().valid_blocks()[0]
    assert trained.size == stream().train_tokens == (333 - 10) * CONTEXT
    blocks = np.concatenate([trained, held])
    assert np.array_equal(np.sort(blocks[:, 0]), np.arange(333) * (CONTEXT + 1))
    assert np.array_equal(blocks, blocks[:, :1] + np.arange(CONTEXT))  # also those that lie in two or four shards
    for inputs, targets in (stream().batch(3, 4 * CONTEXT), stream().valid_blocks()):
        assert np.array_equal(targets, inputs + 1)
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.flags.c_contiguous
        assert targets.flags.c_contiguous


def test_order_is_shuffled_and_another_with_another_seed(stream):
    orders = [all_batches(stream(seed), CONTEXT)[:, 0] // (CONTEXT + 1) for seed in range(4)]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 4 / np.sqrt(len(order))
        assert all(np.mean(order == other) < 0.05 for other in orders[:number])


def test_batch_sizes_and_steps_asked_for_in_any_order_see_the_same_blocks(stream):
    one = all_batches(stream(5), CONTEXT)
    for rows in (2, 3, 16):
        many = all_batches(stream(5), rows * CONTEXT)
        assert np.array_equal(many, one[: len(many)])
    resumed = stream(5)
    for step in (11, 12, 3):
        assert np.array_equal(resumed.batch(step, 4 * CONTEXT)[0], one[4 * step : 4 * step + 4])


def test_ranks_split_a_batch_and_a_run_resumes_at_another_world_size(stream):
    whole = [stream().batch(step, 12 * CONTEXT) for step in range(9)]
    for step, ranks in enumerate([1, 1, 2, 2, 4, 4, 12, 3, 1]):
        parts = [stream().batch(step, 12 * CONTEXT, rank=rank, ranks=ranks) for rank in range(ranks)]
        for side in (0, 1):
            assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[step][side])
    with pytest.raises(UserError, match="a batch of 12 sequences cannot be split over 5 data ranks alike"):
        stream().batch(0, 12 * CONTEXT, rank=0, ranks=5)


@pytest.mark.parametrize("kind", ["shards", "small"])
def test_text_repeats_only_if_asked_in_passes_that_are_whole_and_of_another_order(stream, tmp_path, kind):
    if kind == "small":
        (tmp_path / "text.txt").write_bytes(bytes(range(1, 251)).decode("latin-1").encode()[:450])
        config = prepare(DataConfig(source=(str(tmp_path / "text.txt"),), valid_tokens=16), tmp_path / "cache")
        once, thrice = (TokenStream(config, tmp_path / "cache", context=8, seed=0, repeat=n) for n in (1, 3))
    else:
        once, thrice = stream(), stream(repeat=3)
    blocks = once.train_tokens // CONTEXT
    with pytest.raises(UserError, match=r"that can be trained on without repeating; use more text"):
        once.batch(blocks, CONTEXT)
    rows = all_batches(thrice, 7 * CONTEXT)
    assert len(rows) == 3 * blocks // 7 * 7
    first = all_batches(once, CONTEXT)
    passes = [rows[:blocks], rows[blocks : 2 * blocks]]
    assert np.array_equal(passes[0], first)
    assert sorted(map(tuple, passes[1])) == sorted(map(tuple, first))
    assert np.mean((passes[1] == first).all(axis=1)) < 0.1
    with pytest.raises(UserError, match=r"that can be trained on in 3 passes; use more text"):
        thrice.batch(3 * blocks, CONTEXT)
    assert thrice.passes(thrice.train_tokens * 5 // 2) == pytest.approx(2.5)
    model = ModelConfig(width=32, head_size=32, context=CONTEXT)
    config = TrainConfig(model=model, batch=8, horizon=3 * thrice.train_tokens)
    check(config, thrice)
    with pytest.raises(UserError, match="to train on without repeating"):
        check(config, once)


def test_more_shards_than_are_mapped_at_once(stream, monkeypatch):
    whole = all_batches(stream(), CONTEXT)
    monkeypatch.setattr(tokens, "MAPS", 2)
    assert np.array_equal(all_batches(stream(), CONTEXT), whole)


def test_the_order_never_changes_between_versions(stream):
    assert (all_batches(stream(), CONTEXT)[:6, 0] // (CONTEXT + 1)).tolist() == [159, 45, 293, 332, 43, 323]


# Prepared folders as a source ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 200)
    prepare_folder(Request(source=(str(tmp_path / "a.txt"),), tokenizer="bpe:260", shard_bytes=1000), tmp_path / "made")
    return tmp_path / "made"


def test_a_prepared_folder_is_a_source(folder, tmp_path):
    index, cache = index_file.load(folder), tmp_path / "cache"
    config = prepare(DataConfig(source=(str(folder),), valid_tokens=64), cache)
    assert (config.digest, config.vocab) == (index.digest, 260)
    assert config.tokenizer == str(folder / "tokenizer.json")
    assert prepare(config, cache) == config
    assert prepare(DataConfig(valid_tokens=64), cache, source=[str(folder)]) == config
    again = prepare(DataConfig(source=(str(folder),), valid_tokens=64, tokenizer="bpe:260"), cache)
    assert again.digest == config.digest
    with pytest.raises(UserError, match="was made with bpe:260, not bpe:300; leave the tokenizer out"):
        prepare(DataConfig(source=(str(folder),), tokenizer="bpe:300"), cache)
    with pytest.raises(UserError, match=r"data\.source mixes .*made, which holds tokens, with others"):
        prepare(DataConfig(source=(str(folder), str(tmp_path / "a.txt"))), cache)
    with pytest.raises(UserError, match=r"digest \w+, expected 12ab"):
        prepare(DataConfig(source=(str(folder),), digest="12ab"), cache)


def test_a_moved_folder_is_the_same_data(folder, tmp_path):
    config = prepare(DataConfig(source=(str(folder),)), tmp_path / "cache")
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(config, tmp_path / "cache")
    found = prepare(dataclasses.replace(config, source=(str(moved),), tokenizer="bytes"), tmp_path / "cache")
    assert found.digest == config.digest


def test_what_was_verified_is_read_again_only_if_it_changed(folder, tmp_path, monkeypatch):
    sums = []
    checksum = index_file.checksum
    monkeypatch.setattr(index_file, "checksum", lambda path: sums.append(path.name) or checksum(path))
    config = prepare(DataConfig(source=(str(folder),)), tmp_path / "cache")
    assert sums == [], "disco data prepare has just verified them"
    (folder / "shard-000001.bin").touch()
    assert prepare(config, tmp_path / "cache") == config
    assert sums == ["shard-000001.bin"]
    (folder / "verified.json").unlink()
    prepare(config, tmp_path / "cache")
    assert len(sums) == 1
    prepare(config, tmp_path / "cache2")
    assert len(sums) == 1 + len(index_file.load(folder).shards)


def test_a_corrupt_shard_is_named(folder, tmp_path):
    config = prepare(DataConfig(source=(str(folder),), valid_tokens=64), tmp_path / "cache")
    path = folder / "shard-000002.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes(4))
    with pytest.raises(UserError, match=r"shards are damaged: .*made/shard-000002\.bin is corrupt; run the same disco"):
        prepare(config, tmp_path / "cache")
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"the shard .*000002\.bin is corrupt: .* bytes, not"):
        TokenStream(config, tmp_path / "cache", context=8, seed=0)
    path.write_bytes(content)
    stream = TokenStream(config, tmp_path / "cache", context=8, seed=0)
    path.write_bytes(b"\xff" * len(content))
    with pytest.raises(UserError, match="a shard holds the token 65,535; it is corrupt"):
        all_batches(stream, 8)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read the shard .*000002\.bin: No such file"):
        TokenStream(config, tmp_path / "cache", context=8, seed=0)


def test_an_unfinished_folder(folder, tmp_path):
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json: No such file or directory; let disco data prepare finish first"):
        prepare(DataConfig(source=(str(folder),)), tmp_path / "cache")


# .bin files of other projects ----------------------------------------------------------------------------------------


def llm_c(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1) -> str:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())
    return str(path)


@pytest.mark.parametrize(
    ("dtype", "magic"),
    [("<u2", None), ("<u2", (20240520, 1)), ("<u4", (20240801, 7))],
    ids=["nanogpt", "gpt2", "llama3"],
)
def test_bin_files_are_read_as_they_are(tmp_path, dtype, magic):
    top = 50_256 if dtype == "<u2" else 128_000
    ids = np.random.default_rng(0).integers(0, top, 4000).astype(dtype)
    ids[7] = top
    names = []
    for number, part in enumerate((ids[:1500], ids[1500:])):
        path = tmp_path / f"part_{number}.bin"
        names.append(str(path))
        part.tofile(path) if magic is None else llm_c(path, part, *magic)
    cache = tmp_path / "cache"
    config = prepare(DataConfig(source=tuple(names), valid_tokens=64), cache)
    assert config.vocab == top + 1
    stream = TokenStream(config, cache, context=9, seed=0)
    blocks = np.concatenate([all_batches(stream, 9), stream.valid_blocks()[0]])
    assert sorted(map(tuple, blocks)) == sorted(map(tuple, ids.reshape(-1, 10)[:, :9].astype(np.int64)))
    wider = prepare(DataConfig(source=tuple(names), vocab=top + 48), cache)
    assert wider.vocab == top + 48
    assert wider.digest != config.digest
    assert prepare(wider, cache) == wider
    with pytest.raises(UserError, match=rf"data\.vocab is {top:,}, but the files hold the token {top:,}"):
        prepare(DataConfig(source=tuple(names), vocab=top), cache)


def test_bin_files_are_hashed_once(tmp_path, monkeypatch):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    config = prepare(DataConfig(source=(str(tmp_path / "train.bin"),)), tmp_path / "cache")
    scan = tokens._scan
    monkeypatch.setattr(tokens, "_scan", lambda *_: pytest.fail("read the file again"))
    assert prepare(DataConfig(source=config.source), tmp_path / "cache") == config
    monkeypatch.setattr(tokens, "_scan", scan)
    np.arange(1, 1001, dtype="<u2").tofile(tmp_path / "train.bin")
    assert prepare(DataConfig(source=config.source), tmp_path / "cache").digest != config.digest


def test_bad_bin_files(tmp_path):
    cut = Path(llm_c(tmp_path / "cut.bin", np.arange(100, dtype="<u2")))
    cut.write_bytes(cut.read_bytes()[:-2])
    (tmp_path / "odd.bin").write_bytes(bytes(5))
    (tmp_path / "empty.bin").write_bytes(b"")
    good, wide = llm_c(tmp_path / "good.bin", np.arange(9, dtype="<u2")), tmp_path / "wide.bin"
    llm_c(wide, np.arange(9, dtype="<u4"), 20240801, 7)
    for names, message in (
        ([cut], r"cut\.bin is cut: its header names 100 tokens"),
        ([tmp_path / "odd.bin"], r"odd\.bin is neither nanoGPT's uint16 tokens nor llm\.c's: 5 bytes"),
        ([tmp_path / "empty.bin"], r"empty\.bin is neither"),
        ([tmp_path / "no.bin"], r"cannot read .*no\.bin: No such file"),
        ([good, good], "is named twice"),
        ([good, wide], "differ in how tokens are stored"),
        ([good, tmp_path], "mixes"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(DataConfig(source=tuple(map(str, names))), tmp_path / "cache")


def test_stamps_that_are_damaged_are_made_again(folder, tmp_path):
    config = prepare(DataConfig(source=(str(folder),)), tmp_path / "cache")
    stamps = tmp_path / "cache" / config.digest / "verified.json"
    whole = json.loads(stamps.read_text())
    stamps.write_text("{")
    assert prepare(config, tmp_path / "cache") == config
    assert json.loads(stamps.read_text()) == whole
