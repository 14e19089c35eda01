"""Cards of a Lorsa's units: where they write, what they read, what that does to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_lorsas import CONTEXT, LAYER, N_OV, K, started

from asi_lens.base.errors import OptionError
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.lorsa.attention import write_site
from asi_lens.lorsa.data import SequencePairs, harvest_pairs
from asi_lens.lorsa.features import UnitFeatures
from asi_lens.lorsa.initialize import from_attention
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae.browse import card_html

pytestmark = [
    pytest.mark.model_facing,
    pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning"),
]
OPTIONS: dict[str, Any] = {"top": 4, "sampled": 3, "progress": False}


@pytest.fixture(scope="module")
def looked(tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs) -> UnitFeatures:
    return UnitFeatures(started(tiny_llama, pairs), pairs, tiny_tokens, tiny_llama, **OPTIONS)


@torch.no_grad()
def dense(lorsa: Lorsa, pairs: SequencePairs) -> torch.Tensor:
    """Sizes [sequence position unit]; 0 at position 0, which does not count."""
    z = torch.zeros(len(pairs), CONTEXT, lorsa.n_ov)
    code = lorsa.encode(pairs.inputs)
    z.scatter_(-1, code.indices, code.values.abs())
    z[:, 0] = 0
    return z


@pytest.mark.parametrize("rectify", [True, False])
def test_contexts_are_where_a_unit_wrote(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs, rectify: bool
) -> None:
    lorsa = started(tiny_llama, pairs, rectify=rectify)
    looked = UnitFeatures(lorsa, pairs, tiny_tokens, tiny_llama, **OPTIONS)
    z = dense(lorsa, pairs)
    assert torch.equal(looked.firings.counts, (z > 0).sum((0, 1)))
    assert looked.firings.counts.sum() <= K * pairs.n
    unit = int(looked.firings.counts.argmax())
    for which, m in (("top", 4), ("sampled", 3)):
        found = looked.contexts(unit, which, before=5, after=2)
        assert len(found) == m
        for context in found:
            start = context.position - context.at
            stop = start + len(context.tokens)
            ids = tiny_tokens.ids[context.sequence, start:stop].tolist()
            assert context.tokens == [looked.word(i) for i in ids]
            assert context.values == pytest.approx(z[context.sequence, start:stop, unit].tolist(), abs=1e-5)
            assert bool(context.reads) == (which == "top")
    assert looked.contexts(unit)[0].value == pytest.approx(z[:, :, unit].max().item(), rel=1e-5)


def test_what_a_unit_reads_adds_up_to_its_value(
    looked: UnitFeatures, tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs
) -> None:
    lorsa: Lorsa = looked.sae
    unit = int(looked.firings.counts.argmax())
    every = UnitFeatures(lorsa, pairs, tiny_tokens, tiny_llama, n_reads=CONTEXT, **OPTIONS)
    for context, few in zip(every.contexts(unit), looked.contexts(unit), strict=True):
        assert [one.position for one in context.reads[:4]] == [one.position for one in few.reads]
        assert sorted(one.position for one in context.reads) == list(range(context.position + 1))
        assert sum(one.attention for one in context.reads) == pytest.approx(1, abs=1e-5)
        assert sum(one.share for one in context.reads) == pytest.approx(1, abs=1e-4)
        shares = [one.share for one in context.reads]
        assert shares == sorted(shares, reverse=True)
        ids = tiny_tokens.ids[context.sequence]
        assert all(one.token == looked.word(int(ids[one.position])) for one in context.reads)
        # By hand: the weight times what the unit finds there.
        x_n = lorsa.normalize(pairs.inputs[context.sequence][None])
        with torch.no_grad():
            pattern = lorsa.heads(x_n)[0, lorsa.head_of_unit[unit], context.position]
            found = x_n[0] @ lorsa.W_V[unit] + lorsa.b_V[unit]
        for one in context.reads:
            assert one.attention == pytest.approx(pattern[one.position].item(), abs=1e-6)
            part = (pattern[one.position] * found[one.position]).item()
            assert one.share * context.value == pytest.approx(part, abs=1e-4)


def test_the_attention_is_the_models_own(tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs) -> None:
    """In the exact copy of a layer, a unit's weights are those of the model's head."""
    copy = from_attention(tiny_llama, LAYER, CONTEXT)
    looked = UnitFeatures(copy, pairs, tiny_tokens, tiny_llama, n_reads=CONTEXT, **OPTIONS)
    unit = int(looked.firings.counts.argmax())
    context = looked.contexts(unit)[0]
    seen: list[torch.Tensor] = []
    hook = f"blocks.{LAYER}.attn.hook_pattern"
    models.forward(tiny_llama, tiny_tokens.ids[context.sequence][None], {hook: lambda p: seen.append(p)})
    head = copy.head_of_unit[unit]
    for one in context.reads:
        own = seen[0][0, head, context.position, one.position].item()
        assert one.attention == pytest.approx(own, abs=1e-4)


def test_cards_show_what_was_read(looked: UnitFeatures) -> None:
    unit = int(looked.firings.counts.argmax())
    card = looked.card(unit, n_similar=3)
    assert card.head == looked.sae.head_of_unit[unit]
    assert len(card.similar) == 3
    assert card.raised
    assert 0 < card.inside <= 1 + 1e-6
    page = card_html(card)
    assert f"Unit {unit} of head {card.head}" in page
    assert f"attention of layer {LAYER} of " in page
    assert page.count("reads from") == len(card.top), "the strongest contexts alone"
    first = card.top[0].reads[0]
    assert f"{100 * first.share:.0f} % of the value, attention {first.attention:.2f}" in page
    start = card.top[0].position - card.top[0].at
    assert (' read"' in page) == any(r.position >= start for c in card.top for r in c.reads)


def test_logits_are_moved_by_what_the_unit_writes(
    looked: UnitFeatures, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    lorsa, unit = looked.sae, int(looked.firings.counts.argmax())
    push = lorsa.W_O[unit].detach() / lorsa.output_scale
    torch.testing.assert_close(looked.written(unit), push)
    push = push * looked.firings.mean[unit].float()
    last, ids = models.hook_name(tiny_llama, "resid_post", 2), tiny_tokens.ids[:4]
    clean, moved = (
        models.forward(tiny_llama, ids, {last: lambda x, p=p: x + p}, logits=True)[:, 1:]
        .double()
        .mean((0, 1))
        for p in (torch.zeros(()), push)
    )
    change = moved - clean
    torch.testing.assert_close(
        looked.logit_effect(unit).double(), change - change.mean(), rtol=1e-3, atol=1e-5
    )


def test_a_norm_after_the_layer_hides_the_logits(tiny_folder: Any, tiny_tokens: Tokens) -> None:
    gemma = models.load_model(tiny_folder("gemma2"), dtype="float32", device="cpu")
    pairs = harvest_pairs(gemma, tiny_tokens, LAYER, progress=False)
    assert pairs.metadata["hook_name"] == write_site(gemma, LAYER)
    looked = UnitFeatures(started(gemma, pairs), pairs, tiny_tokens, gemma, **OPTIONS)
    card = looked.card(int(looked.firings.counts.argmax()))
    assert "normed or scaled before it is added" in card.no_logits
    assert card.top[0].reads


def test_bad_input(looked: UnitFeatures, tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs) -> None:
    lorsa = looked.sae
    nameless = SequencePairs(pairs.inputs, pairs.outputs)
    with pytest.raises(OptionError, match="not harvested from tokens"):
        UnitFeatures(lorsa, nameless, tiny_tokens, tiny_llama, progress=False)
    with pytest.raises(OptionError, match=f"tokens='random', fingerprint .* {tiny_tokens.fingerprint}"):
        UnitFeatures(lorsa, pairs, tiny_tokens[:5], tiny_llama, progress=False)
    narrow = SequencePairs(pairs.inputs[..., 1:], pairs.outputs[..., 1:], pairs.metadata)
    with pytest.raises(OptionError, match="d_in=24"):
        UnitFeatures(lorsa, narrow, tiny_tokens, tiny_llama, progress=False)
    with pytest.raises(OptionError, match="n_reads=-1"):
        UnitFeatures(lorsa, pairs, tiny_tokens, tiny_llama, n_reads=-1)
    with pytest.raises(OptionError, match=f"feature={N_OV}"):
        looked.card(N_OV)
