"""Rank correlation against known values, and its interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.base.errors import OptionError
from asi_lens.results.correlation import rank_correlation


def test_known_values() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])[0] == pytest.approx(0.8)
    # A tie takes the mean rank: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 5], [1, 2, 3, 4])[0] == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@given(st.lists(st.integers(-1000, 1000), min_size=5, max_size=12, unique=True), st.integers(0, 3))
def test_only_order_matters(values: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    other = list(generator.normal(size=len(values)))
    one = rank_correlation(values, other)
    two = rank_correlation([float(v) ** 3 for v in values], [-math.exp(-y) for y in other])
    assert one == pytest.approx(two)


def test_the_interval_holds_the_value_and_narrows() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=200)
    y = -x + generator.normal(size=200)
    widths = []
    for n in (15, 200):
        rho, low, high = rank_correlation(list(x[:n]), list(y[:n]))
        assert low < rho < high < 0
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_what_does_not_vary_has_no_correlation() -> None:
    assert all(math.isnan(value) for value in rank_correlation([1, 1, 1], [1, 2, 3]))


def test_two_points_say_nothing() -> None:
    assert all(math.isnan(value) for value in rank_correlation([1, 2], [1, 2]))


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(OptionError, match="equally many"):
        rank_correlation([1, 2, 3], [1, 2])
