"""Directions with the variances of the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_starts import D_IN, make, rows
from torch._subclasses.fake_tensor import FakeTensorMode

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


def test_rows_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of the covariance follows the rows, here to a device that is made up."""
    moves: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def keep(rows: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        moves.append(move)
        return rows.norm(dim=1)

    monkeypatch.setattr("asi_lens.sae.starts.variance.to_unit_norm", keep)
    initialize(make(), "variance", Spectrum.of(rows()), sample=rows())
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = moves[0](torch.empty(8, D_IN, dtype=torch.float64, device="cuda"))
    assert (moved.device.type, moved.dtype) == ("cuda", torch.float64)
