"""The order of blocks that are too many to sort: a permutation computed one place at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disco.train.order import Permutation, Without


@given(count=st.integers(1, 2000), key=st.text(max_size=8))
def test_every_number_comes_once_and_places_is_the_inverse(count, key):
    order = Permutation(count, key)
    numbers = order(np.arange(count))
    assert np.array_equal(np.sort(numbers), np.arange(count))
    assert np.array_equal(order.places(numbers), np.arange(count))


@given(data=st.data(), count=st.integers(1, 500))
def test_what_is_left_out_changes_nothing_else(data, count):
    left_out = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    whole = Permutation(count, "key")
    expected = [number for number in whole(np.arange(count)).tolist() if number not in left_out]
    rest = Without(whole, np.array(sorted(left_out), np.int64))
    assert rest(np.arange(count - len(left_out))).tolist() == expected


@pytest.mark.parametrize("count", [10**12 + 7, 2**61])
def test_huge_counts_take_no_memory(count):
    order, places = Permutation(count, "key"), np.array([0, 1, 2, count // 2, count - 1])
    numbers = order(places)
    assert ((numbers >= 0) & (numbers < count)).all()
    assert np.array_equal(order.places(numbers), places)


def test_places_are_uniform_and_neighbours_independent():
    """Over 2,000 keys the first two of 6 numbers take each of the 30 ordered pairs alike: chi-squared, 29 degrees."""
    pairs = np.zeros((6, 6))
    for key in range(2000):
        first, second = Permutation(6, str(key))(np.arange(2))
        pairs[first, second] += 1
    seen = pairs[~np.eye(6, dtype=bool)]
    assert seen.sum() == 2000
    assert ((seen - 2000 / 30) ** 2 / (2000 / 30)).sum() < 58.3  # p = 0.001


def test_a_long_order_has_no_trend():
    numbers = Permutation(100_000, "key")(np.arange(100_000))
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 4 / np.sqrt(100_000)
    assert abs(np.corrcoef(numbers, np.arange(100_000))[0, 1]) < 4 / np.sqrt(100_000)


def test_the_order_never_changes_between_versions():
    assert Permutation(1000, "digest 4096 0")(np.arange(6)).tolist() == [840, 908, 192, 95, 108, 577]
