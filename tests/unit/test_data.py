"""The token stream: every block once, in one order for all batch sizes, and held-out text that is never trained on."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from disco.errors import UserError
from disco.train.config import DataConfig, ModelConfig, TrainConfig
from disco.train.data import TokenStream, check, prepare
from disco.train.order import splitmix64

CONTEXT, COUNT = 8, 3000


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Makes streams over the tokens 0, 1, 2, ..., so that a token says where it stands; or over these in reverse."""
    folder = tmp_path_factory.mktemp("numbered")
    cache, path = folder / "cache", str(folder / "tokenizer.json")
    vocabulary = {**{str(i): i for i in range(COUNT)}, "[UNK]": COUNT}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(path)
    configs = []
    for numbers in (range(COUNT), range(COUNT)[::-1]):
        (folder / "numbers.txt").write_text(" ".join(map(str, numbers)))
        config = DataConfig(source=(str(folder / "numbers.txt"),), tokenizer=path, valid_tokens=10 * CONTEXT)
        configs.append(prepare(config, cache))
        assert np.fromfile(cache / configs[-1].digest / "tokens.bin", np.uint16).tolist() == list(numbers)

    def stream(seed=0, context=CONTEXT, reverse=False, **options):
        config = dataclasses.replace(configs[reverse], **options)
        return TokenStream(config, cache, context=context, seed=seed)

    return stream


def all_batches(stream, batch):
    """The tokens of every step, [blocks, context]."""
    steps = stream.train_tokens // batch
    return np.concatenate([stream.batch(step, batch)[0] for step in range(steps)])


def order(stream, reverse=False):
    """Places in the text of the blocks of a numbered stream, in the order of training."""
    first = all_batches(stream, stream.context)[:, 0]
    return (COUNT - 1 - first if reverse else first) // (stream.context + 1)


def test_every_block_comes_once_and_train_and_valid_share_no_token(numbered):
    stream = numbered()
    trained, held = all_batches(stream, CONTEXT), stream.valid_blocks()[0]
    assert trained.size == stream.train_tokens
    assert held.shape == (10, CONTEXT)
    blocks = np.concatenate([trained, held])
    assert len(blocks) == COUNT // (CONTEXT + 1)
    assert np.array_equal(np.sort(blocks[:, 0]), np.arange(0, len(blocks) * (CONTEXT + 1), CONTEXT + 1))
    assert np.array_equal(blocks, blocks[:, :1] + np.arange(CONTEXT))
    seen = np.concatenate([stream.batch(step, CONTEXT)[1] for step in range(len(trained))])
    assert not set(np.unique([trained, seen])) & set(np.unique(stream.valid_blocks()))


def test_targets_are_the_next_tokens(numbered):
    for tokens, targets in (numbered().batch(3, 4 * CONTEXT), numbered().valid_blocks()):
        assert np.array_equal(targets, tokens + 1)  # the tokens are numbered
        assert tokens.dtype == targets.dtype == np.int64
        assert tokens.flags.c_contiguous
        assert targets.flags.c_contiguous


def test_all_batch_sizes_take_the_same_text_in_the_same_order(numbered):
    one = all_batches(numbered(seed=5), CONTEXT)
    for rows in (2, 3, 16):
        many = all_batches(numbered(seed=5), rows * CONTEXT)
        assert len(many) > len(one) - rows
        assert np.array_equal(many, one[: len(many)])


def test_any_step_can_be_asked_for_first(numbered):
    whole, resumed = numbered(seed=2), numbered(seed=2)
    batches = [whole.batch(step, 4 * CONTEXT) for step in range(20)]
    for step in (11, 12, 3):
        assert np.array_equal(resumed.batch(step, 4 * CONTEXT), batches[step])


def test_order_is_shuffled_and_another_with_another_seed_context_or_text(numbered):
    orders = [order(numbered(seed=seed)) for seed in range(4)]
    orders.append(order(numbered(reverse=True), reverse=True))
    count = len(orders[0])
    for number, blocks in enumerate(orders):
        assert sorted(blocks) == sorted(orders[0])
        assert abs(np.corrcoef(blocks, np.arange(count))[0, 1]) < 4 / np.sqrt(count)
        assert all(np.mean(blocks == other) < 0.05 for other in orders[:number])
    longer = order(numbered(context=CONTEXT + 1))
    assert np.mean(orders[0][: len(longer)] == longer) < 0.05


def test_order_of_the_rest_does_not_depend_on_how_much_is_held_out(numbered):
    little, much = order(numbered()), order(numbered(valid_tokens=100 * CONTEXT))
    assert np.array_equal(little[np.isin(little, much)], much[np.isin(much, little)])


def test_held_out_blocks_are_those_of_the_data_and_spread_over_it(numbered):
    held = numbered().valid_blocks()[0]
    for seed in (1, 2):
        assert np.array_equal(numbered(seed=seed).valid_blocks()[0], held)
    gaps = np.diff(np.concatenate([[-held[0, 0]], held[:, 0], [2 * COUNT - held[-1, 0]]]))
    assert gaps.min() > 270  # ten in 3,000 tokens: 300 apart, and half of that (twice, mirrored) at the ends
    assert gaps.max() < 330
    stream = numbered(valid_tokens=10 * CONTEXT + 1)
    assert stream.valid_tokens == stream.valid_blocks()[0].size == 11 * CONTEXT


def test_order_never_changes_between_versions(numbered):
    """The published outputs of SplitMix64 for seed 1234567, and blocks that recorded runs have seen."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4).tolist() == published
    assert order(numbered())[:6].tolist() == [152, 244, 163, 271, 274, 262]


def test_past_the_end(numbered):
    stream = numbered()
    assert stream.train_tokens == (333 - 10) * 8
    stream.batch(322, CONTEXT)
    with pytest.raises(
        UserError, match=r"step 161 of 16 tokens ends at 2,592 tokens, past the 2,584 that can be trained"
    ):
        stream.batch(161, 2 * CONTEXT)


def test_batch_must_be_a_multiple_of_the_context(numbered):
    with pytest.raises(UserError, match="batch must be a multiple of the context 8, got 12 tokens"):
        numbered().batch(0, 12)


def test_too_short_to_hold_out(numbered):
    message = "the data have 3,000 tokens, 333 blocks of 8: too few to hold 4,000 tokens out and train on the rest"
    with pytest.raises(UserError, match=message):
        numbered(valid_tokens=4000)


def test_unprepared_or_lost(tmp_path):
    with pytest.raises(UserError, match="the data are not prepared: call disco"):
        TokenStream(DataConfig(), tmp_path, context=8, seed=0)
    with pytest.raises(UserError, match="holds no complete tokens: call disco"):
        TokenStream(DataConfig(digest="12ab"), tmp_path, context=8, seed=0)


@pytest.mark.parametrize(
    ("batch", "horizon", "message"),
    [
        (2592, 2592, "the batch of 2,592 tokens is larger than the data: the data have 2,584 tokens to train on"),
        (
            48,
            2592,
            r"the horizon of 2,592 .* have 2,584 .* \(80 more are held out\); use a horizon of at most 2,544 or",
        ),
        (8, 2584, None),
    ],
)
def test_check(numbered, batch, horizon, message):
    model = ModelConfig(width=32, head_size=32, context=CONTEXT)
    config = TrainConfig(model=model, batch=batch, horizon=horizon)
    if message is None:
        check(config, numbered())
    else:
        with pytest.raises(UserError, match=message):
            check(config, numbered())
