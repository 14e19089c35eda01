"""Gamma, the rival's prediction of death at the start, and the geometric median."""

from __future__ import annotations

import pytest
import torch

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import DataError, OptionError
from asi_lens.collapse.centering import dead_at_start, gamma, geometric_median, predicted_dead
from asi_lens.results.judging import rank_correlation

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
D, N, K, FEATURES = 64, 4096, 8, 2048


def shifted(size: float, seed: int = 0) -> torch.Tensor:
    """Isotropic rows with a mean of `size` times their sigma, up to sampling."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, D, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    return rows + size * D**0.5 * direction


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_gamma_is_the_mean_over_sigma(size: float) -> None:
    spectrum = Spectrum.of(shifted(size).double())
    assert gamma(spectrum) == pytest.approx(size, rel=0.05)
    assert gamma(spectrum, spectrum.mean) == 0
    scaled = Spectrum.of(shifted(size).double() * 17)
    assert gamma(scaled) == pytest.approx(gamma(spectrum), rel=1e-9)


def test_the_published_formula_orders_the_measured_deaths() -> None:
    sizes = torch.logspace(-1, 0.69897, 14).tolist()  # 0.1 to 5
    rows = [shifted(size, seed) for seed, size in enumerate(sizes)]
    measured = [dead_at_start(part, K, FEATURES) for part in rows]
    predicted = [predicted_dead(gamma(Spectrum.of(part.double())), K, FEATURES, N) for part in rows]
    assert rank_correlation(predicted, measured)[0] > 0.95
    assert (measured[0], predicted[0]) == (0, pytest.approx(0, abs=1e-9))
    assert measured[-1] == pytest.approx(predicted[-1], abs=0.05)
    # Subtracting the mean takes all of these deaths away: the rows are isotropic.
    for part in rows:
        assert dead_at_start(part, K, FEATURES, center=part.mean(0)) < 0.005


def test_known_values_of_the_formula() -> None:
    # From the table of its authors' settings: (16,384, 32) and (1,048,576, 50), N = 1e5.
    assert predicted_dead(1.5, 32, 16_384, 100_000) == pytest.approx(0.52, abs=0.01)
    assert predicted_dead(1.0, 50, 1_048_576, 100_000) == pytest.approx(0.36, abs=0.01)
    assert predicted_dead(0.0, 32, 16_384, 100_000) == 0
    assert predicted_dead(1e9, 32, 16_384, 100_000) == pytest.approx(1 - 32 / 16_384)


def test_the_geometric_median_is_not_moved_by_a_few_huge_rows() -> None:
    rows = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    center = geometric_median(rows)
    rows[:5] += 1e6
    assert torch.linalg.vector_norm(geometric_median(rows) - center) < 0.1
    assert torch.linalg.vector_norm(rows.mean(0)) > 1e3
    # At the minimum the unit vectors to the rows cancel.
    pull = torch.nn.functional.normalize(rows - geometric_median(rows), dim=1).sum(0)
    assert torch.linalg.vector_norm(pull) < 1e-3


def test_the_geometric_median_in_closed_form() -> None:
    line = torch.tensor([[0.0], [1.0], [7.0]])
    assert geometric_median(line).item() == 1, "of three points on a line, the middle one"
    triangle = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    torch.testing.assert_close(
        geometric_median(triangle), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0
    )
    same = torch.full((4, 2), 3.0)
    assert geometric_median(same).tolist() == [3, 3]


def test_the_share_does_not_depend_on_the_default_dtype() -> None:
    rows = shifted(1.0)[:256]
    expected = dead_at_start(rows, K, 512)
    try:
        torch.set_default_dtype(torch.float64)
        assert dead_at_start(rows, K, 512) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_cannot_be_answered_is_refused() -> None:
    rows = torch.randn(30, 4)
    still = Spectrum.of(torch.ones(30, 4, dtype=torch.float64))
    with pytest.raises(DataError, match="do not vary"):
        gamma(still)
    with pytest.raises(OptionError, match="center="):
        gamma(Spectrum.of(rows), torch.zeros(3))
    with pytest.raises(OptionError, match="gamma="):
        predicted_dead(-1.0, 8, 64, 100)
    with pytest.raises(OptionError, match="k=64"):
        predicted_dead(1.0, 64, 64, 100)
    with pytest.raises(OptionError, match="n_tokens=1"):
        predicted_dead(1.0, 8, 64, 1)
    with pytest.raises(OptionError, match="k=9"):
        dead_at_start(rows, 9, 8)
    with pytest.raises(DataError, match="no rows"):
        dead_at_start(rows[:0], 1, 8)
    with pytest.raises(DataError, match="all finite"):
        geometric_median(torch.full((2, 2), float("nan")))
    with pytest.raises(DataError, match="did not settle in 1 steps"):
        geometric_median(rows, max_steps=1)
