"""Loading: every way to name a model, what it tells of itself, and clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from small_models import all_sites, recorded
from tiny_models import TL4

from asi_lens.base.errors import (
    DataError,
    FetchError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
)
from asi_lens.inputs import models

pytestmark = pytest.mark.model_facing


# ---------------------------------------------------------------------------- loading


def test_model_info(tiny_folder: Any, tiny_llama: Any) -> None:
    info = models.model_info(tiny_llama)
    assert (info.name, info.architecture, info.weights) == ("tiny-llama", "LlamaForCausalLM", "as released")
    assert (info.n_layers, info.d_model, info.n_heads, info.n_kv_heads, info.d_head) == (3, 24, 4, 2, 6)
    assert (info.d_vocab, info.n_ctx, info.dtype) == (tiny_models.D_VOCAB, tiny_models.N_CTX, "float32")
    assert info.causal
    again = models.load_model(str(tiny_folder("llama")), dtype="float32", device="cpu")
    assert models.model_info(again) == info
    half = models.load_model(tiny_folder("llama"), dtype="bfloat16", device="cpu")
    assert models.model_info(half).dtype == "bfloat16"
    assert models.model_info(half).fingerprint != info.fingerprint
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_an_encoder_says_that_it_is_one(tiny_folder: Any) -> None:
    assert not models.model_info(models.load_model(tiny_folder("bert"), dtype="float32")).causal


def test_a_bridge_is_taken_as_it_is(tiny_folder: Any, tiny_llama: Any, ids: torch.Tensor) -> None:
    assert models.load_model(tiny_llama) is tiny_llama
    from transformer_lens.model_bridge import TransformerBridge

    theirs = TransformerBridge.boot_transformers(str(tiny_folder("llama")), device="cpu")
    assert models.load_model(theirs) is theirs
    info = models.model_info(theirs)
    assert info.weights == "as given"
    assert info.fingerprint == models.model_info(tiny_llama).fingerprint
    names = {"z": "blocks.2.attn.hook_z"}
    torch.testing.assert_close(recorded(theirs, ids, names)[0]["z"], recorded(tiny_llama, ids, names)[0]["z"])
    with pytest.raises(OptionError, match="'auto' for a ready model"):
        models.load_model(theirs, dtype="bfloat16")


def test_processed_weights_are_used_and_named(tiny_folder: Any, ids: torch.Tensor) -> None:
    model = models.load_model(tiny_folder("gpt2"), dtype="float32", device="cpu")
    raw, logits = recorded(model, ids, {"x": "blocks.1.hook_attn_out"}, logits=True)
    model.enable_compatibility_mode()
    folded, folded_logits = recorded(model, ids, {"x": "blocks.1.hook_attn_out"}, logits=True)
    assert "processed" in models.model_info(model).weights
    assert not torch.allclose(raw["x"], folded["x"], atol=1e-3)
    assert folded["x"].mean(-1).abs().max() < 1e-5  # centered, which is why we do not do it
    torch.testing.assert_close(folded_logits.log_softmax(-1), logits.log_softmax(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedTransformer")
def test_a_hooked_transformer(ids: torch.Tensor) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=3,
        d_model=24,
        n_ctx=64,
        d_head=6,
        n_heads=4,
        d_vocab=tiny_models.D_VOCAB,
        act_fn="gelu",
        seed=0,
    )
    model = HookedTransformer(config)
    assert models.load_model(model) is model
    info = models.model_info(model)
    assert (info.n_layers, info.n_heads, info.d_head, info.weights) == (3, 4, 6, "as given")
    logits, cache = model.run_with_cache(ids)
    found, ours = recorded(model, ids, all_sites(model), logits=True)
    torch.testing.assert_close(ours, logits)
    for (site, layer), value in found.items():
        torch.testing.assert_close(value, cache[models.hook_name(model, site, layer)].reshape(value.shape))
        assert value.shape[-1] == models.site_width(model, site, layer)
    heads = found["z", 1].unflatten(-1, (4, 6))
    product = torch.einsum("bphd,hdm->bpm", heads, models.output_projection(model, 1))
    torch.testing.assert_close(product + models.output_bias(model, 1), found["attn_out", 1])
    start = models.capture_resume(model, ids, 2)
    torch.testing.assert_close(models.forward(model, ids, {}, logits=True, start=start), logits)
    flipped = models.forward(model, ids, {"blocks.1.attn.hook_z": lambda z: z.flip(0)}, logits=True)
    assert not torch.allclose(flipped, logits, atol=1e-4)
    assert models.forward(model, ids, {}, stop_after_layer=0) is None


# ---------------------------------------------------------------------------- bad input


def test_unknown_models_name_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'smollm2-135m'.*gemma3-270m.*\.gguf"):
        models.load_model("smolm2-135m")
    with pytest.raises(UnknownNameError, match="neither is at that path"):
        models.load_model("/nowhere/model.gguf")


def test_without_a_network_a_hub_name_says_so() -> None:
    with pytest.raises(FetchError, match=r"some-owner/some-model.*use a packaged model"):
        models.load_model("some-owner/some-model")


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        *(("owner/name", "owner/name"), ("gpt2", "openai-community/gpt2")),
        *(("name", None), ("a/b/c", None), ("/a/b", None), ("owner/name.gguf", None), ("../name", None)),
    ],
)
def test_names_of_the_hub(name: str, on_hub: str | None) -> None:
    assert models.hub_name(name) == on_hub


def test_offline_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    with pytest.raises(FetchError, match=r"'some-owner/some-model' is not on this machine.*by its path"):
        models.load_model("some-owner/some-model")


def test_folders_and_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        models.load_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(OptionError, match=r"\.gguf"):
        models.load_model(tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(UnsupportedModelError, match="no-such-type"):
        models.load_model(tmp_path, device="cpu")


def test_damaged_weights(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or cut off"):
        models.load_model(folder, device="cpu")


def test_options_out_of_range(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama")
    with pytest.raises(OptionError, match=r"dtype='bf16' is not allowed.*'bfloat16'"):
        models.load_model(folder, dtype="bf16")
    with pytest.raises(OptionError, match="revision='main' is not allowed"):
        models.load_model(folder, revision="main")
    with pytest.raises(OptionError, match="mps"):
        models.load_model(folder, device="mps")
    with pytest.raises(OptionError, match="device='gpu'"):
        models.load_model(folder, device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="no CUDA device"):
        models.load_model(folder, device="cuda:0")
    from transformers import AutoModelForCausalLM

    with pytest.raises(OptionError, match=r"LlamaForCausalLM.*hf_model="):
        models.load_model(AutoModelForCausalLM.from_pretrained(folder))


def test_auto_dtype_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert models.resolve_dtype("auto", cpu) is torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert models.resolve_dtype("auto", cpu) is torch.bfloat16
    assert models.resolve_dtype("float64", cpu) is torch.float64


def test_the_tokenizer_comes_with_the_model(tiny_llama: Any) -> None:
    tokenizer = models.tokenizer_of(tiny_llama)
    ids = tokenizer("Two words.", add_special_tokens=False).input_ids
    assert len(ids) == 10
    assert tokenizer.decode(ids) == "Two words."
