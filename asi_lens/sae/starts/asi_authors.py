"""ASI with the steps of the authors' code, including the authors' search for the norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.draws import DRAW_ROWS
from asi_lens.sae.starts.start import Draw, set_unit, start


def grid(total: float, cross: float, power: float) -> float:
    """Return r^2 for the best norm r of encoder and decoder rows, by the authors' search.

    The search tries 50 values 0.1 to 5.0, then 20 values from 0.09 below to 0.1 above the best of these. The
    reconstruction is proportional to r^2. `total`, `cross`, `power` are the sums of `Start.norm`.
    """

    def best(norms: list[float]) -> float:
        return min(norms, key=lambda r: total - 2 * r**2 * cross + r**4 * power)

    coarse = best([0.1 * i for i in range(1, 51)])
    return best([coarse - 0.09 + 0.01 * i for i in range(20)]) ** 2


@start("asi_authors", subspace=True, norm=grid)
def asi_authors(rows: Float[Tensor, "n d"], draw: Draw) -> Float[Tensor, " n"]:
    """Fill `rows` with directions whose coordinates in the active subspace are the first d_init columns of a
    uniform draw. Returns the norms before normalization."""
    active, generator = draw.subspace, torch.Generator().manual_seed(draw.seed)
    norms = []
    for block in rows.split(DRAW_ROWS):
        drawn = torch.rand(block.shape, generator=generator, dtype=torch.float32, device="cpu")
        coordinates = (drawn * 2 - 1)[:, : active.shape[1]].to(active)
        norms.append(set_unit(block, coordinates @ active.T))
    return torch.cat(norms)
