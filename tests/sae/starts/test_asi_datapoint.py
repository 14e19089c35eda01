"""Data points inside the active subspace: a projection of the blends."""

from __future__ import annotations

import pytest
import torch
from small_starts import D_IN, make, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError
from asi_lens.sae.initialize import initialize


def test_it_is_the_projection_of_the_data_points() -> None:
    sample = rows()
    spectrum, plain, active = Spectrum.of(sample), make(torch.float64), make(torch.float64)
    initialize(plain, "datapoint", spectrum, sample=sample)
    report = initialize(active, "asi_datapoint", spectrum, 10, sample)
    V = spectrum.active_subspace(10)
    projected = torch.nn.functional.normalize(plain.W_dec.data @ V @ V.T)
    torch.testing.assert_close(active.W_dec.data, projected)
    assert report.leak_decoder is not None
    assert report.leak_decoder < 1e-12
    # All of the space is no projection at all.
    initialize(active, "asi_datapoint", spectrum, D_IN, sample)
    torch.testing.assert_close(active.W_dec.data, plain.W_dec.data)


def test_what_it_needs_is_said() -> None:
    with pytest.raises(OptionError, match=r"sample=None .*given for a start of data points"):
        initialize(make(), "asi_datapoint", Spectrum.of(rows()), 10, norm_search=False)
