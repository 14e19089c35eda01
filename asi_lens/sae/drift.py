"""Whether features stay in the subspace that they began in: the share of each row's norm inside it.

Nothing constrains a dictionary after Active Subspace Initialization. Logged over training, the shares show
whether dead features stay where they began, and whether live ones wander off (paper.md C12).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.spectrum import Spectrum
from asi_lens.sae.dictionary import SparseAutoencoder

_ROWS = 4096
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}

COLUMNS = tuple(
    f"{name}_inside{quantile}"
    for name in ("decoder", "encoder")
    for quantile in ("", "_p10", "_median", "_p90")
)
"""What is logged."""


class Drift:
    """Measures rows against the top `d_init` directions of a spectrum; a `Trainer` logs it as it goes.

    One product of d_sae x d_in x d_init for each logged row and each of encoder and decoder, in float32:
    a thousandth of the work of the steps between.

    Attributes:
        basis: V_active [d_in d_init], orthonormal columns.
    """

    def __init__(self, spectrum: Spectrum, d_init: int):
        """Raises OptionError for a `d_init` out of range."""
        self.basis = spectrum.active_subspace(d_init).float()

    @torch.no_grad()
    def shares(self, sae: SparseAutoencoder) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Share of squared norm inside, 0 to 1: of each decoder row, and of each encoder column."""
        basis = self.basis.to(sae.W_dec.device)
        return subspace_share(sae.W_dec.detach(), basis), subspace_share(sae.encoder_rows, basis)

    def __call__(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Mean and quantiles of `shares` over features, by column: `decoder_inside`, `decoder_inside_p10`,
        `.._median`, `.._p90`, and the same of `encoder_inside`; rows of zeros are left out."""
        out = {}
        for name, shares in zip(("decoder", "encoder"), self.shares(sae), strict=True):
            found = shares[~shares.isnan()]
            out[f"{name}_inside"] = found.mean().item() if len(found) else float("nan")
            for label, q in _QUANTILES.items():
                value = found.quantile(q).item() if len(found) else float("nan")
                out[f"{name}_inside_{label}"] = value
        return out


def subspace_share(rows: Float[Tensor, "n d"], basis: Float[Tensor, "d r"]) -> Float[Tensor, " n"]:
    """Share of each row's squared norm inside the span of `basis` (orthonormal columns), in its dtype.

    NaN for a row of zeros, which lies nowhere.
    """
    shares = []
    for part in rows.split(_ROWS):
        part = part.to(basis)
        shares.append((part @ basis).square().sum(1) / part.square().sum(1))
    return torch.cat(shares)
