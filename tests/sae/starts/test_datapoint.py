"""Data points as directions."""

from __future__ import annotations

import pytest
import torch
from small_starts import D_SAE, make, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError
from asi_lens.sae.initialize import initialize


def test_each_direction_lies_near_its_own_data_point() -> None:
    sample = rows()
    spectrum, sae = Spectrum.of(sample), make(torch.float64)
    initialize(sae, "datapoint", spectrum, sample=sample)
    points = torch.nn.functional.normalize(sample.double() - spectrum.mean)
    cosines = sae.W_dec.data @ points.T
    best = cosines.max(1)
    # 0.8 of the point and 0.2 of a random direction: their angle differs from row to row.
    assert best.values.min() > 0.9
    assert best.values.max() < 0.9999
    assert len(best.indices.unique()) > 0.95 * D_SAE, "no point is taken twice while others are left"


def test_a_small_sample_is_used_again_with_other_noise() -> None:
    sample = rows(50)
    sae = make(torch.float64)
    initialize(sae, "datapoint", sample=sample)
    cosines = sae.W_dec.data @ torch.nn.functional.normalize(sample.double() - sample.double().mean(0)).T
    counts = torch.bincount(cosines.argmax(1), minlength=50)
    assert counts.min() >= 4
    distances = torch.cdist(sae.W_dec.data, sae.W_dec.data) + 9 * torch.eye(D_SAE)
    assert distances.min() > 1e-3


def test_what_it_needs_is_said() -> None:
    with pytest.raises(OptionError, match=r"sample=None .*given for a start of data points"):
        initialize(make(), "datapoint", Spectrum.of(rows()), norm_search=False)
