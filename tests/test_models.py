"""Models: values at every site equal plain Hugging Face hooks; stops, resumes, W_O; and clear errors."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from asi_lens import models, plain
from asi_lens.errors import (
    DataError,
    FetchError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
)

pytestmark = pytest.mark.model_facing

N_LAYERS = 3
TL4 = not importlib.metadata.version("transformer-lens").startswith("3.")
POST_NORM = ("gemma2", "gemma3")


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, tiny_models.D_VOCAB, (2, 20), generator=generator)


@pytest.fixture
def plain_model(architecture: str, tiny_folder: Any) -> Any:
    """An independent copy, loaded by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(tiny_folder(architecture), dtype=torch.float32).eval()


def modules_of(architecture: str, model: Any, layer: int) -> dict[str, Any]:
    """Site -> the Hugging Face module whose output it is (for z: whose input)."""
    if architecture == "gpt2":
        block = model.transformer.h[layer]
        return {"attn_out": block.attn, "mlp_out": block.mlp, "resid_post": block, "z": block.attn.c_proj}
    if architecture == "neox":
        block = model.gpt_neox.layers[layer]
        return {
            "attn_out": block.attention,
            "mlp_out": block.mlp,
            "resid_post": block,
            "z": block.attention.dense,
        }
    if architecture == "bert":
        block = model.bert.encoder.layer[layer]
        projection = block.attention.output.dense
        return {"attn_out": projection, "mlp_out": block.output.dense, "resid_post": block, "z": projection}
    block = model.model.layers[layer]
    attention, mlp = block.self_attn, block.mlp
    if architecture in POST_NORM:
        attention, mlp = block.post_attention_layernorm, block.post_feedforward_layernorm
    return {"attn_out": attention, "mlp_out": mlp, "resid_post": block, "z": block.self_attn.o_proj}


def plain_values(architecture: str, model: Any, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """Every site of every layer by forward hooks on a plain Hugging Face model, and ("logits", -1)."""
    values: dict[tuple[str, int], torch.Tensor] = {}

    def record(module: Any, where: tuple[str, int]) -> Any:
        def before(module: Any, inputs: Any) -> None:
            values[where] = inputs[0]

        def after(module: Any, inputs: Any, output: Any) -> None:
            values[where] = output[0] if isinstance(output, tuple) else output

        return (
            module.register_forward_pre_hook(before)
            if where[0] == "z"
            else module.register_forward_hook(after)
        )

    handles = [
        record(module, (site, layer))
        for layer in range(N_LAYERS)
        for site, module in modules_of(architecture, model, layer).items()
    ]
    with torch.inference_mode():
        values["logits", -1] = model(ids).logits
    for handle in handles:
        handle.remove()
    return values


def recorded(
    model: Any, ids: torch.Tensor, names: dict[Any, str], **options: Any
) -> tuple[dict[Any, torch.Tensor], torch.Tensor | None]:
    """Activations by key of `names` (key -> hook name), and what `forward` returned."""
    values: dict[Any, torch.Tensor] = {}
    hooks = {name: (lambda x, key=key: values.__setitem__(key, x)) for key, name in names.items()}
    return values, models.forward(model, ids, hooks, **options)


def all_sites(model: Any) -> dict[tuple[str, int], str]:
    return {(s, layer): models.hook_name(model, s, layer) for s in models.SITES for layer in range(N_LAYERS)}


@contextmanager
def without_twin(model: Any) -> Iterator[None]:
    """The model's own hook points, as for a model that somebody else has hooked."""
    own, twin = plain.runners(model)
    plain._RUNNERS[model] = (own, None)
    try:
        yield
    finally:
        plain._RUNNERS[model] = (own, twin)


def count_hooks(model: Any) -> int:
    """Hooks and replaced forwards in the model and its plain twin (a bridge has some of its own)."""
    _, twin = plain.runners(model)
    roots = [model, *([twin.root] if twin else [])]
    modules = [module for root in roots for module in root.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)


# ---------------------------------------------------------------------------- values


def test_every_site_equals_plain_hooks(
    architecture: str, tiny_model: Any, plain_model: Any, ids: torch.Tensor
) -> None:
    expected = plain_values(architecture, plain_model, ids)
    found, logits = recorded(tiny_model, ids, all_sites(tiny_model), logits=True)
    assert plain.runners(tiny_model)[1] is not None, "the fast path is what this compares"
    for where, value in found.items():
        assert value.shape == (2, 20, models.site_width(tiny_model, *where))
        torch.testing.assert_close(
            value, expected[where], rtol=1e-5, atol=1e-5, msg=lambda m, w=where: f"{w}: {m}"
        )
    torch.testing.assert_close(logits, expected["logits", -1], rtol=1e-5, atol=1e-5)


def test_the_bridges_own_hooks_see_the_same(tiny_model: Any, ids: torch.Tensor) -> None:
    names = all_sites(tiny_model)
    found, logits = recorded(tiny_model, ids, names, logits=True)
    with without_twin(tiny_model):
        own, own_logits = recorded(tiny_model, ids, names, logits=True)
    for where in names:
        # the bridge computes attention step by step, in another order than the fused kernel
        torch.testing.assert_close(own[where], found[where], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own_logits, logits, rtol=1e-4, atol=1e-4)


def test_hook_names(tiny_llama: Any) -> None:
    assert models.hook_name(tiny_llama, "attn_out", 1) == "blocks.1.hook_attn_out"
    assert models.hook_name(tiny_llama, "z", 2) == "blocks.2.attn.hook_z"
    assert models.hook_name(tiny_llama, "blocks.0.ln2.hook_out", 0) == "blocks.0.ln2.hook_out"


def test_any_hook_of_the_bridge_can_be_taken(tiny_llama: Any, ids: torch.Tensor) -> None:
    pattern = "blocks.1.attn.hook_pattern"  # inside the attention: no module's input or output
    found, _ = recorded(tiny_llama, ids, {"pattern": pattern, "z": "blocks.1.attn.hook_z"})
    torch.testing.assert_close(found["pattern"].sum(-1), torch.ones(2, 4, 20))
    fast, _ = recorded(tiny_llama, ids, {"z": "blocks.1.attn.hook_z"})
    torch.testing.assert_close(found["z"], fast["z"], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- replacing, stopping, resuming


def test_a_returned_tensor_goes_on(
    architecture: str, tiny_model: Any, plain_model: Any, ids: torch.Tensor
) -> None:
    for site in models.SITES:
        name = models.hook_name(tiny_model, site, 1)
        found = models.forward(tiny_model, ids, {name: lambda x: x * 0.5}, logits=True)
        module = modules_of(architecture, plain_model, 1)[site]

        def after(module: Any, inputs: Any, output: Any) -> Any:
            return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

        def before(module: Any, inputs: Any) -> Any:
            return (inputs[0] * 0.5, *inputs[1:])

        hook = (
            module.register_forward_pre_hook(before) if site == "z" else module.register_forward_hook(after)
        )
        with torch.inference_mode():
            expected = plain_model(ids).logits
        hook.remove()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda m, s=site: f"{s}: {m}")


def test_nothing_after_the_stop_is_computed(tiny_model: Any, ids: torch.Tensor) -> None:
    _, twin = plain.runners(tiny_model)
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(twin.blocks)
    ]
    name = models.hook_name(tiny_model, "mlp_out", 1)
    found, output = recorded(tiny_model, ids, {"x": name}, stop_after_layer=1)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert output is None
    assert found["x"].shape == (2, 20, 24)
    with pytest.raises(UnsupportedModelError, match="did not reach"):
        models.forward(tiny_model, ids, {name: lambda x: None}, stop_after_layer=0)


def test_no_unembedding_without_logits(tiny_llama: Any, ids: torch.Tensor) -> None:
    found, output = recorded(tiny_llama, ids, {"norm": "ln_final.hook_out"})
    assert output is None
    assert found["norm"].shape == (2, 20, 24)
    with pytest.raises(UnsupportedModelError, match=r"unembed\.hook_out"):
        models.forward(tiny_llama, ids, {"unembed.hook_out": lambda x: None})


@pytest.mark.parametrize("layer", range(N_LAYERS + 1))
def test_resuming_equals_the_whole_forward(tiny_model: Any, ids: torch.Tensor, layer: int) -> None:
    whole = models.forward(tiny_model, ids, {}, logits=True)
    hooks_before = count_hooks(tiny_model)
    start = models.capture_resume(tiny_model, ids, layer)
    torch.testing.assert_close(models.forward(tiny_model, ids, {}, logits=True, start=start), whole)
    if layer == N_LAYERS:
        return
    hooks = {models.hook_name(tiny_model, "attn_out", layer): lambda x: x.flip(0)}
    edited = models.forward(tiny_model, ids, hooks, logits=True)
    assert not torch.allclose(edited, whole, atol=1e-3)
    for _ in range(2):  # a start can be used again
        found = models.forward(tiny_model, ids, hooks, logits=True, start=start)
        torch.testing.assert_close(found, edited, rtol=1e-5, atol=1e-5)
    assert count_hooks(tiny_model) == hooks_before


def test_a_start_is_only_good_for_its_own_run(tiny_llama: Any, ids: torch.Tensor) -> None:
    start = models.capture_resume(tiny_llama, ids, 2)
    with pytest.raises(OptionError, match="other token ids"):
        models.forward(tiny_llama, ids.flip(1), {}, logits=True, start=start)
    with pytest.raises(UnsupportedModelError, match="start=2"):
        models.forward(tiny_llama, ids, {"blocks.1.hook_attn_out": lambda x: None}, start=start)
    with pytest.raises(OptionError, match="between 0 and 3"):
        models.capture_resume(tiny_llama, ids, 4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_come_off_whatever_happens(
    tiny_llama: Any, ids: torch.Tensor, error: type[BaseException]
) -> None:
    def fail(x: torch.Tensor) -> None:
        raise error("now")

    before, _ = recorded(tiny_llama, ids, all_sites(tiny_llama))
    hooks_before = count_hooks(tiny_llama)
    start = models.capture_resume(tiny_llama, ids, 1)
    with pytest.raises(error):
        models.forward(tiny_llama, ids, {"blocks.1.hook_mlp_out": fail}, logits=True, start=start)
    assert count_hooks(tiny_llama) == hooks_before
    after, _ = recorded(tiny_llama, ids, all_sites(tiny_llama))
    assert all(torch.equal(before[where], after[where]) for where in before)


def test_hooks_that_the_user_added_stay_in_force(tiny_folder: Any, ids: torch.Tensor) -> None:
    model = models.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    clean = models.forward(model, ids, {}, logits=True)
    model.add_hook("blocks.0.hook_attn_out", lambda x, hook: x * 0)
    hooked = models.forward(model, ids, {}, logits=True)
    model.reset_hooks()
    edited = models.forward(model, ids, {"blocks.0.hook_attn_out": lambda x: x * 0}, logits=True)
    torch.testing.assert_close(hooked, edited, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hooked, clean, atol=1e-2)


def test_the_model_follows_its_weights(tiny_folder: Any, ids: torch.Tensor) -> None:
    model = models.load_model(tiny_folder("gpt2"), dtype="float32", device="cpu")
    before = models.model_info(model).fingerprint
    clean, _ = recorded(model, ids, {"x": "blocks.0.hook_attn_out"})
    with torch.no_grad():
        model.blocks[0].attn.o.weight.mul_(2)
        model.blocks[0].attn.o.bias.mul_(2)
    edited, _ = recorded(model, ids, {"x": "blocks.0.hook_attn_out"})
    torch.testing.assert_close(edited["x"], clean["x"] * 2)
    assert models.model_info(model).fingerprint != before


# ---------------------------------------------------------------------------- W_O


def test_z_times_w_o_is_what_attention_puts_out(
    architecture: str, tiny_model: Any, ids: torch.Tensor
) -> None:
    info = models.model_info(tiny_model)
    assert info.normalizes_attn_out == (architecture in POST_NORM)
    for layer in range(N_LAYERS):
        names = {
            "z": models.hook_name(tiny_model, "z", layer),
            "attn_out": models.hook_name(tiny_model, "attn_out", layer),
        }
        before_norm = f"blocks.{layer}.attn.{'o.' if architecture == 'bert' else ''}hook_out"
        found, _ = recorded(tiny_model, ids, names)
        found |= recorded(tiny_model, ids, {"before_norm": before_norm})[0]
        weight, bias = models.output_projection(tiny_model, layer), models.output_bias(tiny_model, layer)
        assert weight.shape == (info.n_heads, info.d_head, info.d_model)
        heads = found["z"].unflatten(-1, (info.n_heads, info.d_head))
        product = torch.einsum("bphd,hdm->bpm", heads, weight)
        assert (bias is not None) == (architecture in ("gpt2", "neox", "bert"))
        product = product if bias is None else product + bias
        torch.testing.assert_close(product, found["before_norm"], rtol=1e-5, atol=1e-5)
        same = torch.allclose(product, found["attn_out"], rtol=1e-5, atol=1e-5)
        assert same == (architecture not in POST_NORM)


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


def test_unknown_sites_layers_and_hooks(tiny_llama: Any, ids: torch.Tensor) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown site 'atn_out'; did you mean 'attn_out'.*resid_post"
    ):
        models.hook_name(tiny_llama, "atn_out", 0)
    with pytest.raises(UnknownNameError, match=r"blocks\.1\.attn\.hook_pattern"):
        models.hook_name(tiny_llama, "blocks.1.attn.hook_patern", 0)
    for layer in (-1, 3):
        with pytest.raises(OptionError, match="between 0 and 2"):
            models.hook_name(tiny_llama, "attn_out", layer)
        with pytest.raises(OptionError, match="between 0 and 2"):
            models.output_projection(tiny_llama, layer)
        with pytest.raises(OptionError, match="between 0 and 2"):
            models.forward(tiny_llama, ids, {}, stop_after_layer=layer)
    with pytest.raises(UnknownNameError, match=r"unknown hook 'blocks\.7"):
        models.forward(tiny_llama, ids, {"blocks.7.hook_attn_out": lambda x: None})


def test_an_architecture_without_attention_says_what_it_lacks(tmp_path: Path, ids: torch.Tensor) -> None:
    model = models.load_model(
        tiny_models.build("mamba", tmp_path / "tiny-mamba"), dtype="float32", device="cpu"
    )
    for site in ("attn_out", "mlp_out", "z"):
        with pytest.raises(UnsupportedModelError, match=f"MambaForCausalLM has no site '{site}'"):
            models.hook_name(model, site, 0)
    with pytest.raises(UnsupportedModelError, match="no output projection"):
        models.output_projection(model, 0)
    found, _ = recorded(model, ids, {"x": models.hook_name(model, "resid_post", 1)})
    assert found["x"].shape == (2, 20, 24)


def test_tokens_that_the_model_cannot_take(tiny_llama: Any) -> None:
    with pytest.raises(OptionError, match="context is 128 tokens"):
        models.forward(tiny_llama, torch.ones(1, 129, dtype=torch.long), {})
    with pytest.raises(DataError, match=f"0 to {tiny_models.D_VOCAB - 1}"):
        models.forward(tiny_llama, torch.full((1, 3), tiny_models.D_VOCAB), {})
    with pytest.raises(DataError, match="no tokens"):
        models.forward(tiny_llama, torch.ones(0, 3, dtype=torch.long), {})
    with pytest.raises(OptionError, match=r"returned \(1, 3, 23\) for \(1, 3, 24\)"):
        models.forward(
            tiny_llama, torch.ones(1, 3, dtype=torch.long), {"blocks.0.hook_attn_out": lambda x: x[..., 1:]}
        )


def test_the_tokenizer_comes_with_the_model(tiny_llama: Any) -> None:
    tokenizer = models.tokenizer_of(tiny_llama)
    ids = tokenizer("Two words.", add_special_tokens=False).input_ids
    assert len(ids) == 10
    assert tokenizer.decode(ids) == "Two words."
