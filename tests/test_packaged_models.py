"""The packaged models: values as in plain transformers, and text that they find as likely as they should."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from asi_lens.inputs import models
from asi_lens.inputs.corpora import load_tokens

pytestmark = pytest.mark.packaged

# Nats per token on the first 2,048 tokens of news-en in rows of 256, layers, d_model. A norm weight off by
# one, halves of rotary dimensions in the wrong order, or another tokenizer all cost far more than the
# tolerance.
EXPECTED = {"smollm2-135m": (3.52, 30, 576), "gemma3-270m": (3.14, 18, 640)}
TOLERANCE = 0.05


@pytest.fixture(scope="module", params=["smollm2-135m", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield models.load_model(request.param, dtype="float32", device="cpu")
    gc.collect()


def test_what_it_is(model: Any) -> None:
    info = models.model_info(model)
    assert info.weights == "4-bit weights, dequantised"
    assert (info.n_layers, info.d_model) == EXPECTED[info.name][1:]
    assert info.normalizes_attn_out == (info.name == "gemma3-270m")


def test_cross_entropy(model: Any) -> None:
    name = models.model_info(model).name
    losses = []
    for ids in load_tokens("news-en", model, n_tokens=2048, context=256).batches(2):
        logits = models.forward(model, ids, {}, logits=True)[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none"))
    assert float(torch.cat(losses).mean()) == pytest.approx(EXPECTED[name][0], abs=TOLERANCE)


def test_values_equal_plain_hooks(model: Any) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(
        model.original_model.config._name_or_path, dtype=torch.float32
    ).eval()
    info = models.model_info(model)
    tokenizer = models.tokenizer_of(model)
    text = "Ministers agreed on Tuesday to spend 1,200 million euros more on the railways."
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    expected: dict[tuple[str, int], torch.Tensor] = {}

    def keep(where: tuple[str, int]) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if where[0] == "z":
                expected[where] = inputs[0]
            else:
                expected[where] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer, block in enumerate(plain.model.layers):
        attention, mlp = block.self_attn, block.mlp
        if info.normalizes_attn_out:
            attention, mlp = block.post_attention_layernorm, block.post_feedforward_layernorm
        places = {"attn_out": attention, "mlp_out": mlp, "resid_post": block, "z": block.self_attn.o_proj}
        for site, module in places.items():
            module.register_forward_hook(keep((site, layer)))
    with torch.inference_mode():
        expected_logits = plain(ids).logits
    found: dict[tuple[str, int], torch.Tensor] = {}
    hooks = {
        models.hook_name(model, *where): (lambda x, where=where: found.__setitem__(where, x))
        for where in expected
    }
    logits = models.forward(model, ids, hooks, logits=True)
    assert len(found) == 4 * info.n_layers
    for where, value in found.items():
        torch.testing.assert_close(
            value, expected[where], rtol=1e-5, atol=1e-5 * float(expected[where].abs().max())
        )
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_attention_is_copied_exactly(model: Any) -> None:
    from asi_lens.lorsa.data import harvest_pairs
    from asi_lens.lorsa.evaluate import evaluate_lorsa
    from asi_lens.lorsa.initialize import from_attention

    tokens = load_tokens("news-en", model, n_tokens=512, context=256)
    pairs = harvest_pairs(model, tokens, 15, progress=False)
    found = evaluate_lorsa(from_attention(model, 15, 256), pairs, model=model, tokens=tokens, progress=False)
    assert found.fvu < 1e-8
    assert found.losses is not None
    assert found.losses.cross_entropy_delta == pytest.approx(0, abs=1e-4)
