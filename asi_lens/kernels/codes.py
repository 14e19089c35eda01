"""Sparse codes: the features that fired on each row, as rectangular arrays, and functions that build them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from asi_lens.kernels import devices


class SparseCode(NamedTuple):
    """The k features of each row that may have fired; a feature with the value zero did not fire."""

    indices: Int[Tensor, "batch k"]
    values: Float[Tensor, "batch k"]


class FlatCode(NamedTuple):
    """A code as flat lists of picks, ascending by row: rows of very different length need no padding."""

    rows: Int[Tensor, " n"]
    indices: Int[Tensor, " n"]
    values: Float[Tensor, " n"]

    def code(self, batch: int, fill: float = 0.0) -> SparseCode:
        """Return the rectangular code of `batch` rows.

        The width is the largest number of picks in a row. Shorter rows are padded by feature 0 with the value
        `fill`.
        """
        rows, indices, values = self
        counts = rows.new_zeros(batch).scatter_add_(0, rows, torch.ones_like(rows))  # bincount would wait
        width = max(1, int(counts.max())) if batch else 1
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        wide_indices = rows.new_zeros(batch, width)
        wide_values = values.new_full((batch, width), fill)
        wide_indices[rows, place] = indices
        wide_values[rows, place] = values
        return SparseCode(wide_indices, wide_values)

    def at(self, places: Int[Tensor, " m"]) -> FlatCode:
        """Return the picks at these places of the lists."""
        return FlatCode(*(part[places] for part in self))

    def kept(self, which: Bool[Tensor, " n"]) -> FlatCode:
        """Return the marked picks."""
        return self.at(which.nonzero().flatten())


def marked(mask: Bool[Tensor, " n"], count: int) -> Int[Tensor, " marked"]:
    """Return the places of a mask's `count` marks, ascending, without a wait for the device."""
    if devices.is_host(mask.device):
        return mask.nonzero().flatten()
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, count + 1, device=mask.device))


def flat_code(blocks: Iterable[tuple[Bool[Tensor, "block n"], Float[Tensor, "block n"]]]) -> FlatCode:
    """Return the marked places of blocks of rows, each a mask and its values."""
    found, before = [], 0
    for mask, values in blocks:
        rows, columns = mask.nonzero(as_tuple=True)
        found.append(FlatCode(rows + before, columns, values[rows, columns]))
        before += len(mask)
    return join_flat(found)


def join_flat(parts: Sequence[FlatCode]) -> FlatCode:
    """Return the picks of several lists, one after the other."""
    return FlatCode(*map(torch.cat, zip(*parts, strict=True)))


def stack_codes(codes: Sequence[SparseCode]) -> SparseCode:
    """Stack the rows of several codes. Narrower codes are padded by feature 0 with value 0."""
    width = max(code.values.shape[1] for code in codes)
    indices = [pad(code.indices, (0, width - code.indices.shape[1])) for code in codes]
    values = [pad(code.values, (0, width - code.values.shape[1])) for code in codes]
    return SparseCode(torch.cat(indices), torch.cat(values))
