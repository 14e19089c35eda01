"""Counts of firings, from which every definition of a dead feature is computed.

"Fired" means picked with a value above zero. Definitions in use:

- `dead_fraction(window)`: share without a firing in the last `window` tokens (the paper's; Gao et al. 2024);
- `silent_fraction`: share that never fired, the measure for held-out data.

State the window beside every number: the same features are 3 % dead by one window and 10 % by another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from asi_lens.base.errors import DataError, require
from asi_lens.kernels.codes import SparseCode


class DeadnessLedger:
    """Tokens since each feature last fired, and how often it fired.

    Tokens are counted batch by batch: a feature that fired in the newest batch has 0 tokens since. A feature
    that never fired counts from the start, so `dead_fraction(window)` is 0 until `window` tokens have been
    seen. The time of an update grows with the features that fired, not with all features.

    Attributes:
        n_tokens: tokens seen. last_fired [d_sae]: `n_tokens` after the batch of the last firing, 0 for
            never. counts [d_sae]: number of tokens that the feature fired on.
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu"):
        require(d_sae >= 1, "d_sae", d_sae, "at least 1")
        self.n_tokens = 0
        self.last_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def fired(self, code: SparseCode) -> Int[Tensor, " d_sae"]:
        """Return on how many tokens of a batch each feature fired."""
        counts, indices = torch.zeros_like(self.counts), code.indices.flatten()
        return counts.scatter_add_(0, indices, (code.values > 0).flatten().to(counts.dtype))

    def update(self, code: SparseCode, fired: Int[Tensor, " d_sae"] | None = None) -> None:
        """Count one batch. `fired` is the result of the method of that name, if it is there already."""
        fired = self.fired(code) if fired is None else fired
        self.n_tokens += len(code.indices)
        self.counts += fired
        self.last_fired.masked_fill_(fired > 0, self.n_tokens)

    def dead_after(self, fired: Int[Tensor, " d_sae"], n: int, window: int) -> Int[Tensor, ""]:
        """Return how many features `dead(window)` will hold after an update by `n` tokens, on the device."""
        return ((fired == 0) & (self.last_fired <= self.n_tokens + n - window)).sum()

    def dead(self, window: int) -> Int[Tensor, " n_dead"]:
        """Return the features silent for the last `window` tokens or more, ascending."""
        require(window >= 1, "window", window, "at least 1 token")
        return (self.last_fired <= self.n_tokens - window).nonzero().flatten()

    def dead_fraction(self, window: int) -> float:
        """Return the share of features silent for the last `window` tokens or more, 0 to 1."""
        return len(self.dead(window)) / len(self.last_fired)

    @property
    def silent_fraction(self) -> float:
        """Share of features that never fired, 0 to 1. Raises DataError if no tokens were counted."""
        if self.n_tokens == 0:
            raise DataError("the ledger has not counted any tokens")
        return (self.counts == 0).double().mean().item()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store."""
        # The checkpoint format has a field for the token at which counting began, which is always 0.
        tokens = torch.tensor([self.n_tokens, 0], device="cpu")
        return {"tokens": tokens, "last_fired": self.last_fired, "counts": self.counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`. Raises DataError for another number of features."""
        if state["counts"].shape != self.counts.shape:
            raise DataError(
                f"the stored ledger has {len(state['counts'])} features, but this one has {len(self.counts)}"
            )
        self.n_tokens = int(state["tokens"][0])
        self.last_fired.copy_(state["last_fired"])
        self.counts.copy_(state["counts"])
