"""Random directions that are the same on every device, and rows of unit norm."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels import devices

# Rows of random directions drawn at a time. The numbers of a seed depend on this size.
DRAW_ROWS = 16_384


def other_stream(seed: int) -> int:
    """Return a second seed derived from `seed`, for an independent draw."""
    return seed + 2**31


@torch.no_grad()
def draw_gaussian(out: Float[Tensor, "n d"], seed: int, first: int = 0, total: int | None = None) -> None:
    """Fill `out` with independent standard normal numbers, the same on every device and dtype.

    `out` receives the rows from `first` on of a draw of `total` rows (by default, up to the end of `out`).
    The CPU draws for every device. While a block is copied to another device, a thread draws the next block.
    """
    last = first + len(out)
    blocks = _drawn(out.shape[1], seed, last, last if total is None else total)
    with ThreadPoolExecutor(1) as thread:
        ahead = None if devices.is_host(out.device) else thread.submit(next, blocks, None)
        while (block := next(blocks, None) if ahead is None else ahead.result()) is not None:
            if ahead is not None:
                ahead = thread.submit(next, blocks, None)
            start, drawn = block
            begin, end = max(first, start), min(last, start + len(drawn))
            if begin < end:
                out[begin - first : end - first].copy_(drawn[begin - start : end - start])


def _drawn(d: int, seed: int, last: int, total: int) -> Iterator[tuple[int, Float[Tensor, "rows d"]]]:
    """Yield blocks of a draw and their first rows, up to row `last`, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, last, DRAW_ROWS):
        size = min(DRAW_ROWS, total - start)
        yield start, torch.randn(size, d, generator=generator, dtype=torch.float32, device="cpu")


@torch.no_grad()
def unit_rows_(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Divide each row by its norm, in place, without a copy of all rows; returns `rows`."""
    # Blocks stay in a CPU's cache; on an accelerator each would be a launch of its own.
    for block in rows.split(1024) if devices.is_host(rows.device) else [rows]:
        block.div_(torch.linalg.vector_norm(block, dim=1, keepdim=True))
    return rows
