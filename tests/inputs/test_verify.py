"""Every architecture: each site is right to rounding, or refused; so is the bridge's own computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch

from asi_lens.base.errors import UnsupportedModelError
from asi_lens.inputs import models, twin, verify
from asi_lens.inputs.plain import PlainModel

pytestmark = pytest.mark.model_facing

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
POST_NORM = ("bert", "bert-causal", "roberta", "opt-post-norm", "gpt1")
"""A norm after each addition, so that the stream is the norm's output."""


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("architectures")

    def folder(name: str) -> Path:
        found = root / name
        return found if found.exists() else architectures.build(name, found)

    return folder


def load(folder: Path, dtype: str = "float32") -> Any:
    return models.load_model(folder, dtype=dtype, device="cpu")


def test_a_model_first_used_in_inference_mode(
    folder_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    model = load(folder_of("llama"))
    with torch.inference_mode():
        inside = verify.verification(model)
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "other"))
    outside = verify.verification(load(folder_of("llama")))
    assert (inside.failure, inside.causal, inside.sites) == ("", True, outside.sites)


def values_at(model: Any, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    hooks = {name: (lambda x, name=name: values.__setitem__(name, x)) for name in names}
    models.forward(model, ids, hooks)
    return values


def plain_values(model: Any, plain: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of an independent model, and the input and output of its blocks and of the norms in them."""
    root = twin.runners(model).plain.root
    path_of = {id(module): path for path, module in root.named_modules()}
    blocks = [path_of[id(block)] for block in twin.runners(model).plain.blocks]
    values: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            values[f"{path} in"] = None if given is None else given.clone()
            values[f"{path} out"] = (output[0] if isinstance(output, tuple | list) else output).clone()

        return hook

    for path, module in plain.named_modules():
        if path in blocks or (type(module).__name__ == "LayerNorm" and path.startswith(tuple(blocks))):
            module.register_forward_hook(keep(path), with_kwargs=True)
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
    return logits, {
        **{
            f"{layer} {side}": values[f"{path} {side}"]
            for layer, path in enumerate(blocks)
            for side in ("in", "out")
        },
        **values,
    }


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_each_site_is_right_or_refused(name: str, folder_of: Any) -> None:
    model = architectures.load(folder_of(name))
    cell = architectures.table(PAGE)[name].get(architectures.column())
    if cell is not None:
        assert cell == architectures.summary(model), "to be written anew by tests/architectures.py"
    if isinstance(model, UnsupportedModelError | PlainModel):  # test_plain compares a PlainModel's sites
        return
    found = verify.verification(model)
    ids = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    if found.failure:
        with pytest.raises(UnsupportedModelError):
            models.forward(model, ids, {}, logits=True)
        with pytest.raises(UnsupportedModelError):
            models.hook_name(model, "resid_post", 0)
        return
    plain = type(model.original_model).from_pretrained(folder_of(name), dtype=torch.float32).eval()
    logits, stream = plain_values(model, plain, ids)
    torch.testing.assert_close(models.forward(model, ids, {}, logits=True), logits, rtol=1e-5, atol=1e-5)
    start = models.capture_resume(model, ids, 1)
    torch.testing.assert_close(models.forward(model, ids, {}, logits=True, start=start), logits)
    for layer in range(architectures.N_LAYERS):
        _check_layer(name, model, found, ids, layer, stream)
    assert found.causal == (name not in ("bert", "roberta"))
    _check_own(model, ids, logits)


def _check_layer(
    name: str, model: Any, found: Any, ids: torch.Tensor, layer: int, stream: dict[str, torch.Tensor]
) -> None:
    hooks = {}
    for site in models.SITES:
        if (site, layer) in found.refused:
            with pytest.raises(UnsupportedModelError, match="has no site"):
                models.hook_name(model, site, layer)
        else:
            hooks[site] = models.hook_name(model, site, layer)
    values = values_at(model, ids, list(hooks.values()))
    got = {site: values[hook] for site, hook in hooks.items()}
    pre, post = stream[f"{layer} in"], stream[f"{layer} out"]
    torch.testing.assert_close(got["resid_post"], post, rtol=1e-5, atol=1e-5)
    if "attn_out" in got and "mlp_out" in got and name not in POST_NORM:
        whole = pre + got["attn_out"] + got["mlp_out"]
        torch.testing.assert_close(whole, post, rtol=1e-5, atol=1e-5 * float(post.abs().max()))
    elif "attn_out" in got and "mlp_out" in got:
        sums = [value for key, value in stream.items() if key.endswith(" in") and value is not None]
        middle = min(sums, key=lambda value: float((value.view_as(pre) - pre - got["attn_out"]).norm()))
        assert float((middle.view_as(pre) - pre - got["attn_out"]).norm()) < 1e-4
    if "z" in got:
        weight, bias = models.output_projection(model, layer), models.output_bias(model, layer)
        product = got["z"] @ weight.flatten(0, 1) + (0 if bias is None else bias)
        write = models.attention_write_site(model)
        written = found.writes[layer] if "{}" not in write else write.format(layer)
        torch.testing.assert_close(product, values_at(model, ids, [written])[written], rtol=1e-4, atol=1e-4)
    elif ("z", layer) in found.refused and "attn_out" not in got:
        with pytest.raises(UnsupportedModelError):
            models.output_projection(model, layer)


def _check_own(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> None:
    handle = model.register_forward_hook(lambda *_: None)
    try:
        if verify.own_error(model):
            with pytest.raises(UnsupportedModelError, match="own computation"):
                models.forward(model, ids, {}, logits=True)
        else:
            own = models.forward(model, ids, {}, logits=True)
            assert float((own - logits).norm() / logits.norm()) < 1e-4
    finally:
        handle.remove()


# ---------------------------------------------------------------------------- the bridge's own computation


@pytest.mark.parametrize("name", ["stablelm-parallel", "stablelm"])
def test_a_wrong_bridge_is_refused_and_modules_hooks_are_not(name: str, folder_of: Any) -> None:
    model = load(folder_of(name))
    ids = torch.arange(5, 25)[None]
    values = values_at(model, ids, [models.hook_name(model, "attn_out", 1)])
    assert len(values) == 1
    only_own = next(hook for hook in twin.runners(model).own.places if hook.endswith("hook_pattern"))
    with pytest.raises(UnsupportedModelError, match=r"own computation of StableLmForCausalLM.*differs by \d"):
        values_at(model, ids, [only_own])


def test_hooks_that_only_the_bridge_has_are_computed_where_it_is_right(tiny_llama: Any) -> None:
    ids = torch.arange(5, 25)[None]
    own = [hook for hook in twin.runners(tiny_llama).own.places if hook.endswith("hook_normalized")]
    name = own[0] if own else "blocks.0.attn.hook_pattern"
    assert name in values_at(tiny_llama, ids, [name])


# ---------------------------------------------------------------------------- what is added to the stream


@pytest.mark.parametrize(
    ("name", "normalizes", "scaled"),
    [("olmo2", True, False), ("olmo3", True, False), ("gemma2", True, False), ("granite", False, True)],
)
def test_a_norm_or_multiplier_after_attention(
    name: str, normalizes: bool, scaled: bool, folder_of: Any
) -> None:
    model = load(folder_of(name))
    assert models.model_info(model, fingerprint=False).normalizes_attn_out == normalizes
    assert models.hook_name(model, "attn_out", 1).endswith("_scaled") == scaled
    assert models.attention_write_site(model) == "blocks.{}.attn.hook_out"
    written = models.attention_write_site(model)
    ids = torch.arange(5, 25)[None]
    values = values_at(model, ids, [models.hook_name(model, site, 1) for site in ("attn_out", written)])
    added, before = values.values()
    assert not torch.allclose(added, before, atol=1e-3)
    if scaled:
        torch.testing.assert_close(added, before * 0.22)


def test_replacing_a_scaled_site_replaces_what_is_added(folder_of: Any) -> None:
    model = load(folder_of("granite"))
    ids = torch.arange(5, 25)[None]
    attn, mlp = (models.hook_name(model, site, 1) for site in ("attn_out", "mlp_out"))
    post: dict[str, torch.Tensor] = {}
    keep = {"blocks.1.hook_resid_post": lambda x: post.__setitem__("x", x)}
    models.forward(model, ids, {attn: torch.ones_like, mlp: torch.zeros_like, **keep})
    pre = values_at(model, ids, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    torch.testing.assert_close(post["x"], pre + 1.0)


def test_a_tensor_that_the_model_changes_later_is_copied(folder_of: Any) -> None:
    model = load(folder_of("falcon"))  # `mlp_output += attention_output`
    ids = torch.arange(5, 25)[None]
    name = models.hook_name(model, "mlp_out", 1)
    at_once: dict[str, torch.Tensor] = {}
    kept = values_at(model, ids, [name])[name]
    models.forward(model, ids, {name: lambda x: at_once.__setitem__("x", x.clone())})
    torch.testing.assert_close(kept, at_once["x"])


def test_the_table_in_words(folder_of: Any) -> None:
    found = verify.verify(load(folder_of("falcon-alibi")))
    assert not found.holds
    assert "two ways to compute attention differ" in str(found)
    whole = verify.verify(load(folder_of("llama"), "bfloat16"))
    assert whole.holds
    assert "z W_O + b_O = attention's output" in str(whole)
    assert {row["layer"] for row in whole.records()} == {None, 0, 1, 2}


@pytest.mark.parametrize("name", ["falcon", "bert", "falcon-alibi", "stablelm"])
def test_a_second_load_reads_what_the_first_has_found(
    name: str, folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    first, second = load(folder_of(name)), load(folder_of(name))
    found = verify.verification(first)
    monkeypatch.setattr(verify, "_verified", None)
    assert verify.verification(second) == found
    changing = [
        [name for name, place in twin.runners(model).plain.places.items() if place.changes]
        for model in (first, second)
    ]
    assert changing[0] == changing[1]
    assert bool(changing[0]) == (name == "falcon")
    twin.original(second.blocks[1].mlp).another = 1
    with pytest.raises(TypeError):  # another model: verified anew
        verify.verification(second)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_no_property_of_a_model(
    error: type[Exception], folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    model = load(folder_of("llama"))

    def full(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as busy:
        busy.setattr(verify, "record", full)
        with pytest.raises(error):
            verify.verification(model)
    assert verify.verification(model).failure == ""
    with monkeypatch.context() as busy:
        busy.setattr(verify.agreement, "compared", full)
        with pytest.raises(error):
            verify.own_error(model)
    assert verify.own_error(model) == ""


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "file"))
    assert verify.verification(load(folder_of("llama"))).holds


def test_a_wrong_w_o_is_named(folder_of: Any) -> None:
    model = load(folder_of("llama"))
    projection = twin.original(model.blocks[1].attn.o)
    torch.nn.utils.parametrize.register_parametrization(projection, "weight", _Halved(), unsafe=True)
    assert torch.allclose(models.output_projection(model, 1).flatten(0, 1).T, projection.weight)
    del model
    model = load(folder_of("llama"))
    projection = twin.original(model.blocks[1].attn.o)
    projection.__class__ = type("Doubled", (torch.nn.Linear,), {"forward": _doubled})
    with pytest.raises(
        UnsupportedModelError, match=r"'z' at layer 1 whose product with W_O .*misses by 0\.5"
    ):
        models.output_projection(model, 1)
    assert models.output_projection(model, 0).shape == (4, 6, 24)


class _Halved(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def _doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * torch.nn.functional.linear(x, self.weight)
