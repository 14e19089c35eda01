"""Aligned training: the constraint before the first and after every step, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_trainings import D_IN, D_SAE, K, Stop, make, quick, same_bits, small_store, stop_at

from asi_lens.base.errors import OptionError
from asi_lens.sae.aligned import AlignedTrainer, align
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.training.checkpoint import OtherConfigurationError


def products(sae: SparseAutoencoder) -> torch.Tensor:
    return (sae.encoder_rows * sae.W_dec.detach()).sum(1)


def test_the_nearest_row_that_meets_the_constraint() -> None:
    sae = make(dtype=torch.float64)
    sae.W_dec.data.mul_(torch.linspace(0.5, 2, D_SAE).double()[:, None])
    before, decoder = sae.encoder_rows.clone(), sae.W_dec.data.clone()
    align(sae)
    torch.testing.assert_close(products(sae), torch.ones(D_SAE).double())
    # The smallest change is along the decoder row; the decoder stays.
    change = sae.encoder_rows - before
    along = (change * decoder).sum(1, keepdim=True) / decoder.square().sum(1, keepdim=True) * decoder
    torch.testing.assert_close(change, along)
    assert torch.equal(sae.W_dec.data, decoder)
    aligned = sae.encoder_rows.clone()
    align(sae)
    torch.testing.assert_close(sae.encoder_rows, aligned)


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_every_step_ends_aligned(optimizer: str) -> None:
    store, sae = small_store(), make()
    initialize(sae, "asi", store.spectrum, 8, store.sample(1000))
    trainer = AlignedTrainer(sae, quick(optimizer=optimizer))
    # A tied start with unit rows is aligned by its scale alone.
    torch.testing.assert_close(sae.encoder_rows, sae.W_dec.data)
    for batch in trainer.stream(store, 0):
        trainer.step(batch)
        torch.testing.assert_close(products(sae), torch.ones(D_SAE), rtol=0, atol=1e-5)
    assert not torch.allclose(sae.encoder_rows, sae.W_dec.data, atol=1e-3), "only the product is held"


def test_it_goes_on_from_its_own_checkpoint_alone(tmp_path: Path) -> None:
    store = small_store()
    straight, begun = AlignedTrainer(make(), quick()), AlignedTrainer(make(), quick())
    straight.fit(store, progress=False)
    options = {"folder": tmp_path, "checkpoint_every": 64 * 5, "log_every": 1, "progress": False}
    with pytest.raises(Stop):
        begun.fit(store, on_log=stop_at(20), **options)
    with pytest.raises(OtherConfigurationError, match="aligned"):
        Trainer(make(), quick(kernels="plain")).fit(store, **options)
    again = AlignedTrainer(make(), quick())
    again.fit(store, **options)
    assert same_bits(straight, again)


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(OptionError, match=r"search='subspace' .*'exact' for aligned training"):
        AlignedTrainer(make(), quick(), search="subspace")
    with pytest.raises(OptionError, match="a transcoder"):
        AlignedTrainer(Transcoder(SAEConfig(D_IN, D_SAE, K, d_out=D_IN)), quick())
