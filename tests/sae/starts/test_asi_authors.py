"""The authors' coordinates and their grid."""

from __future__ import annotations

import pytest
import torch
from small_starts import D_IN, D_SAE, make, mse

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize


def test_the_authors_coordinates_are_uniform(spectrum: Spectrum, sample: torch.Tensor) -> None:
    sae = make(torch.float64, seed=4)
    initialize(sae, "asi_authors", spectrum, 10, sample, norm_search=False)
    uniform = torch.rand(D_SAE, D_IN, generator=torch.Generator().manual_seed(4)) * 2 - 1
    theirs = uniform[:, :10].double() @ spectrum.active_subspace(10).T
    norms = theirs.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.data, theirs / norms)
    # Without the norm search their rows keep the norm of the draw, in encoder and decoder.
    torch.testing.assert_close(sae.encoder_rows, theirs * norms)


def test_the_authors_grid_is_theirs(spectrum: Spectrum, sample: torch.Tensor) -> None:
    sae, x = make(torch.float64), sample.double()
    initialize(sae, "asi_authors", spectrum, 10, x)
    direction = sae.W_dec.data

    def loss(norm: float) -> float:
        sae.encoder_rows.copy_(direction * norm**2)
        return mse(sae, x)

    found = sae.encoder_rows.norm(dim=1)[0].sqrt().item()
    coarse = min((0.1 * i for i in range(1, 51)), key=loss)
    fine = min((coarse - 0.09 + 0.01 * i for i in range(20)), key=loss)
    assert found == pytest.approx(fine)


def test_it_is_refused_for_kinds_with_thresholds(spectrum: Spectrum, sample: torch.Tensor) -> None:
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, 4, "jumprelu"))
    with pytest.raises(
        OptionError, match=r"method='asi_authors' .* activation='jumprelu'; method must be 'asi'"
    ):
        initialize(sae, "asi_authors", spectrum, 10, sample)
