"""The best scale: it minimizes the squared error, and one direction alone gives it by hand."""

from __future__ import annotations

import pytest
import torch
from small_starts import make, mse, rows

from asi_lens.sae.initialize import initialize
from asi_lens.sae.scale import best_scale, first_fit, fit_scale, fit_sums


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
