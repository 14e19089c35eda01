"""The order of an epoch is a permutation, as random as it should be."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.base.permutation import Permutation


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_permutations_are_permutations(n: int, seed: int, epoch: int) -> None:
    found = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(found), np.arange(n))


def test_permutations_are_as_random_as_they_should_be() -> None:
    n = 20_011  # prime: neither side of the grid divides it
    found = np.stack([Permutation(n, 0, epoch)(np.arange(n)) for epoch in range(20)])
    # where a given entry goes is spread evenly, and neighbours go to unrelated places
    correlations = np.corrcoef(np.concatenate([found, np.arange(n)[None]]))
    assert np.abs(correlations - np.eye(21)).max() < 0.04
    steps = found[:, 1:] - found[:, :-1]
    assert abs(np.abs(steps).mean() / (n / 3) - 1) < 0.01
    blocks = np.stack([np.bincount(row[:2000] * 10 // n, minlength=10) for row in found])
    chi_square = ((blocks - 200) ** 2 / 200).sum(1).mean()
    assert 6 < chi_square < 12.5  # 9 degrees of freedom, mean over 20 draws
    # and it stays the same from version to version: checkpoints rely on it
    assert Permutation(10, 0, 1, 2)(np.arange(10)).tolist() == [0, 9, 8, 4, 5, 1, 6, 7, 3, 2]
