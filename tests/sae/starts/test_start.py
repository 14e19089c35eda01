"""The registry of starts: a new one is known everywhere, and is held to what it says that it needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_starts import D_IN, D_SAE, make, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.experiments.recipes import Recipe
from asi_lens.sae.initialize import initialize
from asi_lens.sae.starts import STARTS, Draw, find_start
from asi_lens.sae.starts.start import set_unit, start


@pytest.fixture
def from_the_sample() -> Iterator[None]:
    @start("made_up")
    def made_up(out: torch.Tensor, draw: Draw) -> torch.Tensor:
        assert draw.sample is not None
        return set_unit(out, draw.sample[: len(out)].double())

    yield
    del STARTS["made_up"]


@pytest.mark.usefixtures("from_the_sample")
def test_a_new_start_is_known_where_starts_are_named() -> None:
    sae, sample = make(), rows()
    report = initialize(sae, "made_up", sample=sample)
    unit = sample[:D_SAE].double()
    torch.testing.assert_close(sae.W_dec.data, (unit / unit.norm(dim=1, keepdim=True)).float())
    assert (report.method, report.d_init) == ("made_up", None)
    assert Recipe("mine", "made_up").init == "made_up"
    with pytest.raises(UnknownNameError, match="did you mean 'made_up'"):
        find_start("made_u")
    with pytest.raises(OptionError, match=r"d_init=4 .*left out for method='made_up'"):
        initialize(sae, "made_up", Spectrum.of(sample), 4, sample)
    with pytest.raises(OptionError, match="reader='random'"):
        Recipe("mine", "made_up", reader="random")


def test_rows_are_put_to_unit_norm() -> None:
    out, exact = torch.empty(5, D_IN), 3 * torch.eye(D_IN).double()[:5]
    assert torch.equal(set_unit(out, exact), torch.full((5,), 3.0).double())
    assert torch.equal(out, torch.eye(D_IN)[:5])
