"""Forwards: values at every site equal plain Hugging Face hooks; stops, resumes, W_O; and clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from small_models import N_LAYERS, all_sites, recorded

from asi_lens.base.errors import (
    DataError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
)
from asi_lens.inputs import models, twin

pytestmark = pytest.mark.model_facing

POST_NORM = ("gemma2", "gemma3")


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


@contextmanager
def without_twin(model: Any) -> Iterator[None]:
    """The model's own hook points, as for a model that somebody else has hooked."""
    handle = model.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def count_hooks(model: Any) -> int:
    """Hooks and replaced forwards in the model and its plain twin (a bridge has some of its own)."""
    plain = twin.runners(model).plain
    roots = [model, *([plain.root] if plain else [])]
    modules = [module for root in roots for module in root.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)


# ---------------------------------------------------------------------------- values


def test_every_site_equals_plain_hooks(
    architecture: str, tiny_model: Any, plain_model: Any, ids: torch.Tensor
) -> None:
    expected = plain_values(architecture, plain_model, ids)
    found, logits = recorded(tiny_model, ids, all_sites(tiny_model), logits=True)
    assert twin.runners(tiny_model).plain is not None, "the fast path is what this compares"
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
    name = models.hook_name(tiny_model, "mlp_out", 1)  # the first use verifies the model by passes of its own
    fast = twin.runners(tiny_model).plain
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(fast.blocks)
    ]
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


def _loss(model: Any, ids: torch.Tensor) -> float:
    logits = models.forward(model, ids, {}, logits=True)
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_hooks_of_pytorch_after_the_first_use_are_called(tiny_folder: Any, ids: torch.Tensor) -> None:
    model = models.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    clean = _loss(model, ids)
    block = twin.original(model.blocks[1])
    handles = [
        block.register_forward_hook(lambda module, inputs, output: output + 3.0),
        block.self_attn.register_forward_pre_hook(lambda module, inputs: None),
    ]
    with torch.inference_mode():
        logits = model(ids)
    expected = float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert _loss(model, ids) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - clean) > 1e-3
    found, _ = recorded(model, ids, {"x": "blocks.1.hook_resid_post", "y": "blocks.2.hook_resid_pre"})
    torch.testing.assert_close(found["x"], found["y"])
    for handle in handles:
        handle.remove()
    assert _loss(model, ids) == clean


def test_modules_exchanged_after_the_first_use_are_used(tiny_folder: Any, ids: torch.Tensor) -> None:
    model = models.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    clean = _loss(model, ids)

    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    block = twin.original(model.blocks[1])
    before = block.mlp
    block.mlp = Nothing()
    edited = _loss(model, ids)
    block.mlp = before
    ablated = models.forward(model, ids, {"blocks.1.hook_mlp_out": torch.zeros_like}, logits=True)
    expected = torch.nn.functional.cross_entropy(ablated[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert edited == pytest.approx(float(expected), rel=1e-5)
    assert _loss(model, ids) == clean != edited


@pytest.mark.parametrize("edit", ["scaling", "eps", "forward", "activation"])
def test_attributes_changed_after_the_first_use_count(tiny_folder: Any, ids: torch.Tensor, edit: str) -> None:
    model = models.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    clean = _loss(model, ids)
    block = twin.original(model.blocks[1])
    mlp, attention = twin.original(block.mlp), twin.original(block.self_attn)
    if edit == "scaling":
        attention.scaling *= 4
    elif edit == "eps":
        twin.original(block.input_layernorm).variance_epsilon = 10.0
    elif edit == "forward":
        mlp.down_proj.forward = lambda x: torch.zeros(*x.shape[:-1], 24)
    else:
        mlp.act_fn = torch.nn.Identity()
    changed = _loss(model, ids)
    assert abs(changed - clean) > 1e-3
    fresh = models.load_model(model)
    assert _loss(fresh, ids) == changed


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


@pytest.mark.parametrize("name", ["blocks.1.ln1.hook_normalized", "blocks.1.hook_attn_out"])
def test_dropout_is_off_in_a_model_that_is_in_training(name: str, tiny_folder: Any) -> None:
    model = models.load_model(tiny_folder("gpt2"), dtype="float32", device="cpu")
    ids, seen = torch.arange(2, 14)[None], []
    for training in (False, True):
        model.train(training)
        models.forward(model, ids, {name: lambda x: seen.append(x.clone())})
        assert model.training == training
    assert torch.equal(*seen)
