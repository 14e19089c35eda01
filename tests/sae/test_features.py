"""Cards of features: contexts as the text has them, effects on the logits as the model computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import OPTIONS
from torch import Tensor
from transformers import AutoModelForCausalLM

import asi_lens as al
from asi_lens.activations.pairs import PairedStores
from asi_lens.base.errors import OptionError, UnsupportedModelError
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae.features import Features

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


def dictionary(store: al.ActivationStore, d_sae: int = 40, k: int = 3) -> al.SparseAutoencoder:
    sae = al.SparseAutoencoder(al.SAEConfig(store.d, d_sae, k, metadata=store.metadata))
    al.initialize(sae, "asi", store.spectrum, 8, store.sample(100))
    return sae


def harvested(model: Any, tokens: Tokens, folder: Path, site: str = "attn_out") -> al.ActivationStore:
    return al.harvest_store(model, tokens, site, 1, folder=folder / site, dtype="float32", **OPTIONS)


@pytest.fixture
def features(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> Features:
    store = harvested(tiny_llama, tiny_tokens, tmp_path)
    return Features(dictionary(store), store, tiny_tokens, tiny_llama, top=4, sampled=3, progress=False)


def test_contexts_are_the_text_around_firings(features: Features, tiny_tokens: Tokens) -> None:
    store, sae = features.store, features.sae
    assert isinstance(store, al.ActivationStore)
    dense = sae.encode_dense(torch.cat(list(store.in_order(64)))).detach()
    index = {tuple(p): i for i, p in enumerate(store.positions(torch.arange(store.n)).tolist())}
    feature = int(features.firings.counts.argmax())
    for which, m in (("top", 4), ("sampled", 3)):
        found = features.contexts(feature, which, before=5, after=2)
        assert len(found) == m
        assert [c.value for c in found] == sorted((c.value for c in found), reverse=True)
        for context in found:
            start = context.position - context.at
            assert start == max(0, context.position - 5)
            ids = tiny_tokens.ids[context.sequence, start : context.position + 3].tolist()
            assert context.tokens == [features.word(i) for i in ids]
            for place, value in enumerate(context.values):
                row = index.get((context.sequence, start + place))
                expected = 0.0 if row is None else dense[row, feature].item()
                assert value == pytest.approx(expected, abs=1e-5)
    top = features.contexts(feature)
    assert top[0].value == pytest.approx(dense[:, feature].max().item(), rel=1e-5)


@pytest.mark.model_facing
@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_post", "z"])
def test_logits_against_the_model_itself(
    tiny_llama: Any, tiny_tokens: Tokens, tiny_folder: Any, tmp_path: Path, site: str
) -> None:
    """The final norm and unembedding are written down here, for the Llama that they are of."""
    store = harvested(tiny_llama, tiny_tokens, tmp_path, site)
    sae = dictionary(store)
    looked = Features(sae, store, tiny_tokens, tiny_llama, progress=False)
    feature = int(looked.firings.counts.argmax())
    residual: list[Tensor] = []
    last = models.hook_name(tiny_llama, "resid_post", 2)
    models.forward(tiny_llama, tiny_tokens.ids[:4], {last: lambda x: residual.append(x[:, 1:].clone())})
    x = residual[0].double()
    push = (sae.W_dec[feature] / sae.input_scale * looked.firings.mean[feature]).detach().double()
    if site == "z":
        push = push @ models.output_projection(tiny_llama, 1).flatten(0, 1).double()
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).double()
    norm, head, epsilon = plain.model.norm.weight, plain.lm_head.weight, plain.config.rms_norm_eps

    @torch.no_grad()
    def logits(rows: Tensor) -> Tensor:
        return rows * (rows.square().mean(-1, keepdim=True) + epsilon).rsqrt() * norm @ head.T

    change = (logits(x + push) - logits(x)).mean((0, 1))
    torch.testing.assert_close(
        looked.logit_effect(feature).double(), change - change.mean(), rtol=1e-3, atol=1e-5
    )
    card = looked.card(feature, n_logits=3)
    assert [word for word, _ in card.raised] == [looked.word(i) for i in change.topk(3).indices.tolist()]
    assert card.lowered[0][1] == pytest.approx((change - change.mean()).min().item(), rel=1e-3, abs=1e-5)


@pytest.mark.model_facing
@pytest.mark.parametrize("site", ["attn_out", "z"])
def test_effects_on_the_logits_are_of_float32(
    tiny_folder: Any, tiny_tokens: Tokens, tmp_path: Path, site: str
) -> None:
    """bfloat16 rounds a small push away. The copy in float32 has the same weights."""
    half, exact = (models.load_model(tiny_folder("llama"), dtype="bfloat16", device="cpu") for _ in range(2))
    exact.original_model.float()
    store = harvested(half, tiny_tokens, tmp_path, site)
    sae, found = dictionary(store), []
    for model in (half, exact):
        looked = Features(sae, store, tiny_tokens, model, progress=False)
        looked.firings.sums.mul_(0.01)
        found.append(looked.logit_effect(int(looked.firings.counts.argmax())))
    assert half.original_model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5 * found[1].abs().max().item())


@pytest.mark.model_facing
def test_a_model_that_float32_does_not_fit_shows_no_logits(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: Any) -> Any:
        raise UnsupportedModelError("too little memory")

    monkeypatch.setattr("asi_lens.sae.features.in_float32", refused)
    card = features.card(int(features.firings.counts.argmax()))
    assert (card.no_logits, card.raised, len(card.top)) == ("too little memory", [], 4)


def test_cards(features: Features) -> None:
    rows = features.sae.W_dec.detach()
    card = features.card(3, n_similar=39)
    cosines = {i: float(rows[3] @ rows[i]) for i in range(40) if i != 3}
    assert [i for i, _ in card.similar] == sorted(cosines, key=lambda i: -cosines[i])
    # ASI's rows lie in the subspace that they started in.
    assert card.inside == pytest.approx(1, abs=1e-5)
    assert features.d_init == 8
    assert "attn_out 1 of " in card.site
    assert card.frequency == pytest.approx(features.firings.counts[3].item() / len(features.store))


def test_features_that_never_fire(features: Features) -> None:
    with torch.no_grad():
        features.sae.b_enc[7] = -1e6
    silent = Features(features.sae, features.store, features.tokens, features.model, progress=False)
    card = silent.card(7)
    assert (card.frequency, card.mean, card.top, card.raised) == (0, None, [], [])
    assert "never fires" in card.no_logits
    assert 7 not in [number for group in silent.choice(40).values() for number in group]


def test_search_and_choice(features: Features) -> None:
    best = features.contexts(int(features.firings.counts.argmax()))[0]
    word = best.tokens[best.at]
    found = features.search(word)
    largest = []
    for feature in found:
        values = [c.value for c in features.contexts(feature) if word in c.tokens[c.at]]
        assert values
        largest.append(max(values))
    assert largest == sorted(largest, reverse=True)
    assert features.search("no such token") == []
    counts = features.firings.counts
    choice = features.choice(4)
    assert [counts[i] for i in choice["most frequent"]] == counts.sort(descending=True).values[:4].tolist()
    assert all(counts[i] > 0 for i in choice["rarest"])


def test_transcoders(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    reads, writes = (harvested(tiny_llama, tiny_tokens, tmp_path, s) for s in ("resid_post", "mlp_out"))
    pairs = PairedStores(reads, writes)
    coder = al.Transcoder(al.SAEConfig(reads.d, 30, 3, d_out=writes.d))
    al.initialize_transcoder(coder, pairs, "asi", d_init=6)
    looked = Features(coder, pairs, tiny_tokens, tiny_llama, progress=False)
    feature = int(looked.firings.counts.argmax())
    torch.testing.assert_close(looked.written(feature), coder.W_dec[feature].detach() / coder.output_scale)
    assert looked.card(feature).raised


def test_a_dictionary_of_another_model_is_told(features: Features) -> None:
    assert features.trained_elsewhere == ""
    config = features.sae.config
    object.__setattr__(config, "metadata", {**config.metadata, "model": "other"})
    assert features.trained_elsewhere == "; the dictionary was trained on other"


@pytest.mark.model_facing
def test_effects_on_the_logits_are_those_of_the_model_as_it_is_now(
    tiny_folder: Any, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    model = models.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    store = harvested(model, tiny_tokens, tmp_path)
    looked = Features(dictionary(store), store, tiny_tokens, model, progress=False)
    feature = int(looked.firings.counts.argmax())
    before = looked.logit_effect(feature)
    assert torch.equal(looked.logit_effect(feature), before)
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(looked.logit_effect(feature), before, rtol=1e-3, atol=1e-6)
    handle.remove()
    with torch.no_grad():
        model.original_model.lm_head.weight.mul_(2)
    edited = looked.logit_effect(feature)
    anew = Features(looked.sae, store, tiny_tokens, model, progress=False)
    assert torch.equal(edited, anew.logit_effect(feature))
    assert (edited - before).abs().max() > 0.1 * before.abs().max()


def test_sites_outside_the_stream(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    store = harvested(tiny_llama, tiny_tokens, tmp_path, "blocks.1.ln1.hook_normalized")
    looked = Features(dictionary(store), store, tiny_tokens, tiny_llama, progress=False)
    feature = int(looked.firings.counts.argmax())
    assert "does not add to the residual stream" in looked.card(feature).no_logits
    with pytest.raises(UnsupportedModelError, match="does not add"):
        looked.logit_effect(feature)


@pytest.mark.model_facing
def test_what_is_changed_before_it_is_added_hides_the_logits_of_z(
    tiny_folder: Any, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    model = models.load_model(tiny_folder("gemma2"), dtype="float32", device="cpu")
    for site, told in (("z", "normed or scaled before it is added"), ("attn_out", "")):
        store = harvested(model, tiny_tokens, tmp_path, site)
        looked = Features(dictionary(store), store, tiny_tokens, model, progress=False)
        card = looked.card(int(looked.firings.counts.argmax()))
        assert told in card.no_logits
        assert bool(card.raised) == (card.no_logits == "") == (site == "attn_out")


def test_bad_input(features: Features, tiny_llama: Any, tiny_tokens: Tokens) -> None:
    sae, store = features.sae, features.store
    nameless = al.ActivationStore.from_tensor(torch.randn(300, store.d))
    with pytest.raises(OptionError, match="not harvested from tokens"):
        Features(sae, nameless, tiny_tokens, tiny_llama, progress=False)
    with pytest.raises(OptionError, match=f"tokens='random', fingerprint .* {tiny_tokens.fingerprint}"):
        Features(sae, store, tiny_tokens[:5], tiny_llama, progress=False)
    narrow = al.SparseAutoencoder(al.SAEConfig(store.d - 1, 30, 3))
    with pytest.raises(OptionError, match=f"d_in={store.d - 1}"):
        Features(narrow, store, tiny_tokens, tiny_llama, progress=False)
    for wrong in (-1, 40):
        with pytest.raises(OptionError, match=f"feature={wrong}"):
            features.card(wrong)
    with pytest.raises(OptionError, match="which='best'"):
        features.contexts(0, "best")
    with pytest.raises(OptionError, match="text=''"):
        features.search("")
