"""Massive rows are those of the published criterion, decided from their own sequence alone."""

from __future__ import annotations

import pytest
import torch

from asi_lens.activations.massive import MAGNITUDE, NORM, massive_rows


@pytest.fixture
def plain() -> torch.Tensor:
    return torch.randn(4, 64, 48, generator=torch.Generator().manual_seed(0))


def median_magnitude(sequence: torch.Tensor) -> float:
    """Of the 16 positions that are looked at: 3, 7, ..., 63."""
    return sequence[3::4].abs().median().item()


def test_ordinary_rows_are_not_massive(plain: torch.Tensor) -> None:
    found, peak = massive_rows(plain)
    assert not found.any()
    assert torch.equal(peak, plain.abs().amax(2))


@pytest.mark.parametrize(("factor", "massive"), [(0.99, False), (1.01, True)])
def test_the_threshold_is_a_thousand_medians(plain: torch.Tensor, factor: float, massive: bool) -> None:
    plain[2, 5, 7] = -factor * MAGNITUDE * median_magnitude(plain[2])
    expected = torch.zeros(4, 64, dtype=torch.bool)
    expected[2, 5] = massive
    assert torch.equal(massive_rows(plain)[0], expected)


@pytest.mark.parametrize("units", [1e-4, 1e4])
def test_units_do_not_matter(plain: torch.Tensor, units: float) -> None:
    plain[1, 9, 0], plain[3, 0, 4] = 2e3, -5e3
    assert torch.equal(massive_rows(plain * units)[0], massive_rows(plain)[0])
    assert massive_rows(plain * units)[0].nonzero().tolist() == [[1, 9], [3, 0]]


def test_a_row_is_judged_by_its_own_sequence(plain: torch.Tensor) -> None:
    plain[0, 3, 2], plain[2] = 1e4, plain[2] * 1e3
    together, _ = massive_rows(plain)
    alone = torch.cat([massive_rows(plain[i : i + 1])[0] for i in range(4)])
    assert torch.equal(together, alone)
    assert together.nonzero().tolist() == [[0, 3]], "a sequence of other units has no massive rows"


def test_entries_that_are_heavy_tailed_in_every_row_are_spared(plain: torch.Tensor) -> None:
    # A large entry in every row, in another place each time: no row is longer than the others.
    plain.scatter_(2, torch.arange(64).remainder(48).expand(4, 64).unsqueeze(2), 2e3)
    assert not massive_rows(plain)[0].any()
    plain[1, 20] *= 1.5 * NORM
    assert massive_rows(plain)[0].nonzero().tolist() == [[1, 20]]


def test_a_median_of_zero_has_no_massive_rows(plain: torch.Tensor) -> None:
    sparse = torch.where(plain > 1.5, plain, 0.0)
    sparse[0, 0, 0] = 1e6
    assert not massive_rows(sparse)[0].any()


def test_short_sequences_and_low_precision(plain: torch.Tensor) -> None:
    plain[1, 1, 0] = 1e5
    for length in (1, 2, 3, 17):
        found, _ = massive_rows(plain[:, :length].bfloat16())
        assert found.nonzero().tolist() == ([[1, 1]] if length > 1 else [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_peaks_show_what_is_not_finite(plain: torch.Tensor, value: float) -> None:
    plain[3, 2, 1] = value
    finite = torch.isfinite(massive_rows(plain)[1])
    assert (~finite).nonzero().tolist() == [[3, 2]]
