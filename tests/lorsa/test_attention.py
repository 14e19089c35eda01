"""Attention layers are copied with all of their rules, or refused, whatever the dtype of the model."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from small_lorsas import read_and_written

from asi_lens.base.errors import UnsupportedModelError
from asi_lens.inputs.models import load_model
from asi_lens.lorsa.attention import read_attention

pytestmark = pytest.mark.model_facing


@pytest.fixture(scope="module", params=["mistral", "phi3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attention modules name no window; the configuration has one of 8 positions."""
    return architectures.build(request.param, tmp_path_factory.mktemp(request.param) / "tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rules_and_weights_are_read_in_float32(folder: Path, dtype: str) -> None:
    model = load_model(folder, dtype=dtype, device="cpu")
    before = {name: (one.dtype, one.data_ptr()) for name, one in model.named_parameters()}
    for context in (8, 9, 40):
        found = read_attention(model, 1, context)
        assert found.pattern.window == 8
        # Cosines and sines of the first positions, which half precision would round.
        squares = found.cos.square() + found.sin.square()
        torch.testing.assert_close(squares, torch.ones_like(squares), rtol=0, atol=1e-6)
        x, y = read_and_written(model, torch.arange(10, 50)[None], 1)
        if dtype == "float32":
            torch.testing.assert_close(
                found.output(x[:, :context]).float(), y[:, :context], rtol=1e-3, atol=1e-5
            )
    assert {name: (one.dtype, one.data_ptr()) for name, one in model.named_parameters()} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_rule_that_was_not_read_is_found_out_in_any_dtype(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(folder, dtype=dtype, device="cpu")
    # As if the window were kept where nobody looks.
    monkeypatch.setattr(torch.nn.Module, "sliding_window", None, raising=False)
    assert read_attention(model, 1, 8).pattern.window is None
    for context in (9, 10, 40):
        with pytest.raises(
            UnsupportedModelError, match=r"soft cap, window .* another output .* explains 0\.001"
        ):
            read_attention(model, 1, context)
