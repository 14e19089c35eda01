"""Orthonormal sets of directions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.sae.starts.start import Draw, set_unit, start


@start("orthogonal")
def orthogonal(rows: Float[Tensor, "n d"], draw: Draw) -> Float[Tensor, " n"]:
    """Fill `rows` with orthonormal sets of d rows, each set drawn uniformly. Returns the norms before."""
    d, generator = rows.shape[1], torch.Generator().manual_seed(draw.seed)
    norms = []
    for block in rows.split(d):
        square = torch.randn(d, d, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(square.to(rows.device))
        # Multiplying by the signs of R's diagonal makes the directions uniform (Mezzadri 2007).
        norms.append(set_unit(block, (q * r.diagonal().sign()).T[: len(block)]))
    return torch.cat(norms)
