"""Ranks and dimensions against closed forms and independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.activations.moments import Moments
from asi_lens.activations.precision import entropy_rank
from asi_lens.activations.spectrum import FewTokensWarning, Spectrum, effective_rank_limit
from asi_lens.base.errors import DataError, OptionError


def orthonormal(d: int, r: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(
        torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q[:, :r]


def gaussian(n: int, scales: torch.Tensor, seed: int = 0) -> torch.Tensor:
    d = len(scales)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (noise * scales) @ orthonormal(d, d, seed).T + 3.0


def exact(values: torch.Tensor) -> Spectrum:
    """A spectrum of given eigenvalues, in a rotated frame."""
    d = len(values)
    Q = orthonormal(d, d)
    covariance = (Q * values) @ Q.T
    return Spectrum.from_moments(Moments(10**6, torch.zeros(d, dtype=torch.float64), covariance * 10**6))


values = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12).map(
    lambda v: torch.tensor(sorted(v, reverse=True), dtype=torch.float64)
)


@given(values)
def test_ranks_are_bounded_and_ordered(eigenvalues: torch.Tensor) -> None:
    s = exact(eigenvalues)
    d = len(eigenvalues)
    tiny = 1e-6
    for rank in (s.effective_rank, s.participation_ratio, s.stable_rank):
        assert 1 - tiny <= rank <= d + tiny
    # Renyi entropies fall with their order: exp H_1(s) >= 1 / sum p^2; here orders 2 and infinity of l.
    assert s.stable_rank <= s.participation_ratio + tiny


@given(values, st.floats(1e-4, 1e4))
def test_ranks_ignore_scale(eigenvalues: torch.Tensor, scale: float) -> None:
    a, b = exact(eigenvalues), exact(eigenvalues * scale)
    assert a.effective_rank == pytest.approx(b.effective_rank, rel=1e-6)
    assert a.participation_ratio == pytest.approx(b.participation_ratio, rel=1e-6)
    assert a.stable_rank == pytest.approx(b.stable_rank, rel=1e-6)


def test_equal_eigenvalues_fill_the_space() -> None:
    s = exact(torch.full((8,), 2.5, dtype=torch.float64))
    assert s.effective_rank == pytest.approx(8)
    assert s.effective_rank_fraction == pytest.approx(1)
    assert s.participation_ratio == pytest.approx(8)
    assert s.stable_rank == pytest.approx(8)
    assert s.intrinsic_dimension(0.99) == 8
    assert s.intrinsic_dimension(0.5) == 4


def test_effective_rank_is_over_singular_values_not_their_squares() -> None:
    # s = (3, 1), p = (3/4, 1/4): exp(H) = 4 / 3^(3/4). Over squares it would be 10 / 9^(9/10).
    s = exact(torch.tensor([9.0, 1.0], dtype=torch.float64))
    assert s.effective_rank == pytest.approx(4 / 3**0.75)
    assert s.participation_ratio == pytest.approx(100 / 82)
    assert s.stable_rank == pytest.approx(10 / 9)
    assert s.explained_variance(1) == pytest.approx(0.9)
    assert [s.intrinsic_dimension(share) for share in (0.5, 0.89, 0.95, 1.0)] == [1, 1, 2, 2]


def test_rows_of_rank_r_have_r_directions() -> None:
    basis = orthonormal(10, 3)
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ basis.T + 7.0
    s = Spectrum.of(x)
    assert s.effective_rank <= 3 + 1e-5
    assert s.intrinsic_dimension(0.999999) == 3
    assert s.stable_rank <= 3
    V = s.active_subspace(3)
    torch.testing.assert_close(V.T @ V, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(V @ V.T, basis @ basis.T, rtol=0, atol=1e-9)


def test_against_numpy_svd_of_the_centred_rows() -> None:
    x = gaussian(600, torch.logspace(0, -2, 20, dtype=torch.float64))
    s = Spectrum.of(x)
    centred = x.numpy() - x.numpy().mean(0)
    _, singular, Vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(s.singular_values, singular, rtol=1e-9)
    p = singular / singular.sum()
    assert s.effective_rank == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-10)
    cosines = np.abs((s.eigenvectors.numpy() * Vt.T).sum(0))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-8)
    assert (s.eigenvectors.max(0).values >= -s.eigenvectors.min(0).values).all()  # the sign's convention


def test_centring_matters_and_is_done() -> None:
    x = gaussian(600, torch.ones(10, dtype=torch.float64))
    assert Spectrum.of(x).effective_rank == pytest.approx(Spectrum.of(x + 100.0).effective_rank, rel=1e-9)


def test_few_rows_warn() -> None:
    with pytest.warns(FewTokensWarning, match="rows per dimension"):
        Spectrum.of(gaussian(199, torch.ones(10, dtype=torch.float64)))


def test_extrapolation_comes_closer_to_the_limit_than_the_sample() -> None:
    scales = torch.linspace(1, 0.05, 40, dtype=torch.float64)
    truth = entropy_rank(scales)
    sizes = [400, 800, 1600]
    draws = [gaussian(1600, scales, seed) for seed in range(16)]
    ranks = [
        sum(Spectrum.from_moments(Moments.of(x[:n])).effective_rank for x in draws) / len(draws)
        for n in sizes
    ]
    # The bias is systematic and halves with each doubling; single draws scatter around it.
    assert ranks[0] < ranks[1] < ranks[2] < truth
    limit = effective_rank_limit(sizes, ranks)
    assert abs(limit - truth) < 0.5 * (truth - ranks[2])
    assert effective_rank_limit(sizes[::-1], ranks[::-1]) == limit


def test_extrapolation_of_an_exact_law_is_exact() -> None:
    assert effective_rank_limit([100, 200], [50 - 3 / 100, 50 - 3 / 200]) == pytest.approx(50)
    for n, r in (([100], [1.0]), ([100, 100], [1.0, 2.0]), ([0, 1], [1.0, 2.0])):
        with pytest.raises(OptionError, match="n="):
            effective_rank_limit(n, r)


@pytest.mark.parametrize("d_init", [0, -1, 11])
def test_a_subspace_out_of_range_is_refused(d_init: int) -> None:
    s = exact(torch.ones(10, dtype=torch.float64))
    with pytest.raises(OptionError, match="d_init="):
        s.active_subspace(d_init)


def test_bad_values_are_refused() -> None:
    s = exact(torch.ones(10, dtype=torch.float64))
    with pytest.raises(OptionError, match="share="):
        s.intrinsic_dimension(0.0)
    with pytest.raises(OptionError, match="r="):
        s.explained_variance(11)
    with pytest.raises(DataError, match="zeros"):
        entropy_rank(torch.zeros(3))
    with pytest.raises(DataError, match="finite"):
        entropy_rank(torch.tensor([1.0, math.nan]))
    with pytest.raises(DataError, match="at least 0"):
        entropy_rank(torch.tensor([1.0, -1.0]))


def test_the_fingerprint_sees_directions_that_are_given() -> None:
    one = Spectrum.of(torch.randn(200, 6).double() * torch.arange(1, 7))
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    turned = Spectrum(one.eigenvalues, one.mean, one.n, turn @ one.covariance @ turn.T)
    assert len({one.fingerprint, turned.fingerprint}) == 2
    again = Spectrum(one.eigenvalues, one.mean, one.n, one.covariance.clone(), name="other")
    assert again.fingerprint == one.fingerprint
