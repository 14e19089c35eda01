"""The best scale: it minimizes the squared error, and one direction alone gives it by hand."""

from __future__ import annotations

import math

import pytest
import torch
from small_starts import D_IN, D_SAE, K, make, mse, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.scale import best_scale, first_fit, fit_scale, fit_sums
from asi_lens.sae.starts import STARTS


def test_sums_are_over_all_batches_and_the_factor_is_the_best() -> None:
    draw = torch.Generator().manual_seed(0)
    t = torch.randn(50, 8, generator=draw, dtype=torch.float64)
    r = 0.3 * t + 0.1 * torch.randn(50, 8, generator=draw, dtype=torch.float64)
    total, cross, power = fit_sums(zip(t.split(7), r.split(7), strict=True))
    assert total == pytest.approx(t.square().sum().item())
    factor = best_scale(total, cross, power)
    least = (t - factor * r).square().sum()
    assert total - 2 * factor * cross + factor**2 * power == pytest.approx(least.item())
    for other in (0.9 * factor, 0.999 * factor, 1.001 * factor, 1.1 * factor):
        assert (t - other * r).square().sum() > least
    assert best_scale(*fit_sums([(t, 0.25 * t)])) == pytest.approx(4)


def test_what_points_away_keeps_its_scale() -> None:
    t = torch.ones(3, 2)
    assert best_scale(*fit_sums([(t, -t)])) == 1
    assert best_scale(*fit_sums([(t, torch.zeros_like(t))])) == 1


def test_the_scale_of_a_dictionary_does_not_depend_on_where_it_was() -> None:
    found = []
    for before in (0.1, 1.0, 30.0):
        sae = make(torch.float64)
        initialize(sae, "random", sample=rows().double(), norm_search=False)
        sae.encoder_rows.mul_(before)
        fit_scale(sae, rows().double())
        _, cross, power = first_fit(sae, rows().double())
        assert cross == pytest.approx(power)
        found.append((sae.encoder_rows.norm(dim=1).mean().item(), mse(sae, rows().double())))
    assert found[1:] == [pytest.approx(found[0], rel=1e-9)] * 2


@pytest.mark.parametrize("method", list(STARTS))
def test_overshoot_multiplies_what_the_start_searched(method: str) -> None:
    x = rows().double()
    spectrum, options = Spectrum.of(x), {"d_init": 10} if STARTS[method].subspace else {}
    best, more = make(torch.float64), make(torch.float64)
    initialize(best, method, spectrum, sample=x, **options)
    initialize(more, method, spectrum, sample=x, overshoot=1.5, **options)
    torch.testing.assert_close(more.encoder_rows, 1.5 * best.encoder_rows)
    assert torch.equal(more.W_dec, best.W_dec)
    assert (best.initialization["overshoot"], more.initialization["overshoot"]) == (1.0, 1.5)


@pytest.mark.parametrize("activation", list(KINDS))
def test_overshoot_changes_values_and_not_what_fires(activation: str) -> None:
    x = rows().double()
    found = []
    for overshoot in (1.0, 1.5):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, activation), dtype=torch.float64)
        initialize(sae, "random", sample=x, overshoot=overshoot)
        found.append(sae.encode_dense(x).detach())
    torch.testing.assert_close(found[1], 1.5 * found[0])


def test_the_error_pushes_values_back_above_the_best_scale_and_on_below_it() -> None:
    """The derivative of the error to a common factor on all values: 0 at the best scale, then of its sign."""
    x = rows().double()
    slopes = []
    for overshoot in (0.5, 1.0, 1.5):
        sae = make(torch.float64)
        initialize(sae, "random", sample=x, overshoot=overshoot)
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        target, reconstruction = sae.sides(x)[1].detach(), (sae.encode_dense(x) @ sae.W_dec).detach()
        (target - factor * reconstruction).square().sum().backward()
        assert factor.grad is not None
        slopes.append(factor.grad.item() / reconstruction.square().sum().item())
    # In closed form 2 (1 - 1 / overshoot).
    assert slopes == [pytest.approx(value, abs=1e-6) for value in (-2, 0, 2 / 3)]


@pytest.mark.parametrize("overshoot", [0, -1.0, math.inf])
def test_factors_that_are_none_are_refused(overshoot: float) -> None:
    with pytest.raises(OptionError, match=f"overshoot={float(overshoot)} .* finite and above 0"):
        initialize(make(), "random", sample=rows(), overshoot=overshoot)


def test_overshoot_without_a_search_is_the_norm() -> None:
    alone, with_sample = make(), make()
    report = initialize(alone, "random", norm_search=False, overshoot=2)
    assert report.encoder_norm == pytest.approx(2)
    report = initialize(with_sample, "random", sample=rows(), norm_search=False, overshoot=2)
    assert report.encoder_norm == pytest.approx(2)
