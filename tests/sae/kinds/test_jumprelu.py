"""JumpReLU: an l0 that is annealed, and two ways to the gradients of thresholds."""

from __future__ import annotations

from typing import Any

import pytest
from small_kinds import D_SAE, WIDTH, K, dense_loss, make
from small_trainings import D_IN, close, quick, rows, same_gradients, small_store

from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.kinds import jumprelu, kind
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


@pytest.mark.parametrize("blocks", ["listed", "crowded", "mixed"])
@pytest.mark.parametrize(
    "options", [{}, {"initial_l0": 20.0, "prefixes": (10, 40)}, {"penalty": "tanh"}], ids=str
)
def test_lists_and_blocks_of_what_is_near_a_threshold_give_the_gradients_of_autograd(
    options: dict[str, Any], blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x, config = make("jumprelu"), rows(64).double(), SparsityConfig(bandwidth=WIDTH, **options)
    trainer, centered = Trainer(sae, quick(), config), sae.centered(x)
    least = sae.activation.threshold - WIDTH / 2
    share = float((centered @ sae.W_enc + sae.b_enc > least).double().mean())
    monkeypatch.setattr(jumprelu, "_CROWDED", {"listed": 1.0, "crowded": 0.0, "mixed": share}[blocks])
    monkeypatch.setattr(kind, "_CPU_ROWS", 16)
    crowded = [first for first, _ in trainer.sparsity.picks(centered, 0).crowded]
    assert len(crowded) in {"listed": [0], "crowded": [4], "mixed": [1, 2, 3]}[blocks]
    _, own, expected = same_gradients(trainer, x, dense_loss(sae, x, config), monkeypatch)
    close(own["threshold"], expected["activation.threshold"])
