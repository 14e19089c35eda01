"""Directions with the variances of the data."""

from __future__ import annotations

import pytest
import torch
from small_starts import D_IN, make, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError
from asi_lens.sae.initialize import initialize


def test_directions_have_the_variances_of_the_data() -> None:
    sample = rows()
    spectrum, sae, plain = Spectrum.of(sample), make(torch.float64), make(torch.float64)
    initialize(sae, "variance", spectrum, sample=sample)
    initialize(plain, "random", spectrum, sample=sample)
    V, deviations = spectrum.eigenvectors, spectrum.eigenvalues.sqrt()
    expected = torch.nn.functional.normalize((plain.W_dec.data @ V) * deviations @ V.T)
    torch.testing.assert_close(sae.W_dec.data, expected)
    flat = Spectrum(torch.ones(D_IN).double(), torch.zeros(D_IN).double(), 10**6, torch.eye(D_IN).double())
    initialize(sae, "variance", flat, sample=sample)
    torch.testing.assert_close(sae.W_dec.data, plain.W_dec.data)


def test_what_it_needs_is_said() -> None:
    with pytest.raises(OptionError, match=r"spectrum=None .*given for method='variance'"):
        initialize(make(), "variance", sample=rows())
