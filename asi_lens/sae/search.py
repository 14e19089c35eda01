"""The top k features of a row, searched in fewer coordinates than d_in.

Inputs and features lie almost wholly in the leading principal directions of the inputs. So pre-activations
are first computed from the leading `r` coordinates of both, `width` times k candidates a row are kept, and
only those are scored exactly, in the weights' dtype. What a pick is worth is never approximated; what may
happen is that one of the k largest is no candidate. How often it does is measured every `MEASURE_EVERY` steps
on some rows of the batch, against the exact search: where candidates hold less than `LEAST_MASS` of the mass
of the exact picks, the search takes more candidates, then more coordinates, and where that would no longer be
cheaper it gives up and is exact from there on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.sparse_ops import SparseCode, Workspace, encode_topk, merge_topk, picked_dots

SEARCHES = ("exact", "subspace")
"""Every feature in all coordinates; candidates from the leading ones."""
LEAST_MASS = 0.999
"""Share of the mass (sum of values) of the exact picks that the search must find."""
MEASURE_EVERY = 100
"""Steps between two measurements of what it finds."""
_MEASURED_ROWS = 256
_FIRST_WIDTH, _LAST_WIDTH = 2, 4
# Coordinates are added in such steps; with more than this share of all of them nothing is gained.
_COORDINATES, _LARGEST_SHARE = 32, 0.67


class SubspaceSearch:
    """A search in the leading coordinates for the picks of `sae`, and how it does.

    Attributes:
        sae: the dictionary. dtype: of products over all of its features.
        r: coordinates; d_in where it has given up. width: candidates for each of the k picks.
        mass, picks: shares of the exact picks' mass, and of themselves, found when it was last measured.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        directions: Float[Tensor, "d_in d_in"],
        r: int,
        dtype: torch.dtype,
        *,
        tell: Callable[[str], None],
    ):
        """`directions` are the inputs' principal ones as columns, largest first; `r` to begin with."""
        self.sae, self.dtype = sae, dtype
        self.directions = directions
        self.width = _FIRST_WIDTH
        self.r = self._allowed(r)
        self.mass = self.picks = math.nan
        self._tell = tell
        self._rows: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether it has given up."""
        return self.r == len(self.directions)

    def refresh(self, moved: Int[Tensor, " n"] | None = None) -> None:
        """Take the coordinates of the encoder's rows anew: of all, or of those that moved."""
        encoder = self.sae.encoder_rows
        if self.is_exact:
            self._rows = None
        elif self._rows is None or moved is None or 2 * len(moved) > len(encoder):
            self._rows = self._leading(encoder)
        else:
            self._rows[moved] = self._leading(encoder[moved])

    def code(self, x: Float[Tensor, "batch d_in"], workspace: Workspace | None = None) -> SparseCode:
        """TopK(ReLU(x W + b)) of centered rows."""
        encoder, bias, k = self.sae.encoder_rows, self.sae.b_enc.data, self.sae.k
        if self.is_exact:
            return encode_topk(x.to(self.dtype), encoder, bias, k, workspace=workspace)
        if self._rows is None:
            self.refresh()
        assert self._rows is not None
        found = encode_topk(self._leading(x), self._rows, bias, self.width * k, workspace=workspace)
        exact = picked_dots(x, encoder, found.indices) + bias[found.indices]
        best = merge_topk([SparseCode(found.indices, exact)], k)
        return SparseCode(best.indices, best.values.relu())

    def measure(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Compare with the exact search on some rows; widen until it finds enough, or give up."""
        rows = x[:_MEASURED_ROWS]
        exact = encode_topk(rows, self.sae.encoder_rows, self.sae.b_enc.data, self.sae.k)
        while not self.is_exact:
            self._compare(self.code(rows), exact)
            if self.mass >= LEAST_MASS:
                return
            said = f"search in {self.r} coordinates, {self.width} k candidates: {self.mass:.2%} of the mass"
            self._widen()
            self.refresh()
            now = "exact from here on" if self.is_exact else f"now {self.r}, {self.width} k"
            self._tell(f"{said}; {now}")
        self.mass = self.picks = 1.0

    def _compare(self, found: SparseCode, exact: SparseCode) -> None:
        total = exact.values.sum(dtype=torch.float64)
        if not bool(total > 0):
            self.mass = self.picks = 1.0  # nothing to be found
            return
        self.mass = (found.values.sum(dtype=torch.float64) / total).item()
        fires = exact.values > 0
        there = (exact.indices.unsqueeze(2) == found.indices.unsqueeze(1)).any(2)
        self.picks = ((there & fires).sum() / fires.sum()).item()

    def _widen(self) -> None:
        """More candidates first, which cost little, then coordinates."""
        if self.width < _LAST_WIDTH:
            self.width *= 2
        else:
            self.r = self._allowed(self.r + _COORDINATES)

    def _allowed(self, r: int) -> int:
        """Whole steps of coordinates, or all of them where a search would gain nothing."""
        d, rounded = len(self.directions), -(-r // _COORDINATES) * _COORDINATES
        return rounded if rounded <= _LARGEST_SHARE * d else d

    def _leading(self, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n r"]:
        return (rows @ self.directions[:, : self.r].to(rows)).to(self.dtype)

    def state(self) -> dict[str, Tensor]:
        """Tensors to store."""
        found = torch.tensor([self.mass, self.picks], dtype=torch.float64)
        return {"shape": torch.tensor([self.r, self.width]), "found": found}

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """The inverse of `state`; coordinates are taken when they are needed."""
        self.r, self.width = read("shape").tolist()
        self.mass, self.picks = read("found").tolist()
        self._rows = None
