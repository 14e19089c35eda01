"""The packaged model against numbers measured outside this project, with plain hooks and other code.

SmolLM2-135M on 65,536 tokens of news-en, context 256, layer 3: the first four layers are all that runs.
"""

from __future__ import annotations

from typing import Any

import pytest

import asi_lens as al

pytestmark = [
    pytest.mark.packaged,
    pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning"),
]
LAYER = 3
# Packing the same text differently moves them by up to 0.01; other draws by about 0.01.
TOLERANCE = 0.02

RANKS = {"attn_out": 0.543, "z": 0.760, "mlp_out": 0.882, "resid_post": 0.716}
OUTPUT_PROJECTION = {
    "z": 0.771,
    "attn_out": 0.551,
    "flat_spectrum": 0.771,
    "gaussian": 0.630,
    "random_orthogonal": 0.771,
    "rotated_input": 0.568,
    "isotropic_z": 0.724,
    "orthogonal_heads": 0.708,
    "sum_of_heads": 0.802,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return al.load_model("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def spectra(model: Any) -> Any:
    tokens = al.load_tokens("news-en", model, n_tokens=65_536, context=256)
    return al.collect_spectra(model, tokens, layers=[LAYER], progress=False)


@pytest.mark.parametrize("site", RANKS)
def test_effective_rank(spectra: Any, site: str) -> None:
    assert spectra[site, LAYER].effective_rank_fraction == pytest.approx(RANKS[site], abs=TOLERANCE)


def test_output_projection(model: Any, spectra: Any) -> None:
    W_O = al.models.output_projection(model, LAYER)
    ours = al.counterfactual_ranks(W_O, spectra["z", LAYER].covariance)
    assert ours == pytest.approx(OUTPUT_PROJECTION, abs=TOLERANCE)
    # The closed form is the measured output, without its own pass.
    assert ours["attn_out"] == pytest.approx(spectra["attn_out", LAYER].effective_rank_fraction, abs=1e-4)
