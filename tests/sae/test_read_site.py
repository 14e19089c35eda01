"""Sites in the words of other libraries; their folders are in `test_browse` and `test_released`."""

from __future__ import annotations

from typing import Any

import pytest

from asi_lens.base.errors import AsiLensError, OptionError
from asi_lens.inputs import models
from asi_lens.sae.read_site import site_read

pytestmark = pytest.mark.model_facing


@pytest.mark.parametrize(
    ("about", "where"),
    [
        ({"site": "attn_out", "layer": 2, "hook_name": "another"}, ("attn_out", 2)),
        ({"hook_name": "blocks.1.hook_attn_out"}, ("attn_out", 1)),
        ({"hook_name": "blocks.1.hook_resid_pre"}, ("blocks.1.hook_resid_pre", 1)),
        ({"hf_hook_name": "layers.1"}, ("resid_post", 1)),
        ({"hf_hook_name": "model.layers.2.self_attn"}, ("attn_out", 2)),
        ({"hf_hook_name": "transformer.h.0.mlp"}, ("mlp_out", 0)),
        ({"hf_hook_name": "my_dictionary"}, None),
        ({"site": "attn_out"}, None),
        ({}, None),
    ],
)
def test_sites_in_the_words_of_each_library(tiny_llama: Any, about: dict[str, Any], where: Any) -> None:
    assert site_read(tiny_llama, about) == where


def test_modules_before_a_norm(tiny_folder: Any) -> None:
    gemma = models.load_model(tiny_folder("gemma2"), dtype="float32", device="cpu")
    assert site_read(gemma, {"hf_hook_name": "layers.1.self_attn"}) == (models.attention_write_site(gemma), 1)
    assert site_read(gemma, {"hook_name": "blocks.1.hook_attn_out"}) == ("attn_out", 1)
    with pytest.raises(OptionError, match=r"it reads 'layers\.1\.mlp', which is no site of this model"):
        site_read(gemma, {"hf_hook_name": "layers.1.mlp"})


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"hook_name": "blocks.1.hook_attn_out", "hook_head_index": 3}, "reads head 3 alone"),
        ({"hook_name": "blocks.9.hook_attn_out"}, "layer=9 is not allowed"),
        ({"hf_hook_name": "layers.3"}, "layer=3 is not allowed"),
        ({"hook_name": "blocks.1.hook_attn_ouut"}, "unknown site 'blocks.1.hook_attn_ouut'"),
    ],
)
def test_sites_that_the_model_lacks(tiny_llama: Any, about: dict[str, Any], message: str) -> None:
    with pytest.raises(AsiLensError, match=message):
        site_read(tiny_llama, about)
