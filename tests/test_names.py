"""Names that users give to models and texts, in every file name that is made of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import asi_lens as al
from asi_lens.base.paths import cache_root, figures_dir
from asi_lens.experiments.run_folders import run_folder

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
NAMES = ["模" * 75, "run #3 50%25", "a" * 250, "é" * 120, "..b", "-x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_and_a_text_of_any_name(
    name: str, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "figures"))
    text = tmp_path / f"{name[:245] if name.isascii() else name}.txt"
    text.write_text("abcdefgh " * 60)
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / name)
    model = al.load_model(folder, dtype="float32", device="cpu")
    tokens = al.load_tokens(text, model, n_tokens=64, context=16)
    assert al.load_tokens(text, model, n_tokens=64, context=16).fingerprint == tokens.fingerprint
    spectra = al.collect_spectra(model, tokens, ["z"], [1], progress=False)
    assert spectra.model.name == name
    store = al.harvest_store(model, tokens, "z", 1, progress=False)
    assert al.harvest_store(model, tokens, "z", 1, progress=False).fingerprint == store.fingerprint
    for made in (run_folder([model.cfg.model_name, name, 1], "0" * 16), figures_dir(str(folder), "quick")):
        made.mkdir(parents=True)
    for path in (cache_root(), tmp_path / "figures"):
        assert all(len(os.fsencode(one.name)) <= 200 for one in path.rglob("*"))
