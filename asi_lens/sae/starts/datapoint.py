"""Data points as directions (Anthropic, Circuits Updates, October 2025; first Peigne 2023)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import require
from asi_lens.base.permutation import Permutation
from asi_lens.kernels.draws import DRAW_ROWS, draw_gaussian
from asi_lens.sae.starts.start import Draw, set_unit, start

SHARE = 0.8
"""Weight of the data point; the rest is a random direction."""


@start("datapoint")
def datapoint(rows: Float[Tensor, "n d"], draw: Draw) -> Float[Tensor, " n"]:
    """Fill `rows` with unit(0.8 unit(x - mean) + 0.2 unit(noise)), x rows of the sample in a random order.

    A sample smaller than the dictionary is used several times, with other noise. Returns the norms before
    normalization. Raises OptionError without a sample, or for one whose rows are all the mean.
    """
    return blend(rows, draw)


def blend(
    rows: Float[Tensor, "n d"], draw: Draw, move: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, " n"]:
    """Fill `rows` as `datapoint`, with `move` applied to blocks [m d] (float64, CPU) of the blends.

    Returns the norms before normalization. Raises as `datapoint`.
    """
    require(draw.sample is not None, "sample", draw.sample, "given for a start of data points")
    assert draw.sample is not None
    sample = draw.sample.double().cpu()
    mean = sample.mean(0) if draw.spectrum is None else draw.spectrum.mean.double().cpu()
    centered = sample - mean
    centered = centered[torch.linalg.vector_norm(centered, dim=1) > 0]
    require(len(centered) > 0, "sample", "all rows equal to the mean", "of rows that vary")
    draw_gaussian(rows, draw.seed)
    norms = []
    for begin, block in zip(range(0, len(rows), DRAW_ROWS), rows.split(DRAW_ROWS), strict=True):
        places = np.arange(begin, begin + len(block))
        order = Permutation(len(centered), draw.seed)(places % len(centered))
        points = torch.nn.functional.normalize(centered[torch.from_numpy(order)])
        noise = torch.nn.functional.normalize(block.double().cpu())
        mixed = SHARE * points + (1 - SHARE) * noise
        norms.append(set_unit(block, (mixed if move is None else move(mixed)).to(block.device)))
    return torch.cat(norms)
