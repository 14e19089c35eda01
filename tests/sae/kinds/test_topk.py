"""TopK: with nested prefixes, too."""

from __future__ import annotations

import pytest
import torch
from small_kinds import D_SAE, K
from small_trainings import D_IN, quick, rows, small_store

from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.train import Trainer


@pytest.mark.usefixtures("unchecked_shapes")
def test_matryoshka_puts_the_variance_first() -> None:
    store = small_store()
    found = []
    for prefixes in ((), (8, 24)):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, "topk"))
        initialize(sae, "random", store.spectrum, None, store.sample(500))
        trainer = Trainer(sae, quick(n_tokens=64 * 300, lr=1e-2), SparsityConfig(prefixes=prefixes))
        trainer.fit(store, progress=False)
        with torch.no_grad():
            acts = sae.encode_dense(rows())
            acts[:, 24:] = 0
            inner = (acts @ sae.W_dec + sae.b_dec) / sae.input_scale + sae.input_mean
        found.append(((inner - rows()).square().sum() / (rows() - rows().mean(0)).square().sum()).item())
    assert found[1] < 0.6 * found[0]
