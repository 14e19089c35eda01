"""Coders in a forward pass: what they replace, at which hooks, and where they may not stand.

Losses with a coder spliced in are in `test_evaluate`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_stores import sinking
from torch import nn

from asi_lens.activations.massive import massive_rows
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.splice import Place, Spliced, hooked_losses
from asi_lens.sae.transcoder import Transcoder

pytestmark = pytest.mark.model_facing
D = 24
SITE = {"site": "attn_out", "layer": 1}
READS = {"site": "blocks.1.hook_resid_pre", "layer": 1}


def autoencoder(metadata: dict[str, Any], d: int = D) -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d, 48, 4, metadata=metadata))


def transcoder(metadata: dict[str, Any]) -> Transcoder:
    return Transcoder(SAEConfig(D, 48, 4, d_out=D, metadata=metadata))


def seen(model: nn.Module, ids: torch.Tensor, name: str, hooks: Any) -> torch.Tensor:
    """The residual stream after the layer, and thereby what was written there."""
    found: list[torch.Tensor] = []
    models.forward(model, ids, {**hooks, name: lambda x: found.append(x.clone())})
    return found[0]


def test_an_autoencoder_replaces_what_it_reads(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    sae, ids = autoencoder(SITE), tiny_tokens.ids[:2]
    assert isinstance(sae, Spliced)
    (name,) = hooks = sae.hooks(tiny_llama)
    assert name == "blocks.1.hook_attn_out"
    x = seen(tiny_llama, ids, name, {})
    with torch.no_grad():
        expected = torch.cat([x[:, :1], sae(x[:, 1:])], 1)
    torch.testing.assert_close(hooks[name](x), expected)
    stream = [seen(tiny_llama, ids, "blocks.1.hook_resid_post", given) for given in ({}, hooks)]
    assert torch.equal(stream[0][:, 0], stream[1][:, 0])
    assert not torch.allclose(stream[0][:, 1:], stream[1][:, 1:])


def test_a_transcoder_reads_one_site_and_replaces_another(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    coder, ids = transcoder({**SITE, "reads": READS}), tiny_tokens.ids[:2]
    assert isinstance(coder, Spliced)
    read, write = hooks = coder.hooks(tiny_llama)
    assert (read, write) == ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out")
    x, y = (seen(tiny_llama, ids, name, {}) for name in (read, write))
    assert hooks[read](x) is None
    with torch.no_grad():
        torch.testing.assert_close(hooks[write](y), torch.cat([y[:, :1], coder(x)[:, 1:]], 1))


@pytest.mark.parametrize("write", ["resid_post", "mlp_out"])
def test_massive_rows_of_either_side_stay(tiny_llama: Any, tiny_tokens: Tokens, write: str) -> None:
    """In the residual stream both sides are massive; what the MLP writes is not, only what is read."""
    coder = transcoder({"site": write, "layer": 1, "reads": {"site": "resid_post", "layer": 0}})
    with sinking(tiny_llama, tiny_tokens) as (tokens, places):
        (read, written), ids = coder.hooks(tiny_llama), tokens.ids
        x, y = (seen(tiny_llama, ids, name, {}) for name in (read, written))
        left = torch.zeros(12, 31, dtype=torch.bool).flatten().index_fill(0, places, True).view(12, 31)
        assert torch.equal(massive_rows(x)[0][:, 1:], left)
        assert torch.equal(massive_rows(y)[0][:, 1:], left if write == "resid_post" else left & False)
        hooks = coder.hooks(tiny_llama)
        hooks[read](x)
        put = hooks[written](y)
        assert put is not None
        with torch.no_grad():
            expected = torch.where(left[..., None], y[:, 1:], coder(x)[:, 1:])
        torch.testing.assert_close(put, torch.cat([y[:, :1], expected], 1))
        assert torch.equal(put[:, 1:][left], y[:, 1:][left])


@pytest.mark.parametrize("write", ["resid_post", "mlp_out", "blocks.1.mlp.hook_post"])
def test_the_mean_takes_the_place_of_the_same_rows(tiny_llama: Any, tiny_tokens: Tokens, write: str) -> None:
    """A transcoder that writes the mean loses what the ablation loses, with massive rows on either side."""
    place = Place.of(tiny_llama, (write, 1), ("resid_post", 0))
    mean = torch.randn(place.d_out, generator=torch.Generator().manual_seed(0))
    coder = Transcoder(SAEConfig(D, 48, 4, d_out=place.d_out))
    coder.set_output_normalization(mean, 1.0)
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    with sinking(tiny_llama, tiny_tokens) as (tokens, _):
        given = [coder.hooks(tiny_llama, place)]
        (found,) = hooked_losses(tiny_llama, tokens, place, mean, given, progress=False)
    assert found.cross_entropy == found.cross_entropy_mean_ablated != found.cross_entropy_clean
    assert found.loss_recovered == 0


def test_tokens_without_a_chance_add_nothing_to_kl(
    tiny_llama: Any, tiny_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of -infinity, as of a masked vocabulary, give the KL of the other tokens alone."""
    place, sae = Place.of(tiny_llama, ("attn_out", 1)), autoencoder(SITE)
    real, only = models.forward, [0.0]

    def masked(*given: Any, **options: Any) -> Any:
        logits = real(*given, **options)
        if logits is not None and only[0]:
            logits[..., 0] = only[0]
        return logits

    monkeypatch.setattr("asi_lens.sae.splice.models.forward", masked)
    given: Any = (tiny_llama, tiny_tokens, place, torch.zeros(D), [sae.hooks(tiny_llama)])
    (small,), (none,) = (hooked_losses(*given, progress=False) for only[0] in (-1e4, float("-inf")))
    assert 0 < none.kl == pytest.approx(small.kl, rel=1e-6)
    monkeypatch.setattr("asi_lens.sae.splice._divergence", lambda p, *_: torch.full((len(p),), float("nan")))
    with pytest.raises(DataError, match="cross-entropy or KL with attn_out of layer 1 edited is not finite"):
        hooked_losses(*given, progress=False)


def test_a_place_that_metadata_do_not_name_is_given(tiny_llama: Any) -> None:
    plain = autoencoder({})
    with pytest.raises(OptionError, match=r"site and layer of the SparseAutoencoder are not known; give"):
        plain.hooks(tiny_llama)
    place = Place.of(tiny_llama, ("attn_out", 1))
    assert list(plain.hooks(tiny_llama, place)) == ["blocks.1.hook_attn_out"]
    assert plain.place(tiny_llama, SITE) == place
    # A hook alone, as SAELens records it, is the same place.
    assert autoencoder({"hook_name": "blocks.1.hook_attn_out"}).place(tiny_llama, SITE) == place
    with pytest.raises(OptionError, match=r"differ \(blocks.1.hook_attn_out, blocks.2.hook_attn_out\)"):
        autoencoder(SITE).place(tiny_llama, {"site": "attn_out", "layer": 2})
    with pytest.raises(OptionError, match=r"of the Transcoder are not known; give stores whose metadata"):
        transcoder(SITE).hooks(tiny_llama)


def test_places_that_do_not_fit_are_refused(tiny_llama: Any) -> None:
    with pytest.raises(OptionError, match=r"d_in=5 .* must be 24, the width of blocks\.1\.hook_attn_out"):
        autoencoder(SITE, d=5).hooks(tiny_llama)
    narrow = Transcoder(SAEConfig(D, 48, 4, d_out=7))
    place = Place.of(tiny_llama, ("attn_out", 1), ("resid_post", 0))
    assert (place.layer, place.d_in, place.d_out) == (0, D, D)
    with pytest.raises(OptionError, match=r"d_out=7 .* must be 24, the width of blocks\.1\.hook_attn_out"):
        narrow.hooks(tiny_llama, place)
    with pytest.raises(OptionError, match=r"reads=\('attn_out', 1\) .* another site than the written"):
        Place.of(tiny_llama, ("attn_out", 1), ("attn_out", 1))
    with pytest.raises(OptionError, match=r"reads=\('resid_post', 2\) .* of layer 1 at most"):
        Place.of(tiny_llama, ("attn_out", 1), ("resid_post", 2))
    with pytest.raises(UnknownNameError, match="did you mean 'attn_out'"):
        Place.of(tiny_llama, ("atn_out", 1))
