"""One threshold for all features that gives a wanted l0."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import require
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.kinds import kinds_with
from asi_lens.sae.kinds.kind import largest


@torch.no_grad()
def set_threshold(sae: SparseAutoencoder, sample: Float[Tensor, "n d_in"], l0: float | int) -> float:
    """Set one threshold for all features so that on average `l0` features fire on a token of the sample.

    Returns the threshold. It is zero if fewer features have a positive pre-activation. Kinds without own
    thresholds subtract it from `b_enc`. Raises OptionError for a kind with neither, or an l0 out of range.
    """
    kind = sae.activation
    allowed = f"{kinds_with('has_threshold')} to have a threshold"
    require(kind.has_threshold, "activation", sae.config.activation, allowed)
    require(0 < l0 <= sae.d_sae, "l0", l0, f"above 0 and at most d_sae={sae.d_sae}")
    rows = sae.centered(sample)
    least_l0 = f"large enough for one firing in the sample's {len(rows)} rows"
    require(round(l0 * len(rows)) >= 1, "l0", l0, least_l0)
    found, least = largest(rows, sae.encoder_rows, sae.b_enc.data, l0)
    below = found.values[found.values < least]
    # Halfway to the next value, so that rounding does not change which features fire.
    threshold = float((least + below.max()) / 2) if len(below) else 0.0
    kind.set_threshold(sae.b_enc.data, threshold)
    return threshold
