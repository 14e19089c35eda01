"""Drift of features out of the initial subspace: the share of each row's squared norm inside the subspace.

Training does not constrain a dictionary to the subspace of Active Subspace Initialization. Shares logged over
training show whether dead features stay in the subspace and live features leave it (paper.md C12).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.products import exact_products
from asi_lens.sae.dictionary import SparseAutoencoder

_ROWS = 4096
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}

COLUMNS = tuple(
    f"{name}_inside{quantile}"
    for name in ("decoder", "encoder")
    for quantile in ("", "_p10", "_median", "_p90")
)
"""Logged columns."""


class Drift:
    """Measures rows against the top `d_init` directions of a spectrum; a `Trainer` logs the result.

    Each measurement takes two products of d_sae x d_in x d_init (encoder and decoder) in float32, about a
    thousandth of the work of the steps between two measurements.

    Attributes:
        basis: V_active [d_in d_init], orthonormal columns.
    """

    def __init__(self, spectrum: Spectrum, d_init: int):
        """Raises OptionError for a `d_init` out of range."""
        self.basis = spectrum.active_subspace(d_init).float()

    @exact_products()
    @torch.no_grad()
    def shares(self, sae: SparseAutoencoder) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Return the share of squared norm inside, 0 to 1, of each decoder row and of each encoder column."""
        basis = self.basis.to(sae.W_dec.device)
        return subspace_share(sae.W_dec.detach(), basis), subspace_share(sae.encoder_rows, basis)

    def __call__(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Return mean and quantiles of `shares` over features: `decoder_inside` (the mean), `.._p10`,
        `.._median`, `.._p90`, and the same for `encoder_inside`. Rows of zeros are left out."""
        out = {}
        for name, shares in zip(("decoder", "encoder"), self.shares(sae), strict=True):
            found = shares[~shares.isnan()]
            out[f"{name}_inside"] = found.mean().item() if len(found) else float("nan")
            for label, q in _QUANTILES.items():
                value = found.quantile(q).item() if len(found) else float("nan")
                out[f"{name}_inside_{label}"] = value
        return out


def subspace_share(rows: Float[Tensor, "n d"], basis: Float[Tensor, "d r"]) -> Float[Tensor, " n"]:
    """Return the share of each row's squared norm in the span of `basis` (orthonormal columns), in its dtype.

    The share of a row of zeros is NaN.
    """
    shares = []
    for part in rows.split(_ROWS):
        part = part.to(basis)
        shares.append((part @ basis).square().sum(1) / part.square().sum(1))
    return torch.cat(shares)
