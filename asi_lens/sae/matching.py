"""Features of two dictionaries, matched one to one by the cosines of their decoder rows.

The assignment is found by the auction algorithm (Bertsekas, Annals of Operations Research 14, 1988) with
epsilon scaling. Its prices bound the best total of any assignment (linear programming duality), so each
result states how far from the best it can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.base.products import exact_products

# Smallest allowed tolerance: float32 prices of a few units still change by it.
_LEAST = 1e-5
# Increments of the bids fall by this factor from phase to phase.
_FALL = 5
# Rows of scores that bid at once.
_BLOCK = 2048


@dataclass(frozen=True)
class Match:
    """Features of dictionary a, matched with those of b.

    Attributes:
        partner: feature of b of each feature of a [n]; each feature of b occurs once.
        cosine: cosine of the two decoder rows [n].
        gap: the mean of `cosine` is at most this far below that of the best assignment.
        best: mean over the features of both dictionaries of the largest cosine with any feature of the other:
            exact, not one to one, and at least the mean of the best assignment.
    """

    partner: Int[Tensor, " n"]
    cosine: Float[Tensor, " n"]
    gap: float
    best: float


@exact_products()
@torch.no_grad()
def match_features(a: Float[Tensor, "n d"], b: Float[Tensor, "n_b d_b"], *, tolerance: float = 1e-3) -> Match:
    """Match the rows of two decoders (W_dec) one to one, with the largest sum of cosines.

    Takes n^2 float32 of memory. Raises OptionError for decoders of different size or width (not every feature
    would have a partner) and as `assign`, DataError for rows that are zero or not finite.
    """
    if a.shape != b.shape:
        raise OptionError(
            f"decoders of {len(a):,} features of width {a.shape[1]} and of {len(b):,} of width {b.shape[1]} "
            "cannot be matched one to one; allowed are decoders of one size and width"
        )
    units = []
    for name, rows in (("a", a), ("b", b)):
        norms = rows.float().norm(dim=1, keepdim=True)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise DataError(f"{name} has rows that are zero or not finite; they have no cosine")
        units.append(rows.float() / norms)
    cosines = units[0] @ units[1].to(a.device).T
    partner, gap = assign(cosines, tolerance=tolerance)
    chosen = cosines.gather(1, partner[:, None])[:, 0]
    best = (cosines.amax(1).double().mean() + cosines.amax(0).double().mean()).item() / 2
    return Match(partner, chosen, gap, best)


@torch.no_grad()
def assign(scores: Float[Tensor, "n m"], *, tolerance: float = 1e-3) -> tuple[Int[Tensor, " n"], float]:
    """Return a column for each row, every column once, with a large sum of scores, and the gap to the best.

    The gap is an upper bound of (the best sum - this sum) / n, at most about `tolerance`: the
    assignment is the best one if all others are worse by more than n times the gap. Every row without a
    column bids for its best column, all at once; the highest bid wins.

    Raises OptionError for scores that are not square or a tolerance below 1e-5 or above 1, DataError for
    scores that are not finite.
    """
    n, m = scores.shape
    require(n == m and n > 0, "scores", f"of shape ({n}, {m})", "square, with a row or more")
    require(_LEAST <= tolerance <= 1, "tolerance", tolerance, f"from {_LEAST} to 1")
    if not bool(torch.isfinite(scores).all()):
        raise DataError("scores are not finite")
    scores = scores.float()
    prices = scores.new_zeros(n)
    column = torch.zeros(n, dtype=torch.int64, device=scores.device)
    if n > 1:
        step = max(tolerance, (scores.max() - scores.min()).item() / _FALL)
        while True:
            column = _auction(scores, prices, step)
            if step <= tolerance:
                break
            step = max(tolerance, step / _FALL)
    exact = prices.double()
    hopes = [(part.double() - exact).amax(1).sum() for part in scores.split(_BLOCK)]
    bound = exact.sum() + torch.stack(hopes).sum()
    reached = scores.gather(1, column[:, None]).double().sum()
    return column, max(0.0, (bound - reached).item() / n)


def _auction(scores: Float[Tensor, "n n"], prices: Float[Tensor, " n"], step: float) -> Int[Tensor, " n"]:
    """Return the columns of an auction whose bids rise by `step` or more. Changes `prices` in place."""
    n = len(scores)
    everyone = torch.arange(n, device=scores.device)
    column, owner = torch.full_like(everyone, -1), torch.full_like(everyone, -1)
    waiting = everyone
    while len(waiting):
        tops = [(scores[part] - prices).topk(2) for part in waiting.split(_BLOCK)]
        values = torch.cat([top.values for top in tops])
        wanted = torch.cat([top.indices[:, 0] for top in tops])
        bids = prices[wanted] + values[:, 0] - values[:, 1] + step
        highest = torch.full_like(prices, -torch.inf).scatter_reduce_(0, wanted, bids, "amax")
        # Of equal bids the first row wins, on every device.
        asking = torch.where(bids == highest[wanted], waiting, n)
        winner = torch.full_like(owner, n).scatter_reduce_(0, wanted, asking, "amin")
        sold = (winner < n).nonzero()[:, 0]
        before = owner[sold]
        column[before[before >= 0]] = -1
        owner[sold], column[winner[sold]] = winner[sold], sold
        prices[sold] = highest[sold]
        waiting = (column < 0).nonzero()[:, 0]
    return column
