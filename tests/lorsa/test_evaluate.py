"""Evaluation of a Lorsa: its numbers are their definitions, its losses those of its output put in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from precisions import inside
from small_lorsas import CONTEXT, LAYER, N_OV, read_and_written, started

from asi_lens.base.errors import DataError, OptionError
from asi_lens.collapse import interventions
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.models import load_model
from asi_lens.lorsa import lorsa as lorsa_module
from asi_lens.lorsa.attention import layer_place
from asi_lens.lorsa.data import SequencePairs, harvest_pairs
from asi_lens.lorsa.evaluate import evaluate_lorsa
from asi_lens.lorsa.initialize import from_attention
from asi_lens.sae.splice import Spliced

pytestmark = pytest.mark.model_facing
EACH = CONTEXT - 1


def test_a_layer_exactly_loses_nothing(tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs) -> None:
    exact = from_attention(tiny_llama, LAYER, CONTEXT)
    found = evaluate_lorsa(exact, pairs, model=tiny_llama, tokens=tiny_tokens, progress=False)
    assert found.n_tokens == 12 * EACH
    assert found.fvu < 1e-9
    assert found.explained_variance == pytest.approx(1)
    assert found.losses is not None
    assert found.losses.cross_entropy_delta == pytest.approx(0, abs=1e-5)
    assert found.losses.loss_recovered == pytest.approx(1, abs=1e-3)


def test_starts_and_numbers_are_of_exact_products(
    tiny_llama: Any, pairs: SequencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorsa = started(tiny_llama, pairs)
    products = partial(inside, monkeypatch, lorsa_module, "largest_values")
    assert products(lambda: started(tiny_llama, pairs)) == {"ieee"}
    assert products(lambda: evaluate_lorsa(lorsa, pairs)) == {"ieee"}
    assert products(lambda: lorsa.encode(pairs.inputs)) == {"tf32"}


def test_numbers_are_their_definitions(tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs) -> None:
    lorsa = started(tiny_llama, pairs)
    held_out = pairs[3:]
    found = evaluate_lorsa(lorsa, held_out, model=tiny_llama, tokens=tiny_tokens[3:], progress=False)
    with torch.no_grad():
        y = held_out.outputs[:, 1:].double()
        error = (lorsa(held_out.inputs)[:, 1:].double() - y).square().sum().item()
        code = lorsa.encode(held_out.inputs)
    assert found.fvu == pytest.approx(error / (y - y.mean((0, 1))).square().sum().item(), rel=1e-4)
    values = code.values[:, 1:]
    assert found.l0 == pytest.approx((values > 0).double().sum(-1).mean().item())
    silent = N_OV - len(code.indices[:, 1:][values > 0].unique())
    assert found.dead_fraction == silent / N_OV
    # The reconstruction in place of what attention writes, but at the first position.
    ids = tiny_tokens.ids[3:]
    x, written = read_and_written(tiny_llama, ids, LAYER)
    with torch.no_grad():
        spliced = torch.cat([written[:, :1], lorsa(x)[:, 1:]], 1)
    hook = models.hook_name(tiny_llama, "attn_out", LAYER)
    logits = models.forward(tiny_llama, ids, {hook: lambda _: spliced}, logits=True)
    assert logits is not None
    loss = interventions.next_token_loss(logits, ids).mean().item()
    assert found.losses is not None
    assert found.losses.cross_entropy == pytest.approx(loss, rel=1e-5)
    assert found.losses.kl > 0


def test_the_write_before_a_norm_is_what_is_replaced(tiny_folder: Any, tiny_tokens: Tokens) -> None:
    model = load_model(tiny_folder("gemma3"), dtype="float32", device="cpu")
    exact = from_attention(model, LAYER, CONTEXT)
    held_out = harvest_pairs(model, tiny_tokens, LAYER, progress=False)
    found = evaluate_lorsa(exact, held_out, model=model, tokens=tiny_tokens, progress=False)
    assert found.losses is not None
    assert abs(found.losses.cross_entropy_delta) < 1e-5
    assert abs(found.losses.cross_entropy_mean_ablated - found.losses.cross_entropy_clean) > 1e-4


def test_its_hooks_put_its_output_in_place(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs
) -> None:
    lorsa = started(tiny_llama, pairs)
    ids = tiny_tokens.ids[:3]
    hooks = lorsa.hooks(tiny_llama)
    x, y = read_and_written(tiny_llama, ids, LAYER)
    read, write = hooks
    hooks[read](x)
    with torch.no_grad():
        torch.testing.assert_close(hooks[write](y), torch.cat([y[:, :1], lorsa(x)[:, 1:]], 1))
    assert isinstance(lorsa, Spliced)
    object.__setattr__(lorsa.config, "metadata", {})
    with pytest.raises(OptionError, match=r"layer of the Lorsa are not known; give layer=\.\.\."):
        lorsa.hooks(tiny_llama)
    assert list(lorsa.hooks(tiny_llama, layer_place(tiny_llama, LAYER))) == [read, write]
    found = [
        evaluate_lorsa(lorsa, data, model=tiny_llama, tokens=tiny_tokens, layer=layer, progress=False)
        for data, layer in ((SequencePairs(pairs.inputs, pairs.outputs), LAYER), (pairs, None))
    ]
    assert found[0] == found[1]


def test_bad_input(tiny_llama: Any, pairs: SequencePairs) -> None:
    lorsa = started(tiny_llama, pairs)
    with pytest.raises(OptionError, match="belong together"):
        evaluate_lorsa(lorsa, pairs, model=tiny_llama)
    with pytest.raises(OptionError, match="of width 20"):
        evaluate_lorsa(lorsa, SequencePairs(pairs.inputs[..., :20], pairs.outputs[..., :20]))
    elsewhere = SequencePairs(pairs.inputs, pairs.outputs, {"hook_name": "blocks.0.hook_attn_out"})
    with pytest.raises(
        OptionError,
        match=r"'blocks\.0\.hook_attn_out', but the Lorsa has hook_name 'blocks\.1\.hook_attn_out'",
    ):
        evaluate_lorsa(lorsa, elsewhere)
    with pytest.raises(DataError, match="do not vary"):
        evaluate_lorsa(lorsa, SequencePairs(pairs.inputs, torch.ones_like(pairs.outputs)))
