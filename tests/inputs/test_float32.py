from __future__ import annotations

import copy
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import TL4

from asi_lens.base.errors import UnsupportedModelError
from asi_lens.collapse.interventions import cross_entropy, edited_cross_entropy
from asi_lens.inputs import float32, models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.float32 import fits_float32, in_float32, loss_dtype
from asi_lens.sae.splice import sequence_losses

pytestmark = pytest.mark.model_facing
HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def half(folder: Any, dtype: str = "bfloat16") -> Any:
    return models.load_model(folder, dtype=dtype, device="cpu")


def exact(model: Any) -> Any:
    """The same weights in float32, in a model of their own."""
    twin = copy.deepcopy(model.original_model).float()
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        model.original_model.config._name_or_path, hf_model=twin, tokenizer=model.tokenizer, device="cpu"
    )


def logits(model: Any, tokens: Tokens) -> torch.Tensor:
    found = models.forward(model, tokens.ids[:4], {}, logits=True)
    assert found is not None
    return found


def interrupted(model: Any) -> set[torch.dtype]:
    """The dtypes of weights inside a context that Ctrl-C ends."""
    seen: set[torch.dtype] = set()
    with suppress(KeyboardInterrupt), torch.inference_mode(), in_float32(model):
        seen |= {one.dtype for one in model.parameters()}
        raise KeyboardInterrupt
    return seen


@HALVES
def test_the_numbers_are_those_of_the_model_in_float32(
    architecture: str, tiny_folder: Any, tiny_tokens: Tokens, dtype: str
) -> None:
    if architecture == "bert":
        pytest.skip("it predicts no next token")
    model = half(tiny_folder(architecture), dtype)
    rounded, wanted = logits(model, tiny_tokens), logits(exact(model), tiny_tokens)
    with in_float32(model):
        found = logits(model, tiny_tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rounded.float(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, tiny_tokens), rounded)


def test_hooks_of_a_user_see_float32(tiny_folder: Any, tiny_tokens: Tokens) -> None:
    """With a hook that somebody added the bridge itself runs, whose own parts know a dtype, too."""
    model, seen = half(tiny_folder("llama")), []
    wanted = logits(exact(model), tiny_tokens)
    model.add_hook("blocks.1.hook_attn_out", lambda x, hook: seen.append(x.dtype))
    with in_float32(model):
        found = logits(model, tiny_tokens)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedTransformer")
def test_a_hooked_transformer(tiny_tokens: Tokens) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 24, "n_ctx": 64, "d_head": 6, "n_heads": 4, "act_fn": "gelu"}
    config = HookedTransformerConfig(**sizes, d_vocab=tiny_models.D_VOCAB, seed=0, dtype=torch.bfloat16)
    model = HookedTransformer(config)
    with in_float32(model):
        assert model.cfg.dtype == torch.float32
        found = logits(model, tiny_tokens)
    assert (found.dtype, model.cfg.dtype) == (torch.float32, torch.bfloat16)
    assert logits(model, tiny_tokens).dtype == torch.bfloat16
    torch.testing.assert_close(found, logits(model, tiny_tokens).float(), rtol=0.05, atol=0.05)


def test_the_weights_are_the_same_tensors_afterwards(tiny_folder: Any) -> None:
    model = half(tiny_folder("llama"))
    before = {name: (one.data_ptr(), one.dtype) for name, one in model.named_parameters()}
    print_before = models.model_info(model).fingerprint
    seen = interrupted(model)
    assert seen == {torch.float32}
    assert {name: (one.data_ptr(), one.dtype) for name, one in model.named_parameters()} == before
    assert models.model_info(model).fingerprint == print_before
    weight = next(iter(model.original_model.parameters()))
    weight.float().square().sum().backward()  # no tensor of inference mode is left behind
    assert weight.grad is not None


def test_models_of_full_precision_are_left_alone(tiny_llama: Any) -> None:
    before = [one.data_ptr() for one in tiny_llama.parameters()]
    with in_float32(tiny_llama):
        assert [one.data_ptr() for one in tiny_llama.parameters()] == before


def test_products_are_exact_inside(tiny_llama: Any) -> None:
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        chosen = matmul.fp32_precision
        with in_float32(tiny_llama):
            assert matmul.fp32_precision == "ieee" != chosen
        assert matmul.fp32_precision == chosen
    finally:
        torch.set_float32_matmul_precision("highest")


@HALVES
def test_an_edit_costs_what_it_is_worth(tiny_folder: Any, tiny_tokens: Tokens, dtype: str) -> None:
    """KL grows with the square of a small edit: in half precision it is the rounding's, whatever the edit."""
    model = half(tiny_folder("llama"), dtype)
    name = models.hook_name(model, "attn_out", 1)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0))

    def add(size: float) -> Any:
        return {name: lambda x: torch.cat([x[:, :1], x[:, 1:] + (size * direction).to(x)], 1)}

    found = sequence_losses(model, tiny_tokens, [add(1e-2), add(2e-2)], 1, progress=False)
    small, large = found.kl.mean(1).tolist()
    assert large / small == pytest.approx(4, rel=0.1)
    same = sequence_losses(exact(model), tiny_tokens, [add(1e-2)], 1, progress=False)
    torch.testing.assert_close(found.kl[0], same.kl[0], rtol=1e-3, atol=1e-9)


def test_losses_of_edits_are_of_float32(tiny_folder: Any, tiny_tokens: Tokens) -> None:
    model = half(tiny_folder("llama"))
    wanted = exact(model)
    assert cross_entropy(model, tiny_tokens, progress=False) == pytest.approx(
        cross_entropy(wanted, tiny_tokens, progress=False), rel=1e-6
    )
    edits = {"double": lambda x: 2 * x}
    found, same = (
        edited_cross_entropy(one, tiny_tokens, "attn_out", 1, edits, progress=False)
        for one in (model, wanted)
    )
    assert found["double"] == pytest.approx(same["double"], rel=1e-6)


def test_the_dtype_of_losses() -> None:
    assert [loss_dtype(name) for name in ("bfloat16", "float16", "float32", "float64")] == [
        "float32",
        "float32",
        "float32",
        "float64",
    ]


# ---------------------------------------------------------------------------- bad input


def test_quantised_weights_are_refused(tiny_folder: Any) -> None:
    model = half(tiny_folder("llama"))
    linear = model.original_model.model.layers[0].mlp.down_proj
    linear.register_buffer("packed", torch.zeros(4, 4, dtype=torch.uint8))
    model.original_model.config.quantization_config = {"quant_method": "bitsandbytes"}
    told = r"quantised \(torch.uint8\).*dequantize"
    with pytest.raises(UnsupportedModelError, match=told), in_float32(model):
        pass


def test_offloaded_weights_are_refused(tiny_folder: Any) -> None:
    model = half(tiny_folder("llama"))
    model.original_model.lm_head.register_buffer("away", torch.zeros(4, 4, device="meta"))
    with pytest.raises(UnsupportedModelError, match="offloaded"), in_float32(model):
        pass


def test_too_little_memory_is_refused(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half(tiny_folder("llama"))
    monkeypatch.setattr(float32, "free_bytes", lambda device: 1000)
    told = r"another 0\.00 GiB of cpu; 0\.00 are free"
    with pytest.raises(UnsupportedModelError, match=told), in_float32(model):
        pass
    monkeypatch.setattr(float32, "free_bytes", lambda device: 10**9)
    with in_float32(model):
        pass
    monkeypatch.setattr(float32, "free_bytes", lambda device: None)
    monkeypatch.setattr(float32, "host_bytes", lambda: 1000)
    with pytest.raises(UnsupportedModelError, match=told), in_float32(model):
        pass
    assert not fits_float32(model)
    monkeypatch.setattr(float32, "host_bytes", lambda: None)  # not known
    with in_float32(model):
        pass
    assert fits_float32(model)


def test_a_module_without_a_configuration() -> None:
    model = torch.nn.Linear(3, 3).bfloat16()
    with in_float32(model):
        assert model.weight.dtype == torch.float32
    assert model.weight.dtype == torch.bfloat16
    model.cfg = SimpleNamespace(dtype=None)
    with in_float32(model):
        assert model.cfg.dtype is None
