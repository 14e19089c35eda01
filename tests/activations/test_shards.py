"""The files of a store: damage is found and named, and a folder that is no store is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_stores import OPTIONS

from asi_lens.activations.harvest_store import harvest_store
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import CacheError, DataError
from asi_lens.inputs.corpora import Tokens

# Tiny stores: too few tokens for a rank is what they always have.
pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.fixture
def small(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> ActivationStore:
    return harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "small", **OPTIONS)


def test_damage_is_found(small: ActivationStore) -> None:
    folder = small.folder
    assert folder is not None
    small.verify()
    shard = folder / "shard-00001.safetensors"
    good = shard.read_bytes()
    edited = bytearray(good)
    edited[-1] ^= 1
    shard.write_bytes(edited)
    with pytest.raises(CacheError, match=r"shard-00001.safetensors was changed"):
        ActivationStore.open(folder).verify()
    shard.write_bytes(good[:-2])
    with pytest.raises(CacheError, match=rf"00001.safetensors has {len(good) - 2} bytes, but {len(good)}"):
        ActivationStore.open(folder)
    shard.write_bytes(b"\xff" * len(good))
    with pytest.raises(CacheError, match=r"shard-00001.safetensors cannot be read"):
        ActivationStore.open(folder)
    shard.unlink()
    with pytest.raises(CacheError, match=r"shard-00001.safetensors is missing"):
        ActivationStore.open(folder)
    shard.write_bytes(good)
    (folder / "moments.safetensors").write_bytes(b"")
    with pytest.raises(CacheError, match=r"moments.safetensors cannot be read"):
        _ = ActivationStore.open(folder).moments
    with pytest.raises(CacheError, match=r"moments.safetensors was changed"):
        ActivationStore.open(folder).verify()


def test_shards_swapped_for_others_of_the_same_size(small: ActivationStore) -> None:
    folder = small.folder
    assert folder is not None
    shard = folder / "shard-00002.safetensors"
    rows = load_file(shard)["rows"]
    save_file({"rows": rows.view(torch.float16)}, shard)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][2]["bytes"] = shard.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"holds torch.float16 .* but manifest.json says bfloat16"):
        ActivationStore.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"n": 371}, "numbers of rows do not add up"),
        ({"dtype": "int8"}, "int8"),
        ({"colour": "red"}, "unexpected or missing keys: colour"),
        (None, "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_used(
    small: ActivationStore, change: dict[str, Any] | None, message: str
) -> None:
    assert small.folder is not None
    path = small.folder / "manifest.json"
    text = path.read_text()
    path.write_text(text[:100] if change is None else json.dumps({**json.loads(text), **change}))
    with pytest.raises(CacheError, match=message):
        ActivationStore.open(small.folder)


def test_no_store_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither an activation store nor files of rows"):
        ActivationStore.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        ActivationStore.open(tmp_path / "none")
