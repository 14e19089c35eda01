"""A text in two parts: nothing that is trained on is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import split_of

from asi_lens.base.errors import OptionError

# Tiny stores: too few tokens for a rank is what they always have.
pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))


def test_a_split_shares_no_position(tiny_llama: Any, tmp_path: Path) -> None:
    data = split_of(tiny_llama, tmp_path)
    whole = split_of(tiny_llama, tmp_path, n_tokens=512, n_tokens_held_out=128).train_tokens
    assert torch.equal(torch.cat([data.train_tokens.ids, data.held_out_tokens.ids])[:16], whole.ids)
    assert torch.equal(data.loss_tokens.ids, data.held_out_tokens.ids[:1])
    assert data.train["attn_out", 1].n == 12 * 31


@pytest.mark.parametrize("n", [31, 129])
def test_a_split_checks_the_tokens_for_losses(tiny_llama: Any, tmp_path: Path, n: int) -> None:
    with pytest.raises(OptionError, match=f"n_tokens_loss={n} is not allowed"):
        split_of(tiny_llama, tmp_path, n_tokens_loss=n)
