"""Isotropic directions."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.draws import draw_gaussian
from asi_lens.sae.starts.start import Draw, start, to_unit_norm


@start("random", sharded=True, transcoders=True, lorsas=True)
def random(rows: Float[Tensor, "n d"], draw: Draw) -> Float[Tensor, " n"]:
    """Fill `rows` with Gaussian directions. Returns the norms before normalization."""
    draw_gaussian(rows, draw.seed, draw.first, draw.total)
    return to_unit_norm(rows)
