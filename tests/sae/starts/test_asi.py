"""ASI: a projection."""

from __future__ import annotations

import torch
from small_starts import D_IN, make

from asi_lens.activations.spectrum import Spectrum
from asi_lens.sae.initialize import initialize


def test_asi_is_the_projection_of_what_random_draws(spectrum: Spectrum, sample: torch.Tensor) -> None:
    plain, active = make(torch.float64), make(torch.float64)
    initialize(plain, "random", spectrum, sample=sample)
    initialize(active, "asi", spectrum, 10, sample)
    V = spectrum.active_subspace(10)
    projected = plain.W_dec.data @ V @ V.T
    torch.testing.assert_close(active.W_dec.data, projected / projected.norm(dim=1, keepdim=True))
    # All of the space is no projection at all.
    initialize(active, "asi", spectrum, D_IN, sample)
    torch.testing.assert_close(active.W_dec.data, plain.W_dec.data)
