"""Active Subspace Initialization (arXiv 2508.16929)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.draws import draw_gaussian
from asi_lens.sae.starts.start import Draw, start, to_unit_norm


@start("asi", subspace=True, sharded=True, transcoders=True, lorsas=True)
def asi(rows: Float[Tensor, "n d"], draw: Draw) -> Float[Tensor, " n"]:
    """Fill `rows` with the directions that `random` draws from the same seed, projected on the active
    subspace. Returns the norms before normalization."""
    active = draw.subspace
    draw_gaussian(rows, draw.seed, draw.first, draw.total)
    return to_unit_norm(rows, lambda drawn: (drawn @ active) @ active.T)
