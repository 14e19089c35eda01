"""A random order of n things that takes no memory: any part of it is computed when it is needed."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

_Words = NDArray[np.uint64]


class Permutation:
    """A random permutation of 0 ... n-1 that is computed entry by entry.

    A Feistel network over pairs (a, b) of a grid of at least n cells: each round adds a hash of one half to
    the other, which can be undone, so all rounds together are a permutation of the cells. A cell beyond n is
    sent through again until it is not (cycle walking); there are fewer than sqrt(n) + 1 of them. Nothing of
    size n is ever held.
    """

    _ROUNDS = 6

    def __init__(self, n: int, *key: int):
        self.n = n
        self._a = np.uint64(math.isqrt(n - 1) + 1)
        self._b = np.uint64(-(-n // int(self._a)))
        self._keys = np.random.SeedSequence(key or (0,)).generate_state(self._ROUNDS, np.uint64)

    def __call__(self, index: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Where 0 <= index < n go, int64."""
        out = self._once(index.astype(np.uint64))
        while (beyond := out >= self.n).any():
            out[beyond] = self._once(out[beyond])
        return out.astype(np.int64)

    def _once(self, cell: _Words) -> _Words:
        a: _Words = cell // self._b
        b: _Words = cell % self._b
        for k, key in enumerate(self._keys):
            if k % 2 == 0:
                a = (a + _hash(b, key) % self._a) % self._a
            else:
                b = (b + _hash(a, key) % self._b) % self._b
        return a * self._b + b


def _hash(x: _Words, key: np.uint64) -> _Words:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014) on x xor key; arrays wrap modulo 2^64."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
