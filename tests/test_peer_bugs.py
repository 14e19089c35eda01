"""Bugs that other libraries had, each of which users met: what ours does there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import D_IN, D_SAE, K, make, quick, rows, small_store

from asi_lens.base.errors import UnknownNameError
from asi_lens.collapse.interventions import loss_recovered
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate
from asi_lens.sae.initialize import initialize
from asi_lens.sae.train import Trainer
from asi_lens.training import sharded_checkpoint
from asi_lens.training.config import TrainConfig


def test_the_auxiliary_loss_moves_the_encoder_of_dead_features() -> None:
    # Its gradient stopped at the decoder.
    sae = make()
    sae.b_enc.data[100:] = -1.0  # rarely among the top k, but positive on some tokens
    before = sae.encoder_rows[100:].clone()
    trainer = Trainer(sae, quick(aux_k=8, dead_window=1, optimizer="sparse_adam"))
    trainer.ledger.n_tokens = 10
    trainer.ledger.last_fired[:100] = 10
    assert trainer.step(rows(64)).aux_loss > 0
    assert (sae.encoder_rows[100:] != before).any(1).sum() >= 8


def test_a_pick_of_value_zero_did_not_fire() -> None:
    # TopK returns k indices even if nothing is positive; they were counted.
    sae = make()
    sae.b_enc.data.fill_(-1e4)
    trainer = Trainer(sae, quick(dead_window=64))
    for _ in range(2):
        output = trainer.step(rows(64))
    assert (output.l0, output.dead_fraction, trainer.ledger.silent_fraction) == (0, 1, 1)


def test_the_auxiliary_target_has_no_bias_in_it() -> None:
    # b_dec was added to what dead features should reconstruct; wherever the origin is, they should the same.
    found = []
    for shift in (0.0, 7.0):
        sae = make()
        sae.b_dec.data.fill_(shift)
        trainer = Trainer(sae, quick(aux_k=8, dead_window=1))
        trainer.ledger.n_tokens = 10
        trainer.ledger.last_fired[:100] = 10
        found.append(trainer.step(rows(64) + shift).aux_loss)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 0


def test_explained_variance_is_relative_to_the_mean() -> None:
    # Relative to zero, predicting a large mean explains nearly everything.
    sae, x = make(), rows(500) + 100
    sae.b_enc.data.fill_(-1e6)
    sae.b_dec.data.copy_(x.mean(0))
    assert evaluate(sae, x).explained_variance == pytest.approx(0, abs=1e-4)


def test_an_error_does_not_depend_on_how_tokens_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    # It was divided by the tokens of a batch, and averaged over batches of unequal size.
    sae, x = make(), rows(500)
    whole = evaluate(sae, x)
    for name in ("evaluate._ROWS", "dictionary._BLOCK"):
        monkeypatch.setattr(f"asi_lens.sae.{name}", 37)
    assert evaluate(sae, x).fvu == pytest.approx(whole.fvu, rel=1e-6)


def test_recovered_loss_is_one_for_a_perfect_reconstruction() -> None:
    # The ratio was upside down.
    assert loss_recovered(3.0, 3.0, 5.0) == 1
    assert loss_recovered(5.0, 3.0, 5.0) == 0


def test_the_mean_is_the_mean() -> None:
    # What was called a geometric median was the mean; here nothing is called what it is not.
    sae, x = make(), rows(500)
    x[0] += 1e4
    initialize(sae, "random", sample=x, center=False, b_dec="mean")
    torch.testing.assert_close(sae.b_dec / sae.input_scale, x.mean(0), rtol=1e-4, atol=1e-4)


def test_checkpoints_count_tokens_whatever_the_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Positions in tokens and in steps were mixed.
    for batch_size in (32, 64):
        written: list[int] = []

        def keep(folder: Path, state: Any, about: Any, mesh: Any, written: list[int] = written) -> None:
            written.append(about["tokens"])

        monkeypatch.setattr(sharded_checkpoint, "write", keep)
        config = quick(batch_size=batch_size, n_tokens=640)
        Trainer(make(), config).fit(
            small_store(), folder=tmp_path / str(batch_size), checkpoint_every=192, progress=False
        )
        assert written == [192, 384, 576, 640]


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk", "gated"])
def test_folding_the_scale_reaches_thresholds(activation: str) -> None:
    # Weights were scaled, thresholds were not.
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, activation))
    initialize(sae, "random", sample=rows(500))
    assert float(sae.input_scale) != pytest.approx(1, abs=0.1)
    x, w = rows(100), sae.folded()
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = z.relu() * (z > w.get("threshold", torch.zeros(())))
    if activation == "gated":
        acts = (z > 0) * ((z - w["b_enc"]) * w["r_mag"].exp() + w["b_mag"]).relu()
    torch.testing.assert_close(acts @ w["W_dec"] + w["b_dec"], sae(x), rtol=1e-4, atol=1e-4)
    assert (acts > 0).sum(1).double().mean().item() == pytest.approx(K, rel=0.3)


@pytest.mark.parametrize("config", [SAEConfig, TrainConfig])
def test_unknown_keys_raise(config: Any) -> None:
    # They were ignored, so that a misspelled option changed nothing, silently.
    known = {"d_in": 4, "d_sae": 8, "k": 2} if config is SAEConfig else {"lr": 1e-3}
    assert config.from_dict(known)
    with pytest.raises(UnknownNameError, match="did you mean"):
        config.from_dict({**known, "sed": 1})
