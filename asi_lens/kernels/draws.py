"""Random directions that are the same on every device, and rows of unit norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of random directions drawn at a time. The numbers of a seed depend on this size.
DRAW_ROWS = 16_384


def other_stream(seed: int) -> int:
    """Return a second seed derived from `seed`, for an independent draw."""
    return seed + 2**31


@torch.no_grad()
def draw_gaussian(out: Float[Tensor, "n d"], seed: int, first: int = 0, total: int | None = None) -> None:
    """Fill `out` with independent standard normal numbers, the same on every device and dtype.

    `out` receives the rows from `first` on of a draw of `total` rows (by default, up to the end of `out`).
    """
    generator, last = torch.Generator().manual_seed(seed), first + len(out)
    for start in range(0, last, DRAW_ROWS):
        size = min(DRAW_ROWS, (last if total is None else total) - start)
        drawn = torch.randn(size, out.shape[1], generator=generator)
        begin, end = max(first, start), min(last, start + size)
        if begin < end:
            out[begin - first : end - first].copy_(drawn[begin - start : end - start])


@torch.no_grad()
def unit_rows_(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Divide each row by its norm, in place, without a copy of all rows; returns `rows`."""
    for block in rows.split(1024):
        block.div_(torch.linalg.vector_norm(block, dim=1, keepdim=True))
    return rows
