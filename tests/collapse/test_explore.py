"""Controls over spectra: what they show is what the spectra say, at every place."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
import torch

import asi_lens as al
from asi_lens.base.errors import OptionError
from asi_lens.collapse.explore import Explorer
from asi_lens.collapse.spectra import Spectra
from asi_lens.figures.style import PLOTLY
from asi_lens.inputs.corpora import Tokens

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.fixture(scope="module")
def spectra(tiny_llama: Any, tiny_tokens: Tokens) -> Spectra:
    return al.collect_spectra(tiny_llama, tiny_tokens, progress=False)


@pytest.fixture
def explorer(tiny_llama: Any, spectra: Spectra) -> Explorer:
    return al.explore(tiny_llama, spectra)


def drawn(explorer: Explorer) -> dict[str, Any]:
    (output,) = explorer.figure.outputs
    figure: dict[str, Any] = output["data"][PLOTLY]
    return figure


def curve(explorer: Explorer, name: str) -> list[float]:
    (line,) = [trace for trace in drawn(explorer)["data"] if trace["name"] == name]
    y = line["y"]  # plotly writes arrays as bytes
    return np.frombuffer(base64.b64decode(y["bdata"]), y["dtype"]).tolist()


def test_controls_move_figure_and_numbers(explorer: Explorer, spectra: Spectra, tiny_llama: Any) -> None:
    assert [name for _, name in explorer.site.options] == ["attn_out", "mlp_out", "resid_post", "z"]
    assert list(explorer.layer.options) == [0, 1, 2]
    assert (explorer.layer.value, explorer.d_init.value, explorer.d_init.max) == (1, 12, 24)
    for site, name in (("attn_out", "attention output"), ("mlp_out", "MLP output")):
        for layer in (2, 0):
            explorer.site.value, explorer.layer.value, explorer.d_init.value = site, layer, 7
            s = spectra[site, layer]
            assert curve(explorer, name) == pytest.approx(s.relative_singular_values.tolist())
            assert f"{name}, layer {layer} of " in explorer.facts.value
            assert f"{s.effective_rank_fraction:.3f} ({s.effective_rank:.0f} of 24)" in explorer.facts.value
            assert f"{s.explained_variance(7):.2%} of the variance" in explorer.facts.value
            (line,) = drawn(explorer)["layout"]["shapes"]
            assert line["x0"] == pytest.approx(7 / 24)
            W_O = al.models.output_projection(tiny_llama, layer)
            ranks = al.counterfactual_ranks(W_O, spectra["z", layer].covariance)
            assert f"{ranks['orthogonal_heads']:.3f}" in explorer.facts.value


def test_show_moves_and_refuses_places_that_are_not_there(explorer: Explorer) -> None:
    explorer.show("resid_post", 2, 24)
    assert (explorer.site.value, explorer.layer.value, explorer.d_init.value) == ("resid_post", 2, 24)
    assert "100.00% of the variance" in explorer.facts.value
    explorer.show(layer=0)
    assert (explorer.site.value, explorer.layer.value) == ("resid_post", 0)
    for place, message in (
        ({"site": "atn_out"}, "site='atn_out' is not allowed; .* resid_post"),
        ({"layer": 3}, r"layer=3 is not allowed; .* \[0, 1, 2\]"),
        ({"d_init": 25}, "d_init=25 is not allowed; .* from 1 to 24"),
        ({"d_init": 0}, "d_init=0"),
    ):
        with pytest.raises(OptionError, match=message):
            explorer.show(**place)  # type: ignore[arg-type]
    assert (explorer.site.value, explorer.layer.value) == ("resid_post", 0)


def test_sites_of_other_layers_and_widths(tiny_llama: Any, spectra: Spectra) -> None:
    wide = al.Spectrum.of(torch.randn(200, 30))
    some = {("attn_out", 0): spectra["attn_out", 0], ("attn_out", 2): spectra["attn_out", 2]}
    explorer = al.explore(tiny_llama, Spectra({**some, ("other", 1): wide}, spectra.model, "text"))
    explorer.show("attn_out", 2, 24)
    explorer.site.value = "other"
    assert (list(explorer.layer.options), explorer.layer.value, explorer.d_init.max) == ([1], 1, 30)
    explorer.d_init.value = 30
    explorer.site.value = "attn_out"
    assert (list(explorer.layer.options), explorer.layer.value) == ([0, 2], 0)
    assert (explorer.d_init.max, explorer.d_init.value) == (24, 24)
    assert "z of this layer is not among the spectra" in explorer.facts.value


def test_a_front_end_without_widgets_gets_one_place(explorer: Explorer, tiny_llama: Any) -> None:
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "shows no widgets" in bundle["text/html"]
    assert "attention output, layer 1 of " in bundle["text/html"]
    with pytest.raises(OptionError, match="spectra='none'"):
        al.explore(tiny_llama, Spectra({}, al.model_info(tiny_llama), "text"))
