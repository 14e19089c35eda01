"""Ranks are right whatever the rank, the scale and the order of the rows, or they are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asi_lens.activations import moments as module
from asi_lens.activations.moments import Moments
from asi_lens.activations.precision import (
    MOST_UNCERTAIN,
    covariance_eigenvalues,
    entropy_rank,
    signs,
    tolerance,
    uncertainty,
)
from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import DataError
from asi_lens.base.products import exact_products

WIDTH = 96


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_rank(x: Tensor) -> float:
    """By the definition, in float64."""
    x = x.double()
    return entropy_rank(torch.linalg.svdvals(x - x.mean(0)))


def counted(x: Tensor, size: int = 500) -> Moments:
    moments = Moments.zeros(x.shape[1])
    for part in x.split(size):
        moments.update(part)
    return moments


def rank(moments: Moments) -> float:
    return Spectrum.from_moments(moments).effective_rank


@pytest.mark.parametrize("of", [1, 8])
def test_few_directions_of_many(of: int) -> None:
    left, right = normal(4096, of), normal(of, 2048, seed=1)
    x, centred = left @ right, left.double() - left.double().mean(0)
    factors = torch.linalg.qr(centred).R @ torch.linalg.qr(right.T.double()).R.T
    expected = entropy_rank(torch.linalg.svdvals(factors))
    assert rank(counted(x, 2048)) == pytest.approx(expected, rel=MOST_UNCERTAIN)
    assert rank(Moments.of(x)) == pytest.approx(expected, rel=MOST_UNCERTAIN)


@settings(max_examples=25)
@given(
    of=st.integers(1, WIDTH),
    decay=st.floats(0, 8),
    size=st.sampled_from([64, 500, 3000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    massive=st.sampled_from([None, 0, 1000, 2900]),
    seed=st.integers(0, 9),
)
def test_any_rank_any_decay_and_massive_rows_at_any_place(
    of: int, decay: float, size: int, dtype: torch.dtype, massive: int | None, seed: int
) -> None:
    x = (normal(3000, of, seed=seed) * torch.logspace(0, -decay, of)) @ normal(of, WIDTH, seed=seed + 50)
    if massive is not None:
        x[massive] *= 1e4
    x = x.to(dtype)
    assert rank(counted(x, size)) == pytest.approx(exact_rank(x), rel=MOST_UNCERTAIN)


@settings(max_examples=25)
@given(exponent=st.integers(-35, 37), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_rank_does_not_depend_on_the_scale(exponent: int, dtype: torch.dtype) -> None:
    x = normal(1000, 20) * torch.logspace(0, -2, 20)
    scaled = (x.double() * 10.0**exponent).to(dtype)
    assert torch.isfinite(scaled).all()
    expected = exact_rank(scaled.double() / 10.0**exponent)
    assert rank(counted(scaled)) == pytest.approx(expected, rel=1e-3)
    assert rank(Moments.of(scaled)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_squares_that_no_number_holds_are_refused(scale: float) -> None:
    x = normal(100, 5).double() * scale
    with pytest.raises(DataError, match=r"too (large|small)"):
        Moments.of(x)
    moments = Moments.of(normal(100, 5))
    before = moments.scatter.clone()
    with pytest.raises(DataError, match=r"too (large|small)"):
        moments.update(x)
    assert torch.equal(moments.scatter, before)
    with pytest.raises(DataError, match="too large"):
        covariance_eigenvalues(torch.full((3, 3), torch.inf))


def test_well_spread_rows_are_counted_in_float32_and_others_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtypes: list[torch.dtype] = []
    summed = module._summed

    def watched(rows: Tensor, *, is_copy: bool) -> Moments:
        dtypes.append(rows.dtype)
        return summed(rows, is_copy=is_copy)

    monkeypatch.setattr(module, "_summed", watched)
    spread = normal(4000, WIDTH)
    counted(spread, 500)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    # A row of another order of magnitude, late in the stream: only its block costs more.
    late = normal(4000, WIDTH) * torch.logspace(0, -3, WIDTH)
    late[3700] *= 1e5
    counted(late, 500)
    assert dtypes == [torch.float32] * 8 + [torch.float64]
    dtypes.clear()
    counted(normal(4000, 1) @ normal(1, WIDTH, seed=1), 500)
    # Tried again whenever the rows have doubled.
    assert dtypes.count(torch.float64) == 8
    assert dtypes.count(torch.float32) <= 4


def test_the_measured_error_is_the_error() -> None:
    x = normal(2000, WIDTH) + 3
    moments = Moments.zeros(WIDTH)
    for part in x.split(500):
        moments.merge(module._summed(part, is_copy=False))
    exact = Moments.of(x.double())
    error = torch.linalg.matrix_norm(moments.scatter - exact.scatter).item()
    assert 0.5 < moments.noise / error < 2
    assert exact.noise < 1e-3 * error
    # Also through a file.
    back = Moments.from_state(moments.state())
    assert back.noise == pytest.approx(moments.noise, rel=1e-6)
    assert (back.limit, back.limit_at) == (moments.limit, moments.limit_at)


def test_moments_of_older_versions_are_refused_only_where_they_may_be_wrong() -> None:
    for x, fine in ((normal(2000, WIDTH), True), (normal(2000, 1) @ normal(1, WIDTH, seed=1), False)):
        state = module._summed(x, is_copy=False).state()
        del state["check"], state["limit"]
        old = Moments.from_state(state)
        if fine:
            assert rank(old) == pytest.approx(exact_rank(x), rel=MOST_UNCERTAIN)
            assert old.merge(Moments.of(x)).check is None
        else:
            spectrum = Spectrum.from_moments(old)
            with pytest.raises(DataError, match=r"may move the effective rank by .*delete the cached file"):
                _ = spectrum.effective_rank
            assert spectrum.active_subspace(1).shape == (WIDTH, 1)  # the directions are fine


def test_the_limit_is_half_of_what_is_allowed() -> None:
    values = torch.logspace(0, -6, 50, dtype=torch.float64)
    most = tolerance(values)
    assert uncertainty(values, most) == pytest.approx(MOST_UNCERTAIN / 2, rel=0.1)
    assert tolerance(torch.tensor([1.0, 0.0], dtype=torch.float64)) < 1e-4
    assert uncertainty(torch.zeros(3, dtype=torch.float64), 1.0) == 0.0
    assert tolerance(torch.zeros(3, dtype=torch.float64)) == 0.0
    assert signs(50, torch.device("cpu")).abs().eq(1).all()
    assert math.isclose(tolerance(values * 1e9), most * 1e9, rel_tol=1e-9)


@pytest.mark.parametrize("choice", ["high", "medium"])
def test_products_of_statistics_are_exact_whatever_the_user_switched_on(choice: str) -> None:
    x = normal(600, WIDTH)
    expected = Moments.of(x)
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(choice)
    matmul.allow_bf16_reduced_precision_reduction = True
    try:
        with exact_products():
            assert not matmul.allow_bf16_reduced_precision_reduction
            if hasattr(matmul, "fp32_precision"):
                assert matmul.fp32_precision == "ieee"
            else:
                assert not matmul.allow_tf32
        assert torch.equal(Moments.of(x).scatter, expected.scatter)
        assert torch.get_float32_matmul_precision() == choice
        assert matmul.allow_tf32
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("choice", ["highest", "high"])
def test_a_gpu_counts_in_float64(choice: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(choice)
    try:
        for x in (normal(4000, 8) @ normal(8, WIDTH, seed=1), normal(4000, WIDTH)):
            moments = Moments.zeros(WIDTH, "cuda")
            for part in x.cuda().split(500):
                moments.update(part)
            expected = Moments.of(x.double())
            torch.testing.assert_close(moments.scatter.cpu(), expected.scatter, rtol=1e-9, atol=1e-9)
            assert rank(moments) == pytest.approx(exact_rank(x), rel=1e-4)
    finally:
        torch.set_float32_matmul_precision(before)
