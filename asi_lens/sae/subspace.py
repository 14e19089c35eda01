"""Dictionaries inside the active subspace: trained on coordinates, then expanded to full width.

About half of the directions of an attention output hold 99 % of its variance. A dictionary of the coordinates
in these directions needs about half of the work in every product. The part outside the subspace is
reconstructed by the mean, so the FVU cannot fall below the share of the variance outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.activations.moments import Moments
from asi_lens.activations.store import ReadRows
from asi_lens.base.errors import require
from asi_lens.sae.dictionary import SparseAutoencoder


class SubspaceStore(ActivationStore):
    """Rows of a store as coordinates (x - mean) V in its top `r` principal directions, without a copy.

    Attributes:
        of: the store of whole rows. basis: V [d r], float64, orthonormal columns. center [d]: the mean.
        discarded: share of the variance outside, the smallest possible FVU of a dictionary in the subspace.
    """

    def __init__(self, of: ActivationStore, r: int):
        """Raises OptionError for `r` out of range."""
        self.of = of
        self.basis = of.spectrum.active_subspace(r)
        self.center = of.mean
        whole = of.moments
        scatter = self.basis.T @ whole.scatter.to(self.basis) @ self.basis
        inside = scatter.diagonal().sum().item() / of.n
        self.discarded = 1 - inside / of.mean_square_norm
        origin = {**of.metadata, "subspace": r}
        moments = Moments.exact(of.n, torch.zeros_like(scatter[0]), scatter)
        super().__init__(
            [self.basis[:0].float()],
            lambda: moments,
            torch.zeros(r, dtype=torch.float64, device="cpu"),
            inside,
            origin,
        )
        self.n = of.n
        self._projection = self.basis.float()

    @property
    def fingerprint(self) -> str:
        """Fingerprint that changes with the rows and with the subspace."""
        return hashlib.sha256(self.of.fingerprint.encode() + self.basis.cpu().numpy().tobytes()).hexdigest()[
            :16
        ]

    def in_order(self, batch_size: int) -> Iterator[Float[Tensor, "batch r"]]:
        """Yield all rows once, in order."""
        return (self._coordinates(part.float()) for part in self.of.in_order(batch_size))

    def _read(self, index: Int[Tensor, " batch"]) -> ReadRows:
        return self.of._read(index)

    def _placed(self, read: ReadRows, dtype: torch.dtype | None) -> Float[Tensor, "batch r"]:
        rows = self._coordinates(self.of._placed(read, torch.float32))
        return rows if dtype is None else rows.to(dtype)

    def _coordinates(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
        return (rows - self.center.to(rows)) @ self._projection.to(rows)


@torch.no_grad()
def expand(
    sae: SparseAutoencoder, basis: Float[Tensor, "d r"], center: Float[Tensor, " width"]
) -> SparseAutoencoder:
    """Return the same dictionary at full width: it maps x to center + V sae(V^T (x - center)).

    The result is exact up to rounding, and decoder rows keep their norm. Raises OptionError for a basis whose
    columns are not orthonormal, or differ in number from the dictionary's width.
    """
    require(not sae.is_transcoder, "sae", "a transcoder", "an autoencoder")
    d, r = basis.shape
    require(r == sae.d_in, "basis", f"of {r} columns", f"of {sae.d_in}, as the dictionary is wide")
    require(center.shape == (d,), "center", tuple(center.shape), f"of shape ({d},)")
    gram = basis.double().T @ basis.double()
    exact = bool(torch.allclose(gram, torch.eye(r, dtype=torch.float64, device=gram.device), atol=1e-6))
    require(exact, "basis", "not orthonormal", "of orthonormal columns")
    config = replace(sae.config, d_in=d)
    out = SparseAutoencoder(config, draw=False, dtype=sae.W_dec.dtype).to(sae.W_dec.device)
    wide = basis.double().to(sae.W_dec.device)
    for source, target in ((sae.encoder_rows, out.encoder_rows), (sae.W_dec.data, out.W_dec.data)):
        for rows, into in zip(source.split(4096), target.split(4096), strict=True):
            into.copy_(rows.double() @ wide.T)
    out.b_enc.copy_(sae.b_enc)
    out.b_dec.copy_(wide @ sae.b_dec.double())
    mean = center.double().to(wide.device) + wide @ sae.input_mean.double()
    out.set_normalization(mean, float(sae.input_scale))
    out.activation.load_state_dict(sae.activation.state_dict())
    out.initialization = {**sae.initialization, "subspace": r}
    return out
