"""Numbers of meaning: entropies counted by hand, draws as frequent, losses as the model computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stores import OPTIONS, sinking

import asi_lens as al
from asi_lens.base.errors import OptionError, UnsupportedModelError
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae import firings
from asi_lens.sae.meaning import _matched, ablation_effects, token_information

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


def token_entropy(ids: Sequence[int] | torch.Tensor) -> float:
    """The entropy of the distribution of token ids, in bits."""
    counts = torch.as_tensor(ids).unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return -(shares * shares.log2()).sum().item()


@pytest.fixture
def store(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> al.ActivationStore:
    folder = tmp_path / "store"
    return al.harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=folder, dtype="float32", **OPTIONS)


@pytest.fixture
def sae(store: al.ActivationStore) -> al.SparseAutoencoder:
    sae = al.SparseAutoencoder(al.SAEConfig(store.d, 40, 3, metadata=store.metadata))
    al.initialize(sae, "asi", store.spectrum, 8, store.sample(100))
    return sae


def test_entropies_of_the_tokens_that_fire(
    sae: al.SparseAutoencoder, store: al.ActivationStore, tiny_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firings, "_BLOCK", 50)
    table = token_information(sae, store, tiny_tokens).set_index("feature")
    dense = sae.encode_dense(torch.cat(list(store.in_order(64)))).detach()
    places = store.positions(torch.arange(store.n))
    ids = tiny_tokens.ids[places[:, 0], places[:, 1]]
    fires = dense > 0
    assert table.index.tolist() == (fires.sum(0) > 1).nonzero()[:, 0].tolist()
    for feature, row in table.iterrows():
        own = ids[fires[:, int(str(feature))]]
        assert row.firings == len(own)
        assert row.entropy == pytest.approx(token_entropy(own), abs=1e-9)
        assert row.information == row.entropy_matched - row.entropy


def test_a_random_feature_tells_nothing() -> None:
    """Entropies of fresh draws have the matched entropy as their mean, and all tokens have their entropy."""
    ids = np.random.default_rng(1).zipf(1.5, 5000) % 50
    sizes = [2, 10, 200, 5000]
    matched = _matched(ids, sizes, draws=400, seed=0)
    assert matched[5000] == pytest.approx(token_entropy(torch.from_numpy(ids)), abs=1e-9)
    generator = np.random.default_rng(2)
    for size in sizes[:3]:
        drawn = [
            token_entropy(torch.from_numpy(generator.choice(ids, size, replace=False))) for _ in range(400)
        ]
        error = np.std(drawn) / math.sqrt(400)
        assert abs(np.mean(drawn) - matched[size]) < 5 * math.sqrt(2) * error


@pytest.mark.model_facing
def test_ablations_against_an_edit_of_the_model(
    sae: al.SparseAutoencoder, store: al.ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    dense = sae.encode_dense(torch.cat(list(store.in_order(64)))).detach()
    counts = (dense > 0).sum(0)
    often, never = int(counts.argmax()), int(counts.argmin())
    with torch.no_grad():
        sae.b_enc[never] = -1e6
    found = ablation_effects(sae, tiny_llama, tiny_tokens, [often, never], batch_tokens=96, progress=False)
    found = found.set_index("feature")
    assert math.isnan(found.loss_increase[never])
    assert found.firings.to_dict() == {often: int(counts[often]), never: 0}
    hook = models.hook_name(tiny_llama, "attn_out", 1)

    def edited(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        value = sae.encode_dense(x[:, 1:])[..., often, None].detach()
        out[:, 1:] -= value * sae.W_dec[often].detach() / sae.input_scale
        return out

    losses = []
    for hooks in ({}, {hook: edited}):
        logits = models.forward(tiny_llama, tiny_tokens.ids, hooks, logits=True)
        assert logits is not None
        log_p = logits[:, :-1].double().log_softmax(-1)
        losses.append(-log_p.gather(-1, tiny_tokens.ids[:, 1:, None])[..., 0].sum(1))
    each = losses[1] - losses[0]
    assert found.loss_increase[often] == pytest.approx(
        each.sum().item() / int(counts[often]), rel=1e-3, abs=1e-6
    )
    spread = each.std().item() * math.sqrt(len(each)) / int(counts[often])
    assert found.error[often] == pytest.approx(spread, rel=1e-2, abs=1e-6)


@pytest.mark.model_facing
def test_massive_rows_are_not_edited(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    """Firings are those on the store's rows, which leave massive rows out, and so is the edit."""
    hook = models.hook_name(tiny_llama, "resid_post", 1)
    with sinking(tiny_llama, tiny_tokens) as (tokens, places):
        store = al.harvest_store(
            tiny_llama, tokens, "resid_post", 1, folder=tmp_path / "sinks", dtype="float32", **OPTIONS
        )
        assert store.left_out.tolist() == places.tolist()
        sae = al.SparseAutoencoder(al.SAEConfig(store.d, 40, 3, metadata=store.metadata))
        al.initialize(sae, "random", store.spectrum, sample=store.sample(100))
        left = torch.zeros(12 * 31, dtype=torch.bool).index_fill(0, places, True).view(12, 31, 1)
        counts = firings.find_firings(sae, store, progress=False).counts
        dense, losses, features = [], [], list(range(40))
        models.forward(
            tiny_llama, tokens.ids, {hook: lambda x: dense.append(sae.encode_dense(x[:, 1:]).detach())}
        )
        wrong = (dense[0] > 0).sum((0, 1)) - counts
        feature = int((wrong * (counts > 0)).argmax())
        assert wrong[feature] > 0, "it fires on massive rows too"
        part = dense[0][..., feature, None] * ~left * sae.W_dec[feature].detach() / sae.input_scale

        def edited(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :1], x[:, 1:] - part], 1)

        for hooks in ({}, {hook: edited}):
            logits = models.forward(tiny_llama, tokens.ids, hooks, logits=True)
            assert logits is not None
            losses.append(-logits[:, :-1].double().log_softmax(-1).gather(-1, tokens.ids[:, 1:, None]).sum())
        found = ablation_effects(sae, tiny_llama, tokens, features, progress=False).set_index("feature")
    assert found.firings.tolist() == counts.tolist()
    expected = (losses[1] - losses[0]).item() / int(counts[feature])
    assert found.loss_increase[feature] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_bad_input(
    sae: al.SparseAutoencoder, store: al.ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    with pytest.raises(OptionError, match="features=40"):
        ablation_effects(sae, tiny_llama, tiny_tokens, [40])
    two = al.Transcoder(al.SAEConfig(store.d, 40, 3, d_out=store.d, metadata=store.metadata))
    with pytest.raises(OptionError, match="sae='a transcoder' is not allowed; sae must be an autoencoder"):
        ablation_effects(two, tiny_llama, tiny_tokens, [1])
    nameless = al.SparseAutoencoder(al.SAEConfig(store.d, 40, 3))
    with pytest.raises(OptionError, match="without a site"):
        ablation_effects(nameless, tiny_llama, tiny_tokens, [1])
    with pytest.raises(OptionError, match="draws=0"):
        token_information(sae, store, tiny_tokens, draws=0)
    rows = al.ActivationStore.from_tensor(torch.randn(60, store.d))
    with pytest.raises(OptionError, match="not harvested from tokens"):
        token_information(sae, rows, tiny_tokens)
    untold = al.ActivationStore.from_tensor(torch.randn(60, store.d), {"context": 31, "drop_first": 1})
    with pytest.raises(OptionError, match="not harvested from tokens"):
        token_information(sae, untold, tiny_tokens)
    other = Tokens(tiny_tokens.ids.flip(0), "other", tiny_tokens.tokenizer, tiny_tokens.context)
    for wrong in (other, tiny_tokens[:5]):
        with pytest.raises(OptionError, match=f"must be those of the store, .*{tiny_tokens.fingerprint}"):
            token_information(sae, store, wrong)


@pytest.mark.model_facing
def test_models_and_tokens_that_have_no_loss(
    sae: al.SparseAutoencoder, tiny_llama: Any, tiny_folder: Any, tiny_tokens: Tokens
) -> None:
    bert = models.load_model(tiny_folder("bert"), dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModelError, match="does not predict next tokens"):
        ablation_effects(sae, bert, tiny_tokens, [1], progress=False)
    theirs = Tokens(tiny_tokens.ids, "random", "another:0123456789abcdef", tiny_tokens.context)
    with pytest.raises(OptionError, match="made by another tokenizer"):
        ablation_effects(sae, tiny_llama, theirs, [1], progress=False)


def test_entropy_of_tokens() -> None:
    assert token_entropy([5, 5, 5]) == 0
    assert token_entropy(list(range(8))) == pytest.approx(3)
    assert token_entropy(torch.tensor([1, 1, 2])) == pytest.approx(math.log2(3) - 2 / 3)
