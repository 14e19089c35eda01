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

        return module.register_forward_pre_hook(before) if where[0] == "z" else module.register_forward_hook(after)

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


def hooks_left(model: Any) -> int:
    """Hooks and replaced forwards anywhere in the model or its plain twin."""
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
        torch.testing.assert_close(value, expected[where], rtol=1e-5, atol=1e-5, msg=lambda m, w=where: f"{w}: {m}")
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
    assert found["pattern"].shape[:2] == (2, 4)
    torch.testing.assert_close(found["pattern"].sum(-1), torch.ones(2, 4 * 20).unflatten(1, (4, 20)).flatten(2) if
                               found["pattern"].ndim == 3 else torch.ones(2, 4, 20))
    fast, _ = recorded(tiny_llama, ids, {"z": "blocks.1.attn.hook_z"})
    torch.testing.assert_close(found["z"], fast["z"], rtol=1e-4, atol=1e-4)
