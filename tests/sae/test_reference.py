"""The fast step against the method as it reads on one screen."""

from __future__ import annotations

import pytest
import torch
from small_trainings import D_SAE, K, make, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.sae.initialize import initialize
from asi_lens.sae.reference import Reference
from asi_lens.sae.train import TrainConfig, Trainer

STEPS, BATCH, WINDOW = 12, 50, 100


@pytest.mark.parametrize("aux_k", [0, 8])
@pytest.mark.parametrize("d_init", [None, 6])
def test_training_equals_the_reference(d_init: int | None, aux_k: int) -> None:
    x = rows().double()
    plain = Reference(x, D_SAE, K, d_init, aux_k=aux_k, dead_window=WINDOW, lr=3e-3, seed=5)
    sae = make(seed=5, dtype=torch.float64)
    initialize(sae, "random" if d_init is None else "asi", Spectrum.of(x), d_init, x)
    options = {"warmup_steps": 0, "decay_fraction": 0.0, "batch_size": BATCH, "n_tokens": STEPS * BATCH}
    trainer = Trainer(sae, TrainConfig(lr=3e-3, aux_k=aux_k, dead_window=WINDOW, **options))
    helped = 0

    def same(atol: float) -> None:
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            torch.testing.assert_close(getattr(sae, name), getattr(plain, name), rtol=0, atol=atol)

    same(1e-12)
    for batch in x[: STEPS * BATCH].split(BATCH):
        output, loss = trainer.step(batch), plain.step(batch)
        assert output.loss == pytest.approx(loss, rel=1e-9)
        helped += output.aux_loss > 0
        same(1e-8)
    assert not torch.allclose(sae.W_dec.data, Reference(x, D_SAE, K, d_init, seed=5).W_dec.data, atol=1e-3)
    assert (helped > 3) == bool(aux_k)
    dead = (plain.tokens_since_fired >= WINDOW).nonzero().flatten()
    assert torch.equal(trainer.ledger.dead(WINDOW), dead)
    assert 0 < len(dead) < D_SAE
