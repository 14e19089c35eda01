"""Models of pictures, speech and sequences: every site equals forward hooks on transformers' own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_plain
import torch
from small_plain import D_MODEL, N_HEADS

from asi_lens.base import sites
from asi_lens.base.errors import DataError, OptionError, UnknownNameError, UnsupportedModelError
from asi_lens.inputs import models, verify
from asi_lens.inputs.plain import PlainModel

pytestmark = pytest.mark.model_facing

WHOLE = (
    "vit",
    "vit-labels",
    "dinov2",
    "dinov2-registers",
    "dinov2-swiglu",
    "deit",
    "clip-vision",
    "siglip-vision",
    "bert-model",
    "distilbert",
    "esm",
    "whisper",
    "whisper-model",
)
"""Kinds that have all four sites at every layer."""


def independent(kind: str, folder: Path) -> Any:
    """The model, loaded by transformers alone."""
    import transformers

    return (
        getattr(transformers, small_plain.KINDS[kind][0]).from_pretrained(folder, dtype=torch.float32).eval()
    )


def layer_of(kind: str, model: Any, layer: int, part: str | None) -> Any:
    """One layer of an independent model."""
    base = model.base_model
    if part:
        return base.decoder.layers[layer] if part == "decoder" else base.encoder.layers[layer]
    if kind.startswith("whisper"):
        return base.encoder.layers[layer]
    if kind == "distilbert":
        return base.transformer.layer[layer]
    inside = getattr(base, "vision_model", base)
    inside = getattr(inside, "encoder", inside)
    stack = getattr(inside, "layers", None)
    return (inside.layer if stack is None else stack)[layer]


def seen(model: Any, inputs: dict[str, torch.Tensor], modules: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Input ("name in") and output ("name out") of modules in a pass of an independent model."""
    values: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            values[f"{name} in"] = given.clone()
            values[f"{name} out"] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return values


def ours(model: Any, inputs: Any, layer: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    hooks = {
        models.hook_name(model, site, layer): (lambda x, site=site: values.__setitem__(site, x.clone()))
        for site in names
    }
    models.forward(model, inputs, hooks)
    return values


@pytest.mark.parametrize("kind", WHOLE)
def test_every_site_is_what_transformers_own_modules_give(kind: str, plain: Any, plain_folder: Any) -> None:
    model, own = plain(kind), independent(kind, plain_folder(kind))
    assert isinstance(model, PlainModel)
    inputs = model.sample()
    for layer in range(model.cfg.n_layers):
        block = layer_of(kind, own, layer, None)
        root = own.base_model.encoder if kind.startswith("whisper") else own
        stream = seen(root, inputs, {"block": block})
        got = ours(model, inputs, layer, models.SITES)
        torch.testing.assert_close(got["resid_post"], stream["block out"])
        W_O, b_O = models.output_projection(model, layer), models.output_bias(model, layer)
        assert b_O is not None
        assert W_O.shape == (N_HEADS, D_MODEL // N_HEADS, D_MODEL)
        torch.testing.assert_close(got["z"] @ W_O.flatten(0, 1) + b_O, got["attn_out"], rtol=1e-4, atol=1e-4)
        if kind not in ("bert-model", "distilbert"):
            whole = stream["block in"] + got["attn_out"] + got["mlp_out"]
            torch.testing.assert_close(whole, stream["block out"], rtol=1e-4, atol=1e-4)


def test_layer_scale_is_part_of_what_attention_writes(plain: Any, plain_folder: Any) -> None:
    model, own = plain("dinov2"), independent("dinov2", plain_folder("dinov2"))
    block = own.encoder.layer[1]
    modules = dict(block.named_modules())
    projection = modules.get("attention.o_proj", modules.get("attention.output.dense"))
    inputs = model.sample()
    found = seen(own, inputs, {"o": projection, "scale": block.layer_scale1, "mlp": block.layer_scale2})
    got = ours(model, inputs, 1, ("attn_out", "mlp_out", "z"))
    torch.testing.assert_close(got["z"], found["o in"])
    torch.testing.assert_close(got["attn_out"], found["o out"] * block.layer_scale1.lambda1)
    torch.testing.assert_close(got["attn_out"], found["scale out"])
    torch.testing.assert_close(got["mlp_out"], found["mlp out"])
    folded = models.output_projection(model, 1).flatten(0, 1)
    torch.testing.assert_close(folded, (projection.weight.T * block.layer_scale1.lambda1).detach())
    assert models.attention_write_site(model) == "attn_out"


def test_attention_of_a_post_norm_encoder_is_what_it_adds_before_the_norm(
    plain: Any, plain_folder: Any
) -> None:
    model, own = plain("bert-model"), independent("bert-model", plain_folder("bert-model"))
    block = own.encoder.layer[1]
    inputs = model.sample()
    modules = {"norm1": block.attention.output.LayerNorm, "norm2": block.output.LayerNorm, "block": block}
    found, got = seen(own, inputs, modules), ours(model, inputs, 1, ("attn_out", "mlp_out", "resid_post"))
    torch.testing.assert_close(found["block in"] + got["attn_out"], found["norm1 in"])
    torch.testing.assert_close(found["norm1 out"] + got["mlp_out"], found["norm2 in"])
    torch.testing.assert_close(got["resid_post"], found["norm2 out"])


def test_a_decoder_has_cross_attention(plain: Any, plain_folder: Any) -> None:
    model, own = plain("whisper", "decoder"), independent("whisper", plain_folder("whisper"))
    inputs = model.sample()
    block = layer_of("whisper", own, 2, "decoder")
    modules = {"block": block, "self": block.self_attn, "cross": block.encoder_attn}
    found = seen(own.model, inputs, modules)
    names = (*models.SITES, "cross_attn_out", "cross_z")
    got = ours(model, inputs, 2, names)
    torch.testing.assert_close(got["attn_out"], found["self out"])
    torch.testing.assert_close(got["cross_attn_out"], found["cross out"])
    whole = found["block in"] + got["attn_out"] + got["cross_attn_out"] + got["mlp_out"]
    torch.testing.assert_close(whole, found["block out"], rtol=1e-4, atol=1e-4)
    W_O, b_O = (part(model, 2, "cross_z") for part in (models.output_projection, models.output_bias))
    torch.testing.assert_close(
        got["cross_z"] @ W_O.flatten(0, 1) + b_O, got["cross_attn_out"], atol=1e-4, rtol=1e-4
    )
    assert not torch.equal(W_O, models.output_projection(model, 2))
    assert models.model_info(model).name.endswith("decoder")
    assert models.model_info(model).fingerprint != models.model_info(plain("whisper")).fingerprint
    assert verify.verification(model).causal, "later ids do not change earlier positions"


@pytest.mark.parametrize("site", sites.CROSS)
def test_only_a_decoder_has_cross_attention(site: str, plain: Any, tiny_llama: Any) -> None:
    for model in (plain("vit"), plain("whisper"), tiny_llama):
        with pytest.raises(UnsupportedModelError, match=f"no site '{site}'"):
            models.hook_name(model, site, 0)
        with pytest.raises(UnsupportedModelError):
            models.output_projection(model, 0, "cross_z")


def test_no_such_model_predicts_a_next_token(plain: Any) -> None:
    from asi_lens.collapse.interventions import cross_entropy
    from asi_lens.inputs.corpora import Tokens

    for model in (plain("vit"), plain("whisper", "decoder"), plain("bert-model")):
        assert not models.model_info(model, fingerprint=False).causal
        with pytest.raises(UnsupportedModelError, match="no logits"):
            models.forward(model, model.sample(), {}, logits=True)
    ids = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(UnsupportedModelError, match="next token"):
        cross_entropy(plain("bert-model"), Tokens(ids, "c", "", 8))


def test_token_ids_are_refused_by_a_model_of_pictures(plain: Any) -> None:
    with pytest.raises(OptionError, match="takes pictures"):
        models.forward(plain("vit"), torch.ones(1, 4, dtype=torch.int64), {})
    with pytest.raises(OptionError, match="takes speech"):
        models.forward(plain("whisper"), torch.ones(1, 4, dtype=torch.int64), {})


def test_a_scale_that_is_no_module_is_refused_by_how_much(plain: Any) -> None:
    model = plain("beit")  # its LayerScale is a parameter of the layer: no module gives what is added
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(UnsupportedModelError, match="misses by"):
            models.hook_name(model, site, 0)
    assert models.hook_name(model, "resid_post", 0)


def test_a_model_without_one_stack_of_layers_is_refused(plain_folder: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="stacks of layers"):
        models.load_model(plain_folder("swin"))


def test_parts_are_those_of_encoder_decoder_models(
    plain_folder: Any, tiny_folder: Any, tiny_llama: Any
) -> None:
    with pytest.raises(OptionError, match="part"):
        models.load_model(plain_folder("whisper"), part="middle")
    with pytest.raises(OptionError, match="part"):
        models.load_model(plain_folder("vit"), part="decoder")
    with pytest.raises(OptionError, match="part"):
        models.load_model(tiny_folder("llama"), part="encoder")
    with pytest.raises(OptionError, match="part"):
        models.load_model(tiny_llama, part="encoder")


def test_a_bridged_encoder_stays_a_bridge(plain: Any) -> None:
    assert not isinstance(plain("bert-masked"), PlainModel)


def test_missing_weights_and_hooks_are_named(plain_folder: Any, plain: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in plain_folder("vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights.*layernorm\.weight"):
        models.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError):
        models.load_model(tmp_path)
    with pytest.raises(UnknownNameError):
        models.hook_name(plain("vit"), "attn", 0)


def test_hooks_and_edits_are_seen(plain_folder: Any) -> None:
    model = models.load_model(plain_folder("vit"), dtype="float32", device="cpu")
    before = models.model_info(model).fingerprint
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    assert models.model_info(model).fingerprint != before
    doubled = ours(model, model.sample(), 0, ("resid_post",))["resid_post"]
    handle.remove()
    torch.testing.assert_close(doubled, 2 * ours(model, model.sample(), 0, ("resid_post",))["resid_post"])
    assert models.model_info(model).fingerprint == before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert models.model_info(model).fingerprint != before


def test_verify_shows_the_table_and_dtypes(plain_folder: Any) -> None:
    for dtype in ("bfloat16", "float64"):
        found = verify.verify(models.load_model(plain_folder("dinov2"), dtype=dtype, device="cpu"))
        assert found.holds, str(found)
        assert "z W_O + b_O = attention's output" in str(found)


def test_widths_without_tokens(plain: Any) -> None:
    model = plain("whisper", "decoder")
    assert models.site_width(model, "cross_attn_out", 1) == D_MODEL
    assert models.site_width(model, "cross_z", 1) == D_MODEL
    assert models.site_width(plain("vit"), "blocks.1.attn.hook_z", 1) == D_MODEL


def test_an_unknown_class_is_transformer_lenss_matter(plain_folder: Any, tmp_path: Path) -> None:
    config = json.loads((plain_folder("vit") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises((UnsupportedModelError, DataError)):
        models.load_model(tmp_path)


def test_the_page_says_what_each_model_offers(plain: Any) -> None:
    def load(kind: str, part: str | None) -> Any:
        try:
            return plain(kind, part)
        except UnsupportedModelError as error:
            return error

    page = (Path(__file__).resolve().parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    for row in small_plain.rows(load):
        assert row in page, "to be written anew by tests/small_plain.py"
