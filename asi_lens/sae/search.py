"""Search for the top k features of a row in fewer coordinates than d_in.

Inputs and features lie almost completely in the leading principal directions of the inputs. So the search
first computes pre-activations from the leading `r` coordinates of both and keeps `width` times k candidates
of a row. Only the candidates are scored exactly, in the weights' dtype. Values of picks are therefore exact,
but a feature of the exact top k may be missing among the candidates. Some steps (`is_due`) compare the search
with the exact search on some rows of the batch. If the candidates hold less than `LEAST_MASS` of the mass of
the exact picks, the search moves to the cheapest `r` and `width` that hold `_GOAL`. If none of these is
cheaper than the exact search, the search is exact from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.base.products import exact_products
from asi_lens.kernels import devices
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.gradients import picked_dots
from asi_lens.kernels.topk import BIAS_COLUMNS, Workspace, encode_topk, merge_topk, with_ones
from asi_lens.sae.dictionary import SparseAutoencoder

SEARCHES = ("exact", "subspace")
"""exact: score every feature in all coordinates. subspace: score candidates from the leading coordinates."""
LEAST_MASS = 0.999
"""Share of the mass (sum of values) of the exact picks that the search must find."""
# The share that a new choice must hold, above LEAST_MASS so that the next measurement is not below it again.
_GOAL = 0.9995
_MEASURE_EVERY = 100
_MEASURED_ROWS = 256
# Features whose coordinates are computed at a time on a CPU. An accelerator takes as many as fit into its
# scratch memory, since every block costs several launches.
_REFRESHED = 2048
# Choices of the search: multiples of this number of coordinates, and numbers of candidates for each pick.
_COORDINATES, _WIDTHS = 32, (2, 4, 8)
# Cost of a candidate's multiply-add (including fetching and ranking its row) relative to a multiply-add of a
# matrix product, which is faster in bfloat16. It sets the order of choices, and when to use the exact search.
_CANDIDATE, _CANDIDATE_BF16 = 24, 100


def is_due(steps: int) -> bool:
    """Return whether the search is measured after `steps` steps: often at first, when weights change most."""
    return steps % _MEASURE_EVERY == 0 or steps & (steps - 1) == 0


class SubspaceSearch:
    """A search in the leading coordinates for the picks of `sae`, and its measured quality.

    Attributes:
        sae: the dictionary. dtype: dtype of products over all features.
        r: number of coordinates; d_in for an exact search. width: candidates for each of the k picks.
        mass, picks: shares of the exact picks' mass and number that the last measurement found.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        directions: Float[Tensor, "d_in d_in"],
        batch_size: int,
        dtype: torch.dtype,
    ):
        """`directions` are the inputs' principal directions as columns, largest first. The cost of the
        features' coordinates is shared by `batch_size` rows. The search starts with the cheapest choice."""
        self.sae, self.dtype, self.batch_size = sae, dtype, batch_size
        self.directions = directions
        self.r, self.width = self._choices()[0]
        self.mass = self.picks = math.nan
        self._rows: Tensor | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the search is exact from now on."""
        return self.r == len(self.directions)

    def refresh(self, moved: Int[Tensor, " n"] | None = None) -> None:
        """Recompute the coordinates of the encoder's rows: of all rows, or of the rows `moved`."""
        encoder = self.sae.encoder_rows
        if self.is_exact:
            self._rows = None
            return
        width = self.r + BIAS_COLUMNS
        if self._rows is None or self._rows.shape[1] != width:
            self._rows, moved = encoder.new_zeros(len(encoder), width, dtype=self.dtype), None
        if moved is not None and 2 * len(moved) > len(encoder):
            moved = None
        size = _REFRESHED
        if not devices.is_host(encoder.device):
            size = max(1, devices.scratch_bytes(encoder.device) // encoder[0].numel() // self.dtype.itemsize)
        for first in range(0, len(encoder if moved is None else moved), size):
            few = slice(first, first + size)
            part = few if moved is None else moved[few]
            self._rows[part, : self.r] = self._leading(encoder[part])
            self._rows[part, self.r] = self.sae.b_enc.data[part].to(self.dtype)

    def code(self, x: Float[Tensor, "batch d_in"], workspace: Workspace | None = None) -> SparseCode:
        """Return the code TopK(ReLU(x W + b)) of centered rows."""
        encoder, bias, k = self.sae.encoder_rows, self.sae.b_enc.data, self.sae.k
        if self.is_exact:
            return encode_topk(x.to(self.dtype), encoder, bias, k, workspace=workspace)
        if self._rows is None:
            self.refresh()
        assert self._rows is not None
        leading = with_ones(self._leading(x))
        found = encode_topk(leading, self._rows, None, self.width * k, workspace=workspace)
        exact = picked_dots(x, encoder, found.indices) + bias[found.indices]
        best = merge_topk([SparseCode(found.indices, exact)], k)
        return SparseCode(best.indices, best.values.relu())

    @exact_products()
    def measure(self, x: Float[Tensor, "batch d_in"]) -> str | None:
        """Compare with the exact search on some rows, and widen the search until it finds enough mass.

        If no cheaper choice finds enough, the search becomes exact. Returns the change in words, or None.
        """
        if self.is_exact:
            self.mass = self.picks = 1.0
            return None
        rows = x[:_MEASURED_ROWS]
        exact = encode_topk(rows, self.sae.encoder_rows, self.sae.b_enc.data, self.sae.k)
        self._compare(self.code(rows), exact)
        if self.mass >= LEAST_MASS:
            return None
        said = f"search in {self.r} coordinates, {self.width} k candidates: {self.mass:.2%} of the mass"
        choices = self._choices()
        for choice in choices[choices.index((self.r, self.width)) + 1 : -1]:
            self.r, self.width = choice
            self.refresh()
            self._compare(self.code(rows), exact)
            if self.mass >= _GOAL:
                return f"{said}; now {self.r}, {self.width} k: {self.mass:.2%}"
        self.r, self.width = choices[-1]
        self.refresh()
        self.mass = self.picks = 1.0
        return f"{said}; exact from here on"

    def _compare(self, found: SparseCode, exact: SparseCode) -> None:
        total = exact.values.sum(dtype=torch.float64)
        if not bool(total > 0):
            self.mass = self.picks = 1.0  # no feature fires
            return
        self.mass = (found.values.sum(dtype=torch.float64) / total).item()
        fires = exact.values > 0
        there = (exact.indices.unsqueeze(2) == found.indices.unsqueeze(1)).any(2)
        self.picks = ((there & fires).sum() / fires.sum()).item()

    def _choices(self) -> list[tuple[int, int]]:
        """Return pairs (coordinates, candidates for each pick), cheapest first. The last pair is exact."""
        d, n, batch = len(self.directions), self.sae.d_sae, self.batch_size
        candidate = _CANDIDATE_BF16 if self.dtype == torch.bfloat16 else _CANDIDATE
        costs = {
            # Cost of a row of the batch: products with all features, the row's share of the features'
            # coordinates, and the candidates' scores.
            (r, width): n * r * (1 + d / batch) + candidate * width * self.sae.k * d
            for r in range(_COORDINATES, d, _COORDINATES)
            for width in _WIDTHS
        }
        return [*(choice for choice in sorted(costs, key=costs.__getitem__) if costs[choice] < n * d), (d, 1)]

    def _leading(self, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n r"]:
        return rows.to(self.dtype) @ self.directions[:, : self.r].to(self.dtype)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores."""
        found = torch.tensor([self.mass, self.picks], dtype=torch.float64, device="cpu")
        return {"shape": torch.tensor([self.r, self.width], device="cpu"), "found": found}

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Restore the tensors of `state`; coordinates are computed when they are needed."""
        self.r, self.width = read("shape").tolist()
        self.mass, self.picks = read("found").tolist()
        self._rows = None
