"""Objects at the end of a notebook's cell show their facts as a table."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import asi_lens as al
from asi_lens.results.judging import Number, Verdict
from asi_lens.sae.splice import SpliceLosses

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
INFO = al.ModelInfo(
    name="m <b>",
    architecture="Some",
    n_layers=2,
    d_model=64,
    n_heads=8,
    n_kv_heads=2,
    d_head=8,
    d_vocab=50_257,
    n_ctx=1024,
    dtype="float32",
    weights="as released",
    fingerprint="f",
    normalizes_attn_out=False,
    causal=True,
)
EVALUATION: dict[str, Any] = {"n_tokens": 5000, "fvu": 0.25, "explained_variance": 0.75, "l0": 8.0}
EVALUATION |= {"dead_fraction": 0.01}


def facts(shown: Any) -> dict[str, str]:
    """Rows of an object's table."""
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", shown._repr_html_())
    return dict(zip(cells[::2], cells[1::2], strict=True))


def spectrum(n: int) -> al.Spectrum:
    return al.Spectrum.of(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), name="z 1")


def test_a_model() -> None:
    assert "Model m &lt;b&gt;" in INFO._repr_html_()
    found = facts(INFO)
    assert found["vocabulary"] == "50,257"
    assert found["heads"] == "8 of width 8, 2 for keys"
    assert "attention output" not in found


def test_tokens() -> None:
    tokens = al.Tokens(torch.tensor([[0, 7, 7], [0, 5, 9]]), "news", "Some-1", 3)
    assert "Tokens of news" in tokens._repr_html_()
    found = facts(tokens)
    assert (found["sequences x context"], found["tokens"]) == ("2 x 3", "6")
    assert (found["first ids"], found["different tokens"]) == ("0, 7, 7", "4")
    assert facts(tokens[:0])["tokens"] == "0"


def test_a_spectrum_warns_of_few_rows_only() -> None:
    few, many = facts(spectrum(79)), facts(spectrum(80))
    assert "biased downwards" in few["warning"]
    assert "warning" not in many
    assert many["effective rank"] == f"{spectrum(80).effective_rank:.1f} " + (
        f"({spectrum(80).effective_rank_fraction:.3f} of d)"
    )
    assert many["directions for 99 % of the variance"] == "4 (1.000 of d)"
    assert "massive rows left out" not in many


def test_spectra_have_a_row_per_site_and_never_too_many() -> None:
    found = facts(al.Spectra({("z", 1): spectrum(79), ("z", 3): spectrum(99)}, INFO, "news"))
    assert found["z"].startswith("2 layers (1 to 3): effective rank / d ")
    assert found["rows n"] == "79 to 99"
    assert found["warning"].startswith("few rows in 1 of 2")
    many = al.Spectra({(f"blocks.{i}.hook", i): spectrum(80) for i in range(40)}, INFO, "news")
    assert len(facts(many)) <= 12
    assert facts(many)["more sites"] == "32"
    assert facts(al.Spectra({}, INFO, "news")) == {"spectra": "0"}


def test_a_store() -> None:
    about = {"model": "m", "site": "z", "layer": 0, "left_out": 3}
    found = facts(al.ActivationStore.from_tensor(torch.randn(1024, 256), about))
    assert (found["rows x width"], found["size"], found["folder"]) == ("1,024 x 256", "1.0 MiB", "in memory")
    assert (found["layer"], found["massive rows left out"]) == ("0", "3")


def test_an_evaluation_with_and_without_losses() -> None:
    found = facts(al.Evaluation(**EVALUATION))
    assert found == {"rows": "5,000", "FVU": "0.25", "l0": "8", "silent features": "1.00 %"}
    losses = SpliceLosses(3.0, 2.9, 5.0, 0.1, None, None, 0.09, 255)
    found = facts(al.Evaluation(**EVALUATION, losses=losses))
    assert (found["difference"], found["with the reconstruction"]) == ("0.1", "3")
    assert "loss recovered" not in found


@pytest.mark.parametrize(
    ("holds", "text"), [(True, "yes"), (False, "no"), (None, "not decided"), ("partly", "partly")]
)
def test_a_verdict(holds: Any, text: str) -> None:
    numbers = (Number("z", 0.5, 0.4, 0.6), Number("dead", 0.01, percent=True))
    found = facts(Verdict("C1", "Attention is low-dimensional.", "0.6", numbers, "2 seeds", holds))
    assert (found["z"], found["dead"], found["holds"]) == ("0.5 (0.4 to 0.6)", "1.0 %", text)
