"""Numbers of a store and of a model together are refused where another model wrote the store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from small_stores import OPTIONS

import asi_lens as al
from asi_lens.base.errors import OptionError
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.same_origin import require_model_of
from asi_lens.lorsa.data import harvest_pairs
from asi_lens.lorsa.features import UnitFeatures
from asi_lens.sae.features import Features

pytestmark = [
    pytest.mark.model_facing,
    pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning"),
]


def load(folder: Path, dtype: str = "float32") -> Any:
    return al.load_model(folder, dtype=dtype, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.build("llama", tmp_path / "model")


@pytest.fixture
def tuned(folder: Path) -> Path:
    """A copy of the folder with one weight changed: a fine-tuned model of the same tokenizer and shapes."""
    copy = folder.with_name("tuned")
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "o_proj" in name)
    save_file({**weights, name: weights[name] * 1.01}, path, {"format": "pt"})
    return copy


def about(folder: Path, tokens: Tokens, dtype: str = "float32") -> dict[str, Any]:
    store = al.harvest_store(load(folder, dtype), tokens, "attn_out", 1, folder=folder / "store", **OPTIONS)
    return dict(store.metadata)


def test_a_model_is_known_by_its_name_or_by_its_weights(folder: Path, tiny_tokens: Tokens) -> None:
    metadata = about(folder, tiny_tokens)
    require_model_of("the store", metadata, load(folder))
    require_model_of("the store", metadata, load(folder, "bfloat16"))
    moved = folder.rename(folder.with_name("elsewhere"))
    require_model_of("the store", metadata, load(moved))


def test_another_model_is_refused_and_both_are_named(folder: Path, tuned: Path, tiny_tokens: Tokens) -> None:
    metadata = about(folder, tiny_tokens)
    with pytest.raises(OptionError) as error:
        require_model_of("the store", metadata, load(tuned))
    for part in ("'model'", "'tuned'", metadata["weights_fingerprint"]):
        assert part in str(error.value)
    assert "to be recognised" not in str(error.value)


def test_the_same_weights_elsewhere_in_another_dtype_are_told_how_they_are_recognised(
    folder: Path, tiny_tokens: Tokens
) -> None:
    metadata = about(folder, tiny_tokens, "bfloat16")
    moved = folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(OptionError, match="load it in bfloat16 to be recognised"):
        require_model_of("the store", metadata, load(moved))
    require_model_of("the store", metadata, load(moved, "bfloat16"))


def test_rows_that_no_harvest_wrote_are_not_checked(folder: Path) -> None:
    rows = torch.randn(64, 8)
    named = al.ActivationStore.from_tensor(rows, {"model": "somebody's"})
    for store in (al.ActivationStore.from_tensor(rows), named):
        require_model_of("the store", store.metadata, load(folder))


def test_cards_and_losses_of_another_model_are_refused(
    folder: Path, tuned: Path, tiny_tokens: Tokens
) -> None:
    right, wrong = load(folder), load(tuned)
    store = al.harvest_store(right, tiny_tokens, "attn_out", 1, folder=folder / "store", **OPTIONS)
    sae = al.SparseAutoencoder(al.SAEConfig(store.d, 40, 3, metadata=store.metadata))
    pairs = harvest_pairs(right, tiny_tokens, 1, progress=False)
    lorsa = al.Lorsa(al.LorsaConfig.of(right, 1, n_ov=8, k=2, context=tiny_tokens.context))
    quiet: dict[str, Any] = {"progress": False}
    for model in (right, wrong):
        calls = (
            lambda model=model: Features(sae, store, tiny_tokens, model, **quiet),
            lambda model=model: al.evaluate(sae, store, model=model, tokens=tiny_tokens, **quiet),
            lambda model=model: UnitFeatures(lorsa, pairs, tiny_tokens, model, **quiet),
            lambda model=model: al.evaluate_lorsa(lorsa, pairs, model=model, tokens=tiny_tokens, **quiet),
        )
        for call in calls:
            if model is right:
                call()
                continue
            with pytest.raises(OptionError, match="is of the activations of"):
                call()
