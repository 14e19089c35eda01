"""Data points inside the active subspace: ASI with the directions of tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from asi_lens.sae.starts.datapoint import blend
from asi_lens.sae.starts.start import Draw, start


@start("asi_datapoint", subspace=True)
def asi_datapoint(rows: Float[Tensor, "n d"], draw: Draw) -> Float[Tensor, " n"]:
    """Fill `rows` with what `datapoint` draws from the same seed, projected on the active subspace.

    Returns the norms before normalization. Raises as `datapoint`.
    """
    active = draw.subspace.cpu()
    return blend(rows, draw, lambda mixed: (mixed @ active) @ active.T)
