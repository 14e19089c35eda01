"""JumpReLU: an l0 that is annealed."""

from __future__ import annotations

import pytest
from small_kinds import D_SAE, K
from small_trainings import D_IN, quick, small_store

from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.train import Trainer


@pytest.mark.usefixtures("unchecked_shapes")
def test_l0_is_annealed_down() -> None:
    store = small_store()
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, "jumprelu"))
    initialize(sae, "random", store.spectrum, None, store.sample(500), initial_l0=20)
    sparsity = SparsityConfig(initial_l0=20, anneal_fraction=0.6, bandwidth=0.5)
    trainer = Trainer(sae, quick(n_tokens=64 * 600, lr=1e-2), sparsity)
    history = trainer.fit(store, progress=False, log_every=20)
    assert history[0]["l0"] == pytest.approx(20, rel=0.15)
    assert [trainer.sparsity.target(step) for step in (0, 180, 360, 599)] == [20, 12, 4, 4]
    assert history[-1]["l0"] == pytest.approx(K, rel=0.15)
