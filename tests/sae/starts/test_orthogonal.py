"""Orthonormal sets."""

from __future__ import annotations

import torch
from small_starts import D_IN, make

from asi_lens.activations.spectrum import Spectrum
from asi_lens.sae.initialize import initialize


def test_orthogonal_directions_come_in_orthonormal_sets(spectrum: Spectrum, sample: torch.Tensor) -> None:
    sae = make(torch.float64)
    initialize(sae, "orthogonal", spectrum, sample=sample)
    sets = sae.W_dec.data.split(D_IN)
    for rows_of_one in sets:
        eye = torch.eye(len(rows_of_one), dtype=torch.float64)
        torch.testing.assert_close(rows_of_one @ rows_of_one.T, eye, rtol=0, atol=1e-12)
    assert not torch.allclose(sets[0], sets[1])
