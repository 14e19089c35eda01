"""Massive activations: a few tokens whose rows dwarf all others (Sun et al. 2024, arXiv 2402.17762).

In many models an attention sink moves from position 0 to another token of some sequences. Its rows are
hundreds of times longer than others, so a handful of them decides mean, spectrum and reconstruction error of
a site. They are left out of statistics and stores, as position 0 is.

A row is massive if its largest entry exceeds 1,000 times the median magnitude of the entries of its sequence
(the criterion of Sun et al., without their bound of 100, which depends on the model's units), and its norm
exceeds 10 times the median norm of the sequence's rows. The second condition spares sites whose entries are
heavy-tailed in every row, such as the hidden units of a gated MLP. The decision depends on the activations of
the row's own sequence and nothing else, so it is the same for every batch size, number of processes, resumed
pass, and amount of text.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAGNITUDE = 1000.0
"""Largest entry of a massive row, in medians of the magnitudes of its sequence (Sun et al. 2024)."""
NORM = 10.0
"""Norm of a massive row, in median norms of its sequence."""
# Positions from which the median magnitude is taken, spread evenly over the sequence.
_POSITIONS = 16


def massive_rows(
    activation: Float[Tensor, "batch position d"],
) -> tuple[Bool[Tensor, "batch position"], Float[Tensor, "batch position"]]:
    """Return which rows are massive, and each row's largest magnitude (not finite where an entry is not).

    The median magnitude is that of 16 positions, evenly spaced, of each sequence. A sequence whose median
    magnitude is zero has no massive rows.
    """
    # The infinity norm needs no second array of magnitudes.
    peak = torch.linalg.vector_norm(activation, float("inf"), dim=-1).float()
    stride = max(1, activation.shape[1] // _POSITIONS)
    some = activation[:, stride - 1 :: stride].abs().flatten(1)
    typical = some.float().median(dim=1, keepdim=True).values
    found = (peak > MAGNITUDE * typical) & (typical > 0)
    hit = found.any(1).nonzero().flatten()
    if len(hit):
        norms = torch.linalg.vector_norm(activation[hit].float(), dim=-1)
        found[hit] &= norms > NORM * norms.median(dim=1, keepdim=True).values
    return found, peak
