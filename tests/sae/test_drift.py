"""Shares of rows inside a subspace, and their log over training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_trainings import D_IN, D_SAE, Stop, make, quick, small_store, stop_at

from asi_lens.base.errors import OptionError
from asi_lens.sae.dictionary import SAEConfig
from asi_lens.sae.drift import Drift, subspace_share
from asi_lens.sae.initialize import initialize
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.training.metrics import read_metrics

R = 5


def basis(d: int, r: int, seed: int = 0) -> torch.Tensor:
    square = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(square).Q[:, :r]


def test_random_directions_lie_inside_by_the_subspace_s_share() -> None:
    rows = torch.randn(4000, 30, generator=torch.Generator().manual_seed(0))
    shares = subspace_share(rows, torch.eye(30).double()[:, :10])
    assert shares.mean().item() == pytest.approx(1 / 3, abs=0.01)


@given(r=st.integers(1, 8), inside=st.floats(0, 1), norm=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_a_share_is_that_of_its_parts(r: int, inside: float, norm: float, seed: int) -> None:
    V, draw = basis(9, r, seed), torch.Generator().manual_seed(seed)
    within = V @ torch.randn(r, generator=draw, dtype=torch.float64)
    without = torch.randn(9, generator=draw, dtype=torch.float64)
    without -= V @ (V.T @ without)
    row = within / within.norm() * math.sqrt(inside) + without / without.norm() * math.sqrt(1 - inside)
    assert subspace_share(norm * row[None], V).item() == pytest.approx(inside, abs=1e-9)


def test_asi_begins_inside_and_random_everywhere() -> None:
    store = small_store()
    drift = Drift(store.spectrum, R)
    asi, random = make(), make()
    initialize(asi, "asi", store.spectrum, R, store.sample(500))
    initialize(random, "random", store.spectrum, None, store.sample(500))
    begun = drift(asi)
    for name in ("decoder_inside", "decoder_inside_p10", "encoder_inside", "encoder_inside_p10"):
        assert begun[name] == pytest.approx(1, abs=1e-5)
    assert drift(random)["decoder_inside"] == pytest.approx(R / D_IN, abs=0.05)


def test_quantiles_are_over_features_and_rows_of_zeros_are_left_out() -> None:
    store, sae = small_store(), make()
    V = store.spectrum.active_subspace(D_IN).float()
    with torch.no_grad():
        # A quarter of the features outside, the others inside; of the encoder nothing is left.
        sae.W_dec.copy_(V[:, :1].T.expand(D_SAE, D_IN))
        sae.W_dec[: D_SAE // 4] = V[:, -1]
        sae.W_enc.zero_()
    found = Drift(store.spectrum, R)(sae)
    assert found["decoder_inside"] == pytest.approx(0.75, abs=1e-5)
    assert found["decoder_inside_p10"] == pytest.approx(0, abs=1e-5)
    assert found["decoder_inside_median"] == pytest.approx(1, abs=1e-5)
    assert math.isnan(found["encoder_inside"])


def test_a_stopped_run_has_the_same_log_of_drift(tmp_path: Path) -> None:
    store = small_store()

    def trainer() -> Trainer:
        sae = make()
        initialize(sae, "asi", store.spectrum, R, store.sample(500))
        return Trainer(sae, quick(), drift=Drift(store.spectrum, R))

    options = {"checkpoint_every": 64 * 4, "log_every": 2, "progress": False}
    whole = trainer().fit(store, **options)
    with pytest.raises(Stop):
        trainer().fit(store, folder=tmp_path, on_log=stop_at(14), **options)
    trainer().fit(store, folder=tmp_path, **options)
    columns = ("step", "decoder_inside", "encoder_inside_p90")
    again = read_metrics(tmp_path / "metrics.csv")
    assert [[row[c] for c in columns] for row in again] == [[row[c] for c in columns] for row in whole]
    # Training moves features: what is logged is not where they began.
    assert again[-1]["decoder_inside"] < again[0]["decoder_inside"] < 1


def test_a_subspace_that_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="d_init"):
        Drift(small_store().spectrum, D_IN + 1)
    transcoder = Transcoder(SAEConfig(D_IN, 64, 4, d_out=D_IN + 2))
    with pytest.raises(OptionError, match="drift is not allowed for a transcoder"):
        Trainer(transcoder, quick(), drift=Drift(small_store().spectrum, 4))
