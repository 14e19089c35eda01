"""Every input of a number is in its key, and with hooks of a user no cache is used."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from asi_lens.activations.harvest_store import harvest_store
from asi_lens.base.errors import OptionError
from asi_lens.collapse.interventions import cross_entropy, truncation_sweep
from asi_lens.collapse.output_projection import counterfactual_records
from asi_lens.collapse.spectra import collect_spectra
from asi_lens.inputs import fingerprint, models
from asi_lens.inputs.corpora import Tokens, load_tokens

pytestmark = [
    pytest.mark.model_facing,
    pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.build("llama", tmp_path / "model")


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder)


def load(folder: Path, dtype: str = "float32") -> Any:
    return models.load_model(folder, dtype=dtype, device="cpu")


def of(model: Any) -> str:
    return models.model_info(model).fingerprint


def layer(model: Any, index: int = 1) -> Any:
    from asi_lens.inputs import twin

    return twin.original(model.blocks[index])


def linear(model: Any, name: str) -> Any:
    from asi_lens.inputs import twin

    return twin.original(getattr(model.blocks[1].attn, name))


# ---------------------------------------------------------------------------- a model's fingerprint


def _one_byte(model: Any) -> None:
    weight = linear(model, "o").weight.data
    weight.view(torch.uint8).view(-1)[5] ^= 1


def _through_numpy(model: Any) -> None:
    linear(model, "v").weight.detach().numpy()[3, 7] += 1e-3


def _a_buffer(model: Any) -> None:
    name, buffer = next(iter(model.original_model.named_buffers()))
    assert "inv_freq" in name
    buffer[1] *= 1.001


def _other_parameter(model: Any) -> None:
    linear(model, "q").weight = torch.nn.Parameter(linear(model, "q").weight.detach() * 1.5)


def _config(model: Any) -> None:
    model.original_model.config.rms_norm_eps = 1e-3


def _attribute(model: Any) -> None:
    from asi_lens.inputs import twin

    twin.original(model.blocks[0].attn).scaling *= 2


def _other_module(model: Any) -> None:
    from asi_lens.inputs import twin

    twin.original(model.blocks[0].mlp).act_fn = torch.nn.ReLU()


def _code_of_a_class(model: Any) -> None:
    from asi_lens.inputs import twin

    attention = twin.original(model.blocks[0].attn)
    attention.__class__ = type(type(attention).__name__, (type(attention),), {"forward": _halved})


def _halved(self: Any, *args: Any, **kwargs: Any) -> Any:
    output, weights = super(type(self), self).forward(*args, **kwargs)
    return output / 2, weights


EDITS: list[Callable[[Any], None]] = [
    _one_byte,
    _through_numpy,
    _a_buffer,
    _other_parameter,
    _config,
    _attribute,
    _other_module,
    _code_of_a_class,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_whatever_changes_the_numbers_changes_the_fingerprint(
    model: Any, edit: Callable[[Any], None]
) -> None:
    before = of(model)
    models.forward(model, torch.tensor([[5, 6, 7]]), {}, logits=True)
    assert of(model) == before, "a forward changes nothing"
    with torch.no_grad():
        edit(model)
    assert of(model) != before


def test_every_single_weight_is_looked_at(model: Any) -> None:
    weight = linear(model, "o").weight
    seen = {of(model)}
    with torch.no_grad():
        for k in range(0, weight.numel(), 37):
            weight.view(-1)[k] += 0.5
            seen.add(of(model))
    assert len(seen) == 1 + len(range(0, weight.numel(), 37))


def test_two_loads_and_two_places_are_one_model(folder: Path, tmp_path: Path) -> None:
    before = of(load(folder))
    moved = folder.rename(tmp_path / "moved")
    assert of(load(moved)) == before
    assert of(load(moved, "bfloat16")) != before


def test_config_json_is_part_of_it(folder: Path) -> None:
    before = of(load(folder))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    seen = {before}
    for changes in ({"rope_scaling": scaling}, {"rms_norm_eps": 1e-3}, {"hidden_act": "relu"}):
        path.write_text(json.dumps({**config, **changes}))
        seen.add(of(load(folder)))
    assert len(seen) == 4


def test_processed_weights_have_another(model: Any) -> None:
    before = of(model)
    model.enable_compatibility_mode()
    after = of(model)
    assert after != before


# ---------------------------------------------------------------------------- keys


def test_each_part_of_a_key_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    base = fingerprint.number_key("w", "float32", "t", format="1", seed=0)
    others = [
        fingerprint.number_key("other", "float32", "t", format="1", seed=0),
        fingerprint.number_key("w", "bfloat16", "t", format="1", seed=0),
        fingerprint.number_key("w", "float32", "other", format="1", seed=0),
        fingerprint.number_key("w", "float32", "t", format="2", seed=0),
        fingerprint.number_key("w", "float32", "t", format="1", seed=1),
    ]
    real = importlib.metadata.version
    for library in ("torch", "transformers", "transformer-lens"):
        fingerprint.versions.cache_clear()
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, of=library: "99" if name == of else real(name)
        )
        others.append(fingerprint.number_key("w", "float32", "t", format="1", seed=0))
    fingerprint.versions.cache_clear()
    texts = [json.dumps(key, sort_keys=True) for key in (base, *others)]
    assert len(set(texts)) == len(texts)


def test_an_ablated_head_gives_new_spectra(folder: Path, tiny_tokens: Tokens) -> None:
    model = load(folder)
    options: Any = {"sites": ["attn_out"], "layers": [1], "progress": False}
    before = collect_spectra(model, tiny_tokens, **options)["attn_out", 1]
    with torch.no_grad():
        linear(model, "o").weight[:, 18:] = 0  # head 3
    after = collect_spectra(model, tiny_tokens, **options)["attn_out", 1]
    fresh = collect_spectra(load(folder), tiny_tokens, **options)["attn_out", 1]
    assert before.effective_rank == fresh.effective_rank
    assert abs(after.effective_rank - before.effective_rank) > 0.1


def test_w_o_is_the_one_of_now(model: Any, tiny_tokens: Tokens) -> None:
    spectra = collect_spectra(model, tiny_tokens, ["z"], [1], progress=False)
    before = counterfactual_records(model, spectra, draws=1)
    with torch.no_grad():
        linear(model, "o").weight[:12] = 0
    after = counterfactual_records(model, spectra, draws=1)
    assert before != after


# ---------------------------------------------------------------------------- hooks of a user


def _lens_hook(model: Any) -> Callable[[], None]:
    model.add_hook("blocks.1.attn.hook_z", lambda z, hook: z * 0)
    return model.reset_hooks


def _torch_hook(model: Any) -> Callable[[], None]:
    return (
        layer(model)
        .register_forward_hook(lambda module, inputs, output: output * torch.linspace(0, 2, 24))
        .remove
    )


def _pre_hook(model: Any) -> Callable[[], None]:
    return linear(model, "o").register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,)).remove


def _method(model: Any) -> Callable[[], None]:
    module = linear(model, "o")
    module.forward = lambda x: torch.zeros(*x.shape[:-1], 24)
    return lambda: module.__dict__.pop("forward")


def _everywhere(model: Any) -> Callable[[], None]:
    from torch.nn.modules.module import register_module_forward_hook

    def halve(module: Any, inputs: Any, output: Any) -> Any:
        return output * 0.5 if isinstance(module, torch.nn.Linear) else None

    return register_module_forward_hook(halve).remove


HOOKS = [_lens_hook, _torch_hook, _pre_hook, _method, _everywhere]


@pytest.mark.parametrize("add", HOOKS, ids=lambda add: add.__name__)
def test_under_a_hook_nothing_is_read_or_written(
    model: Any, tiny_tokens: Tokens, own_cache: Path, add: Callable[[Any], Callable[[], None]]
) -> None:
    def numbers() -> tuple[float, Any, Any]:
        spectra = collect_spectra(model, tiny_tokens, ["resid_post", "z"], [1], progress=False)
        rows = truncation_sweep(model, tiny_tokens, {("resid_post", 1): spectra["resid_post", 1]}, [0.5])
        return (
            spectra["resid_post", 1].effective_rank,
            rows[0]["cross_entropy_clean"],
            cross_entropy(model, tiny_tokens, progress=False),
        )

    clean = numbers()
    files = {path for path in own_cache.rglob("*") if path.is_file()}
    remove = add(model)
    hooked = numbers()
    assert {path for path in own_cache.rglob("*") if path.is_file()} == files
    assert all(abs(a - b) > 1e-4 for a, b in zip(clean, hooked, strict=True))
    assert hooked[1] == hooked[2]
    with pytest.raises(OptionError, match="name a folder"):
        harvest_store(model, tiny_tokens, "attn_out", 1, progress=False)
    assert of(model) != of(model)
    remove()
    assert numbers() == clean
    assert fingerprint.is_fixed(of(model))


def test_numbers_under_a_hook_are_not_served_to_the_clean_model(model: Any, tiny_tokens: Tokens) -> None:
    remove = _lens_hook(model)
    hooked = collect_spectra(model, tiny_tokens, ["attn_out"], [1], progress=False)["attn_out", 1]
    remove()
    clean = collect_spectra(model, tiny_tokens, ["attn_out"], [1], progress=False)["attn_out", 1]
    assert float(hooked.eigenvalues.sum()) < 1e-6 < float(clean.eigenvalues.sum())


# ---------------------------------------------------------------------------- tokens of another tokenizer


def test_tokens_of_another_tokenizer(model: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny_models.tokenizer()
    vocabulary = tokenizer.get_vocab()
    names = [name for name in vocabulary if name not in tiny_models.SPECIALS]
    swapped = json.loads(tokenizer.backend_tokenizer.to_str())
    for ours, theirs in zip(names, reversed(names), strict=True):
        swapped["model"]["vocab"][ours] = vocabulary[theirs]
    (tmp_path / "other.json").write_text(json.dumps(swapped))
    other = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "other.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=128,
    )
    texts = ["some words of a text, and more of them. " * 20]
    own = load_tokens(texts, model, n_tokens=64, context=16)
    foreign = load_tokens(texts, other, n_tokens=64, context=16)
    assert cross_entropy(model, own, progress=False) > 0
    doors: list[Callable[[Tokens], Any]] = [
        lambda tokens: cross_entropy(model, tokens, progress=False),
        lambda tokens: collect_spectra(model, tokens, ["attn_out"], [0], progress=False),
        lambda tokens: harvest_store(model, tokens, "attn_out", 0, folder=tmp_path / "s", progress=False),
    ]
    for door in doors:
        with pytest.raises(OptionError, match="made by another tokenizer"):
            door(foreign)
    assert cross_entropy(model, replace(foreign, tokenizer=""), progress=False) > 0
