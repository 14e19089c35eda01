"""`browse` and its command for units of a Lorsa, and for everything else as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_lorsas import CONTEXT, LAYER, N_OV, K, started

import asi_lens as al
from asi_lens.__main__ import COMMANDS
from asi_lens.base.errors import OptionError
from asi_lens.inputs.corpora import Tokens
from asi_lens.lorsa.browse import main

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
QUIET: dict[str, Any] = {"top": 3, "progress": False}


def test_units_behind_a_slider(tiny_llama: Any, tiny_tokens: Tokens, pairs: al.SequencePairs) -> None:
    lorsa = started(tiny_llama, pairs)
    by_text = al.browse(lorsa, tiny_tokens, tiny_llama, **QUIET)
    by_pairs = al.browse(lorsa, pairs, tiny_llama, tiny_tokens, **QUIET)
    counts = by_text.features.firings.counts
    assert torch.equal(counts, by_pairs.features.firings.counts)
    assert by_text.number.max == N_OV - 1
    assert "reads from" in by_text.out.value
    by_text.number.value = int(counts.sort(descending=True).indices[1])
    assert f"Unit {by_text.number.value} of head" in by_text.out.value


def test_what_does_not_go_together(tiny_llama: Any, tiny_tokens: Tokens, pairs: al.SequencePairs) -> None:
    lorsa = started(tiny_llama, pairs)
    with pytest.raises(OptionError, match="a Lorsa takes pairs"):
        al.browse(lorsa, pairs, tiny_llama)
    store = al.ActivationStore.from_tensor(torch.randn(50, 24))
    with pytest.raises(OptionError, match="a Lorsa takes pairs"):
        al.browse(lorsa, store, tiny_llama, tiny_tokens)
    sae = al.SparseAutoencoder(al.SAEConfig(24, 30, 3))
    with pytest.raises(OptionError, match="pairs of sequences are of a Lorsa"):
        al.browse(sae, pairs, tiny_llama, tiny_tokens)
    with pytest.raises(OptionError, match="tokens=None"):
        al.browse(sae, store, tiny_llama)
    config = al.LorsaConfig.of(tiny_llama, LAYER, n_ov=N_OV, k=K, context=CONTEXT)
    nameless = al.Lorsa(al.LorsaConfig(config.d_in, config.d_qk, config.n_qk_heads, N_OV, K, config.pattern))
    with pytest.raises(OptionError, match="does not say its layer"):
        al.browse(nameless, tiny_tokens, tiny_llama)


def test_the_command_takes_a_file_of_a_lorsa_and_a_folder(
    tiny_llama: Any,
    tiny_folder: Any,
    pairs: al.SequencePairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    assert COMMANDS["browse"].module == "lorsa.browse"
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    started(tiny_llama, pairs).save(tmp_path / "units.safetensors")
    (tmp_path / "text.txt").write_text("abc def ghi. " * 80)
    out = tmp_path / "page.html"
    arguments = ["--model", str(tiny_folder("llama")), "--output", str(out), "--features", "2"]
    arguments += ["--corpus", str(tmp_path / "text.txt"), "--context", "16", "--tokens", "256"]
    assert main([str(tmp_path / "units.safetensors"), *arguments]) == 0
    page = out.read_text(encoding="utf-8")
    assert "Features of units.safetensors" in page
    assert "reads from" in page
    config = al.SAEConfig(24, 30, 3, metadata={"site": "attn_out", "layer": 1})
    al.SparseAutoencoder(config).save(tmp_path / "sae")
    assert main([str(tmp_path / "sae"), *arguments]) == 0
    assert "reads from" not in out.read_text(encoding="utf-8")
    assert main([str(tmp_path / "none.safetensors"), *arguments]) == 1
    assert "none.safetensors does not exist" in capsys.readouterr().err
