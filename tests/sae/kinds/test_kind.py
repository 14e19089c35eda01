"""Training of every activation function: gradients by definition, l0 where it was aimed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_kinds import D_SAE, WIDTH, K, buried, dense_loss, make
from small_trainings import D_IN, close, quick, rows, same_gradients, small_store

from asi_lens.sae import kinds
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.kinds import KINDS, kinds_with
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.train import Trainer

CASES = [
    ("topk", {"prefixes": (10, 40)}),
    ("batchtopk", {}),
    ("batchtopk", {"prefixes": (10, 40)}),
    ("relu", {"coefficient": 0.3}),
    ("gated", {"coefficient": 0.3}),
    ("gated", {"coefficient": 0.3, "prefixes": (10, 40)}),
    ("jumprelu", {"coefficient": 0.3}),
    ("jumprelu", {"coefficient": 0.3, "initial_l0": 20.0, "prefixes": (10, 40)}),
    ("jumprelu", {"coefficient": 0.3, "penalty": "tanh"}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_step_gradients_equal_autograd(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = make(kind), rows(64).double()
    config = SparsityConfig(bandwidth=WIDTH, **options)
    trainer = Trainer(sae, quick(), config)
    loss = dense_loss(sae, x, config)
    output, own, expected = same_gradients(trainer, x, loss, monkeypatch)
    assert set(own) == {"jumprelu": {"threshold"}, "gated": {"r_mag", "b_mag"}}.get(kind, set())
    for name, grad in own.items():
        assert expected[f"activation.{name}"].any()
        close(grad, expected[f"activation.{name}"])
    if not config.prefixes:
        assert output.loss + output.penalty == pytest.approx(loss.item())


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].picks_k])
@pytest.mark.parametrize("method", ["random", "asi"])
def test_l0_reaches_its_target(kind: str, method: str) -> None:
    store = small_store()
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
    d_init = 8 if method == "asi" else None
    initialize(sae, method, store.spectrum, d_init, store.sample(500))
    trainer = Trainer(sae, quick(n_tokens=64 * 600, lr=1e-2), KINDS[kind].default)
    history = trainer.fit(store, progress=False, log_every=5)[-10:]
    assert sum(row["l0"] for row in history) / 10 == pytest.approx(K, rel=0.15)
    # L1 shrinks what it keeps.
    assert history[-1]["fvu"] < (0.75 if kind == "relu" else 0.5)
    # What inference does agrees with what training did.
    assert sae.encode_dense(rows()).gt(0).sum(1).double().mean().item() == pytest.approx(K, rel=0.25)


@pytest.mark.parametrize("kind", list(KINDS))
def test_computing_in_bfloat16_changes_little(kind: str) -> None:
    store = small_store()
    fvu = {}
    for dtype in ("float32", "bfloat16"):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
        initialize(sae, "random", store.spectrum, None, store.sample(400))
        fvu[dtype] = Trainer(sae, quick(compute_dtype=dtype)).fit(store, progress=False)[-1]["fvu"]
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], rel=0.05)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stored_run_goes_on_to_the_same_bits(kind: str) -> None:
    store, finals = small_store(), []
    for stop in (None, 700):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
        initialize(sae, "random", store.spectrum, None, store.sample(500))
        trainer = Trainer(sae, quick(), SparsityConfig(coefficient=0.1))
        if stop:
            for batch in store.batches(64, seed=0, n_tokens=640):
                trainer.step(batch)
            state = {name: tensor.clone() for name, tensor in trainer.state().items()}
            fresh = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
            initialize(fresh, "random", store.spectrum, None, store.sample(500))
            trainer = Trainer(fresh, quick(), SparsityConfig(coefficient=0.1))
            trainer.load_state(state.__getitem__)
        for batch in store.batches(64, seed=0, start=trainer.tokens, n_tokens=64 * 30):
            trainer.step(batch)
        finals.append(trainer.state())
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "relu"])
def test_aux_k_reaches_dead_features(kind: str) -> None:
    trainer, before, output = buried(kind)
    sae, store = trainer.sae, small_store()
    assert output.dead_fraction > 0.4
    # So far below zero nothing can be picked, and nothing is learned.
    assert torch.equal(sae.encoder_rows[50:], before)
    sae.b_enc.data[50:] = -0.5
    for batch in store.batches(64, n_tokens=64 * 2):
        output = trainer.step(batch)
    assert output.aux_loss > 0
    assert not torch.equal(sae.encoder_rows[50:], before)


def test_facts_are_listed_as_errors_say_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", {name: KINDS[name] for name in ("topk", "jumprelu", "gated", "relu")})
    assert kinds_with("picks_k") == "'topk'"
    assert kinds_with("has_threshold") == "'jumprelu', 'gated' or 'relu'"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_kind_without_a_name_elsewhere_is_saved_for_us_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fact, value in {"saelens": None, "saelens_names": {}, "sparsify": False}.items():
        monkeypatch.setattr(KINDS[kind], fact, value)
    sae = make(kind, torch.float32)
    sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae" / "cfg.json").exists()
    again = SparseAutoencoder.load(tmp_path / "sae").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in sae.state_dict().items())
