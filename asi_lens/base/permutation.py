"""A random order of n items that needs no memory: each entry is computed when it is asked for."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

_Words = NDArray[np.uint64]


class Permutation:
    """A random permutation of 0 ... n-1, computed entry by entry; an instance never holds n numbers.

    The permutation is a Feistel network over the cells (a, b) of a grid with at least n cells. Each round
    adds a hash of one half to the other half. A round can be undone, so all rounds together permute the
    cells. A result of n or more is permuted again until it is below n (cycle walking); the grid has fewer
    than sqrt(n) + 1 such cells.
    """

    _ROUNDS = 6

    def __init__(self, n: int, *key: int):
        self.n = n
        self._a = np.uint64(math.isqrt(n - 1) + 1)
        self._b = np.uint64(-(-n // int(self._a)))
        self._keys = np.random.SeedSequence(key or (0,)).generate_state(self._ROUNDS, np.uint64)

    def __call__(self, index: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Return the permuted indices [batch], int64, for indices with 0 <= index < n."""
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
    """Return splitmix64's finalizer (Steele, Lea and Flood 2014) of x xor key; arrays wrap modulo 2^64."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
