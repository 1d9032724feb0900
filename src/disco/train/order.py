"""The order of training blocks: functions of a key, the same on every machine and with every version of numpy."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = 6
"""Of the Feistel network; four make it indistinguishable from random (Luby, Rackoff, SIAM J. Comput. 17, 1988)."""


def splitmix64(start: int, count: int) -> NDArray[np.uint64]:
    """``count`` distinct pseudo-random numbers (Steele, Lea, Flood, OOPSLA 2014), whatever the version of numpy."""
    return _mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(start))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Permutation:
    """A pseudo-random order of 0, ..., count - 1, of which each place is computed on its own: no memory, no sorting.

    A Feistel network permutes the numbers of an even number of bits, fewer than 4 x count of them; a result that is
    too large goes through it again (cycle walking: Black, Rogaway, CT-RSA 2002).
    """

    def __init__(self, count: int, key: str) -> None:
        half = max(1, ((count - 1).bit_length() + 1) // 2)
        self.count = count
        self._half, self._mask, self._cut = np.uint64(half), np.uint64(2**half - 1), np.uint64(64 - half)
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        self._keys = splitmix64(seed, ROUNDS)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at ``places``."""
        return self._walk(places, self._forward)

    def places(self, of: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the numbers ``of`` stand: the inverse."""
        return self._walk(of, self._backward)

    def _walk(self, start: NDArray[np.int64], step: Any) -> NDArray[np.int64]:
        at = step(start.astype(np.uint64))
        while (outside := at >= np.uint64(self.count)).any():
            at[outside] = step(at[outside])
        return at.astype(np.int64)

    def _forward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ self._scramble(right, key)
        return (left << self._half) | right

    def _backward(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ self._scramble(left, key), left
        return (left << self._half) | right

    def _scramble(self, half: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
        return _mix(half * np.uint64(GOLDEN) + key) >> self._cut


class Without:
    """A permutation from which some numbers are left out; the others keep their order."""

    def __init__(self, whole: Permutation, left_out: NDArray[np.int64]) -> None:
        gone = np.sort(whole.places(left_out))
        self._whole = whole
        self._before = gone - np.arange(len(gone))  # how many others come before each

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at ``places``."""
        return self._whole(places + np.searchsorted(self._before, places, side="right"))
