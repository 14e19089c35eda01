"""Sparse codes: the features that fired on each row, as rectangular arrays, and functions that build them."""

from __future__ import annotations

from collections.abc import Sequence
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


def marked(mask: Bool[Tensor, " n"], count: int) -> Int[Tensor, " marked"]:
    """Return the places of a mask's `count` marks, ascending, without a wait for the device."""
    if devices.is_host(mask.device):
        return mask.nonzero().flatten()
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, count + 1, device=mask.device))


def pick(mask: Bool[Tensor, "batch n"], values: Float[Tensor, "batch n"]) -> SparseCode:
    """Pack the marked places of each row and their values into a code, padded by feature 0 with value 0."""
    rows, columns = mask.nonzero(as_tuple=True)
    return side_by_side(rows, columns, values[rows, columns], len(mask))


def side_by_side(
    rows: Int[Tensor, " picks"],
    indices: Int[Tensor, " picks"],
    values: Float[Tensor, " picks"],
    batch: int,
    fill: float = 0.0,
) -> SparseCode:
    """Pack a flat list of picks, sorted by row, into a rectangular code.

    The width is the largest number of picks in a row. Shorter rows are padded by feature 0 with the value
    `fill`.
    """
    counts = rows.new_zeros(batch).scatter_add_(0, rows, torch.ones_like(rows))  # bincount would wait
    width = max(1, int(counts.max())) if batch else 1
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    wide_indices = rows.new_zeros(batch, width)
    wide_values = values.new_full((batch, width), fill)
    wide_indices[rows, place] = indices
    wide_values[rows, place] = values
    return SparseCode(wide_indices, wide_values)


def keep(code: SparseCode, kept: Bool[Tensor, "batch k"]) -> SparseCode:
    """Return the marked picks of a code, moved to the left, with as few zeros as padding as possible."""
    width = max(1, int(kept.sum(1).max()))
    order = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    return SparseCode(code.indices.gather(1, order), (code.values * kept).gather(1, order))


def stack_codes(codes: Sequence[SparseCode]) -> SparseCode:
    """Stack the rows of several codes. Narrower codes are padded by feature 0 with value 0."""
    width = max(code.values.shape[1] for code in codes)
    indices = [pad(code.indices, (0, width - code.indices.shape[1])) for code in codes]
    values = [pad(code.values, (0, width - code.values.shape[1])) for code in codes]
    return SparseCode(torch.cat(indices), torch.cat(values))
