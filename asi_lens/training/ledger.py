"""The one ledger of firing, from which every definition of a dead feature is read.

"Fired" means picked with a value above zero. Definitions in use:

- `dead_fraction(window)`: no firing in the last `window` tokens (the paper's; Gao et al. 2024);
- `frequency_below(f)`: fired on less than a share f of the tokens counted (frequency thresholds);
- `silent_fraction`: never fired on the tokens counted. On held-out data: `DeadnessLedger.of(codes)`.

State the window beside every number: the same features are 3 % dead by one and 10 % by another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from asi_lens.base.errors import DataError, require
from asi_lens.kernels.codes import SparseCode


class DeadnessLedger:
    """Tokens since each feature last fired, and how often it fired.

    Tokens are counted batch by batch: a feature that fired in the newest batch has 0 tokens since. One
    that never fired counts from the start, so that `dead_fraction(window)` is 0 until `window` tokens
    have been seen. An update costs time by the features that fired, not by all.

    Attributes:
        n_tokens: tokens seen. last_fired [d_sae]: `n_tokens` after the batch of the last firing, 0 for
            never. counts [d_sae]: tokens fired on since `counted_from` (`restart_counts`).
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu"):
        require(d_sae >= 1, "d_sae", d_sae, "at least 1")
        self.n_tokens = 0
        self.counted_from = 0
        self.last_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, codes: Iterable[SparseCode], d_sae: int) -> DeadnessLedger:
        """A ledger of codes of held-out data: `silent_fraction` is the share that never fired on it."""
        ledger: DeadnessLedger | None = None
        for code in codes:
            ledger = cls(d_sae, code.indices.device) if ledger is None else ledger
            ledger.update(code, code.indices.shape[0])
        if ledger is None:
            raise DataError("a ledger of no codes")
        return ledger

    def update(self, code: SparseCode, n_tokens: int | None = None) -> None:
        """Count one batch; `n_tokens` is its number of rows."""
        batch = code.indices.shape[0]
        require(n_tokens in (None, batch), "n_tokens", n_tokens, f"the batch's {batch} rows")
        fired = code.indices[code.values > 0]
        counts = torch.bincount(fired, minlength=len(self.counts))
        self.n_tokens += batch
        self.counts += counts
        self.last_fired[counts > 0] = self.n_tokens

    @property
    def tokens_since_fired(self) -> Int[Tensor, " d_sae"]:
        """Tokens since each feature last fired (since the start for one that never did)."""
        return self.n_tokens - self.last_fired

    @property
    def tokens_counted(self) -> int:
        """Tokens that `counts` covers."""
        return self.n_tokens - self.counted_from

    def dead(self, window: int) -> Int[Tensor, " n_dead"]:
        """Features silent for the last `window` tokens or more, ascending."""
        require(window >= 1, "window", window, "at least 1 token")
        return (self.last_fired <= self.n_tokens - window).nonzero().flatten()

    def dead_fraction(self, window: int) -> float:
        """Share of features silent for the last `window` tokens or more, 0 to 1."""
        return len(self.dead(window)) / len(self.last_fired)

    def frequency_below(self, frequency: float) -> float:
        """Share of features that fired on less than `frequency` of the tokens counted, 0 to 1.

        Raises DataError where none was counted.
        """
        require(0 < frequency <= 1, "frequency", frequency, "above 0 and at most 1")
        self._require_counted()
        return (self.counts < frequency * self.tokens_counted).double().mean().item()

    @property
    def silent_fraction(self) -> float:
        """Share of features that fired on none of the tokens counted, 0 to 1."""
        self._require_counted()
        return (self.counts == 0).double().mean().item()

    def restart_counts(self) -> None:
        """Count frequencies from here on; the tokens since the last firing go on."""
        self.counts.zero_()
        self.counted_from = self.n_tokens

    def _require_counted(self) -> None:
        if self.tokens_counted == 0:
            raise DataError("this ledger has counted no tokens")

    def state(self) -> dict[str, Tensor]:
        """Tensors to store."""
        tokens = torch.tensor([self.n_tokens, self.counted_from])
        return {"tokens": tokens, "last_fired": self.last_fired, "counts": self.counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Raises DataError for another number of features."""
        if state["counts"].shape != self.counts.shape:
            raise DataError(f"a ledger of {len(state['counts'])} features, not {len(self.counts)}")
        self.n_tokens, self.counted_from = state["tokens"].tolist()
        self.last_fired.copy_(state["last_fired"])
        self.counts.copy_(state["counts"])
