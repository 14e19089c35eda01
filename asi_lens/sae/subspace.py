"""Dictionaries inside the active subspace: trained on coordinates, then expanded to full width.

About half of the directions of an attention output hold 99 % of its variance. A dictionary of the coordinates
in these directions needs about half of the work in every product. The part outside the subspace is
reconstructed by the mean, so the FVU cannot fall below the share of the variance outside.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.activations.shaped import LinearStore
from asi_lens.base.errors import require
from asi_lens.sae.dictionary import SparseAutoencoder


class SubspaceStore(LinearStore):
    """Rows of a store as coordinates (x - mean) V in its top `r` principal directions, without a copy.

    Attributes:
        of: the store of whole rows. basis: V [d r], float64, orthonormal columns. center [d]: the mean.
        discarded: share of the variance outside, the smallest possible FVU of a dictionary in the subspace.
    """

    def __init__(self, of: ActivationStore, r: int):
        """Raises OptionError for `r` out of range."""
        self.basis = of.spectrum.active_subspace(r)
        super().__init__(of, self.basis, of.mean)
        self.discarded = 1 - self.mean_square_norm / of.mean_square_norm
        self.metadata = {**of.metadata, "subspace": r}

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint that changes with the rows and with the subspace."""
        return hashlib.sha256(self.of.fingerprint.encode() + self.basis.cpu().numpy().tobytes()).hexdigest()[
            :16
        ]


@torch.no_grad()
def expand(
    sae: SparseAutoencoder,
    matrix: Float[Tensor, "d r"],
    center: Float[Tensor, " width"],
    inverse: Float[Tensor, "r d_inverse"] | None = None,
) -> SparseAutoencoder:
    """Return the dictionary of x that a dictionary of x' = (x - center) M is: x -> center + sae(x') M^-1.

    Args:
        matrix: M. Without `inverse` its columns are orthonormal, and M^T takes the place of the inverse:
            decoder rows keep their norm.
        inverse: M^-1 [r d]. Decoder rows then have other norms than 1, since features are picked by their
            values in x'.

    The result is exact up to rounding, with the same code. Raises OptionError for a matrix whose columns
    differ in number from the dictionary's width, or an inverse that is none.
    """
    require(not sae.is_transcoder, "sae", "a transcoder", "an autoencoder")
    d, r = matrix.shape
    require(r == sae.d_in, "basis", f"of {r} columns", f"of {sae.d_in}, as the dictionary is wide")
    require(center.shape == (d,), "center", tuple(center.shape), f"of shape ({d},)")
    forth = matrix.double()
    back = forth.T if inverse is None else inverse.double()
    exact = bool(
        torch.allclose(back @ forth, torch.eye(r, dtype=torch.float64, device=back.device), atol=1e-6)
    )
    require(exact, "basis", "not orthonormal", "of orthonormal columns, or given with its inverse")
    config = replace(sae.config, d_in=d)
    out = SparseAutoencoder(config, draw=False, dtype=sae.W_dec.dtype).to(sae.W_dec.device)
    forth, back = forth.to(sae.W_dec.device), back.to(sae.W_dec.device)
    for source, target, by in (
        (sae.encoder_rows, out.encoder_rows, forth.T),
        (sae.W_dec.data, out.W_dec.data, back),
    ):
        for rows, into in zip(source.split(4096), target.split(4096), strict=True):
            into.copy_(rows.double() @ by)
    out.b_enc.copy_(sae.b_enc)
    out.b_dec.copy_(sae.b_dec.double() @ back)
    mean = center.double().to(back.device) + sae.input_mean.double() @ back
    out.set_normalization(mean, float(sae.input_scale))
    out.activation.load_state_dict(sae.activation.state_dict())
    out.initialization = {**sae.initialization, **({"subspace": r} if inverse is None else {"shaped": True})}
    return out
