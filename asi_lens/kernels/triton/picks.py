"""The picks of a batch, sorted by feature and shared out among programs, without a wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.triton.plan import PIECE, n_pieces


class Picks(NamedTuple):
    """Picks that fired, sorted by feature. A slot is a feature that the update visits.

    The shapes depend on the number of picks alone, not on how many features fired: `n_slots` and `n_pieces`
    say how much is in use.
    """

    rows: Int[Tensor, " picks"]
    """Row of the batch of each pick."""
    values: Float[Tensor, " picks"]
    features: Int[Tensor, " slots"]
    """Feature of each slot, ascending."""
    offsets: Int[Tensor, " bounds"]
    """Where the picks of each slot begin, and the last ones end."""
    n_slots: Int[Tensor, " one"]
    first_piece: Int[Tensor, " slots"]
    """First piece of each slot that has more than `PIECE` picks."""
    slots: Int[Tensor, " pieces"]
    """Slot of each piece."""
    begins: Int[Tensor, " pieces"]
    """Where the picks of each piece begin."""
    n_pieces: Int[Tensor, " one"]


def sort_picks(code: SparseCode, n: int, *, dense: bool, piece: int = PIECE) -> Picks:
    """Return the picks of a code over n features that fired (value above zero), sorted by feature.

    If `dense`, every feature has a slot; else every feature that fired. The sort is stable, so sums over
    picks run in the same order every time.
    """
    values, device = code.values.flatten(), code.values.device
    # Picks that did not fire sort behind all features.
    features, order = torch.where(values > 0, code.indices.flatten(), n).sort(stable=True)
    count = len(features)
    if dense:
        of_slot = torch.arange(n, dtype=torch.int32, device=device)
        offsets = torch.searchsorted(features, _first(n + 1, device), out_int32=True)
        n_slots = torch.full((1,), n, dtype=torch.int32, device=device)
    else:
        new = torch.ones_like(features)
        new[1:] = features[1:] != features[:-1]
        slot = new.cumsum(0, dtype=torch.int32) - 1
        offsets = torch.searchsorted(slot, _first(min(count, n + 1) + 1, device), out_int32=True)
        of_slot = features[offsets[:-1].clamp(max=count - 1)]
        n_slots = slot[-1:] + 1 - (features[-1:] == n).int()
    many = (offsets[1:] - offsets[:-1] + piece - 1).div(piece, rounding_mode="floor")
    # Also the picks that did not fire would be in pieces.
    pieces = torch.where((many > 1) & (of_slot < n), many, 0)
    last = pieces.cumsum(0, dtype=torch.int32)
    number = _first(n_pieces(count, piece), device)
    slots = torch.searchsorted(last, number, right=True, out_int32=True).clamp_(max=len(of_slot) - 1)
    return Picks(
        rows=order.div(code.values.shape[1], rounding_mode="floor").int(),
        values=values[order],
        features=of_slot,
        offsets=offsets,
        n_slots=n_slots,
        first_piece=last - pieces,
        slots=slots,
        begins=offsets[slots] + (number - (last - pieces)[slots]) * piece,
        n_pieces=last[-1:],
    )


def _first(n: int, device: torch.device) -> Int[Tensor, " n"]:
    return torch.arange(n, dtype=torch.int32, device=device)
