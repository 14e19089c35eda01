"""Moments against float64 over all rows at once, and their laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.activations.moments import Moments
from asi_lens.base.errors import DataError, OptionError


def rows(n: int, d: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + offset


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double()
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean)


@pytest.mark.parametrize("d", [1, 5, 192, 193, 400])
def test_one_block_is_the_definition(d: int) -> None:
    x = rows(300, d)
    mean, scatter = reference(x)
    moments = Moments.of(x)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.scatter, scatter, rtol=1e-10, atol=1e-9)


@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True), swap=st.booleans())
def test_any_split_in_any_order_gives_the_same(cuts: list[int], swap: bool) -> None:
    x = rows(200, 7, offset=50.0)
    parts = torch.tensor_split(x, sorted(cuts))
    moments = Moments.zeros(7)
    for part in reversed(parts) if swap else parts:
        moments.update(part)
    mean, scatter = reference(x)
    assert moments.n == 200
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.scatter, scatter, rtol=1e-9, atol=1e-8)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    # sum x x^T - n m m^T would lose everything here: the mean is 1e4 standard deviations away.
    x = (rows(4000, 6) + 1e4).float()
    mean, scatter = reference(x)
    moments = Moments.zeros(6)
    for part in x.split(500):
        moments.update(part)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moments.scatter, scatter, rtol=1e-5, atol=1e-5 * scatter.abs().max().item())


def test_a_massive_coordinate_leaves_the_small_ones_alone() -> None:
    x = rows(4000, 8)
    x[:, 3] *= 1e4
    _, scatter = reference(x.float())
    got = Moments.of(x.float()).scatter
    scale = scatter.diagonal().sqrt()
    # float32 sums of 4,000 products: eps * sqrt(n) is 4e-6. Had the large coordinate leaked, it would be ~1.
    assert ((got - scatter).abs() / (scale[:, None] * scale)).max() < 1e-5


def test_bfloat16_rows_are_counted_in_float32() -> None:
    x = rows(3000, 5).bfloat16()
    mean, scatter = reference(x)
    moments = Moments.of(x)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.scatter, scatter, rtol=1e-5, atol=1e-4 * scatter.abs().max().item())


def test_state_round_trip_is_exact() -> None:
    moments = Moments.of(rows(50, 9))
    back = Moments.from_state(moments.state())
    assert back.n == 50
    assert torch.equal(back.mean, moments.mean)
    upper = torch.triu(torch.ones(9, 9, dtype=torch.bool))
    assert torch.equal(back.scatter[upper], moments.scatter[upper])
    assert torch.equal(back.scatter, back.scatter.T)


def test_clone_is_independent() -> None:
    moments = Moments.of(rows(20, 3))
    copy = moments.clone()
    moments.update(rows(5, 3, seed=1))
    assert copy.n == 20
    assert not torch.equal(copy.scatter, moments.scatter)


def test_nothing_merged_changes_nothing() -> None:
    moments = Moments.of(rows(20, 3))
    before = moments.clone()
    moments.merge(Moments.zeros(3))
    assert torch.equal(before.scatter, moments.scatter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    x = rows(10, 4)
    x[3, 2] = value
    moments = Moments.of(rows(10, 4))
    before = moments.scatter.clone()
    with pytest.raises(DataError, match="NaN or infinity"):
        moments.update(x)
    assert torch.equal(moments.scatter, before)


def test_widths_must_fit() -> None:
    with pytest.raises(OptionError, match="rows of width 4"):
        Moments.zeros(3).update(rows(10, 4))
    with pytest.raises(OptionError, match="width 4 into width 3"):
        Moments.zeros(3).merge(Moments.zeros(4))
    with pytest.raises(DataError, match="rows is empty"):
        Moments.of(rows(0, 4))
    with pytest.raises(DataError, match="no covariance"):
        _ = Moments.zeros(3).covariance
    state = Moments.of(rows(20, 3)).state()
    state["scatter"] = state["scatter"][:-1]
    with pytest.raises(DataError, match=r"the state.s scatter has 5 numbers; width 3 needs 6"):
        Moments.from_state(state)


def test_without_is_the_inverse_of_merge() -> None:
    rows = torch.randn(50, 7, dtype=torch.float64)
    whole, part = Moments.of(rows), Moments.of(rows[30:])
    left, direct = whole.without(part), Moments.of(rows[:30])
    assert (left.n, whole.n) == (30, 50)
    torch.testing.assert_close(left.mean, direct.mean)
    torch.testing.assert_close(left.scatter, direct.scatter)
    with pytest.raises(OptionError, match="cannot take 50 rows"):
        whole.without(whole)
