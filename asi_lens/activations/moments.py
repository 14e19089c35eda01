"""Mean and second moment of a stream of activations, numerically stable and mergeable.

Each batch is centred on its own mean before its products are summed. Batches are joined with the pairwise
update of Chan, Golub and LeVeque (1983). Products run in float32 (activations are not more precise), sums
over batches in float64; `tests/activations/test_moments.py` compares the result with float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import DataError, OptionError, require

# Columns of a block of the product. Only blocks on and above the diagonal are computed, which saves 3/8 of
# the work at 4 blocks, and every block is still large enough for an efficient product.
_BLOCK = 192
# Rows of a group that is summed in float32 when a mean is corrected.
_FEW = 16


@dataclass
class Moments:
    """Running moments of rows of width `d`.

    `n`: rows seen. `mean [d]`: float64. `scatter [d d]`: float64, the sum of (x - mean)(x - mean)^T.
    """

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def zeros(cls, d: int, device: torch.device | str = "cpu") -> Moments:
        """Return moments of zero rows."""
        require(d >= 1, "d", d, "at least 1")
        return cls(
            0,
            torch.zeros(d, dtype=torch.float64, device=device),
            torch.zeros(d, d, dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moments:
        """Return the moments of one block of rows (float64 rows are computed in float64).

        Raises DataError if a value is not finite or there are no rows.
        """
        n = rows.shape[0]
        if n == 0:
            raise DataError("moments of no rows")
        wide = rows if rows.dtype == torch.float64 else rows.float()
        mean = wide.mean(0)
        centred = wide - mean if wide is rows else wide.sub_(mean)
        # The float32 mean has a rounding error. The rest is subtracted in float64, from sums of a few rows
        # each: a float64 copy of all rows would cost a tenth of the products.
        few, others = _few_rows(centred)
        rest = (few.sum(1).double().sum(0) + others.double().sum(0)) / n
        if not torch.isfinite(rest).all():
            raise DataError("activations hold NaN or infinity")
        scatter = _gram(centred)
        scatter.addr_(rest, rest, alpha=-n)
        return cls(n, mean.double() + rest, scatter)

    @property
    def d(self) -> int:
        """Width of the rows."""
        return self.mean.shape[0]

    def update(self, rows: Float[Tensor, "n d"]) -> Moments:
        """Add rows in place; returns self. Raises DataError if a value is not finite."""
        if rows.shape[1] != self.d:
            raise OptionError(f"rows are {rows.shape[1]} wide, these moments {self.d}")
        return self.merge(Moments.of(rows))

    def merge(self, other: Moments) -> Moments:
        """Add the moments of other rows in place; returns self.

        The result does not depend on how the rows were split (up to float64 rounding), so different
        processes may count parts of a corpus.
        """
        if other.d != self.d:
            raise OptionError(f"cannot merge moments of width {other.d} into width {self.d}")
        if other.n == 0:
            return self
        n = self.n + other.n
        delta = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(delta, delta, alpha=self.n * other.n / n)
        self.mean += delta * (other.n / n)
        self.n = n
        return self

    def without(self, other: Moments) -> Moments:
        """Return the moments of these rows without those that `other` counts, which must be among them.

        The inverse of `merge`, up to float64 rounding: rows far longer than those left cost precision.
        """
        n = self.n - other.n
        if other.d != self.d or n < 1:
            raise OptionError(
                f"cannot take {other.n} rows of width {other.d} from {self.n} of width {self.d}"
            )
        mean = (self.mean * self.n - other.mean * other.n) / n
        delta = other.mean - mean
        scatter = self.scatter - other.scatter
        return Moments(n, mean, scatter.addr_(delta, delta, alpha=-n * other.n / self.n))

    def to(self, device: torch.device | str) -> Moments:
        """Return these moments on `device`. Tensors already on that device are shared, not copied."""
        return Moments(self.n, self.mean.to(device), self.scatter.to(device))

    def clone(self) -> Moments:
        """Return a copy that later updates do not change."""
        return Moments(self.n, self.mean.clone(), self.scatter.clone())

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """scatter / n. Raises DataError if no rows were counted."""
        if self.n == 0:
            raise DataError("moments of no rows have no covariance")
        return self.scatter / self.n

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store. The scatter is packed as its upper triangle: half the bytes."""
        rows, columns = torch.triu_indices(self.d, self.d)
        return {
            "n": torch.tensor(self.n, dtype=torch.int64),
            "mean": self.mean.cpu().contiguous(),
            "scatter": self.scatter.cpu()[rows, columns].contiguous(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        """Inverse of `state`. Raises DataError if shapes do not fit together."""
        mean, packed = state["mean"].double(), state["scatter"].double()
        d = mean.shape[0]
        if packed.shape != (d * (d + 1) // 2,):
            raise DataError(f"scatter of {packed.numel()} numbers does not belong to width {d}")
        rows, columns = torch.triu_indices(d, d)
        scatter = torch.zeros(d, d, dtype=torch.float64)
        scatter[rows, columns] = packed
        scatter[columns, rows] = packed
        return cls(int(state["n"]), mean, scatter)


def _few_rows(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "sums few d"], Float[Tensor, "rest d"]]:
    """Return all rows as groups of `_FEW` rows, and the rows left over."""
    whole = len(rows) // _FEW * _FEW
    return rearrange(rows[:whole], "(sums few) d -> sums few d", few=_FEW), rows[whole:]


def _gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Return rows^T rows in float64, computed from the upper triangle of blocks."""
    d = rows.shape[1]
    out = torch.empty(d, d, dtype=torch.float64, device=rows.device)
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        block = rows[:, start:stop].T @ rows[:, start:]
        out[start:stop, start:] = block
        out[stop:, start:stop] = block[:, stop - start :].T
    return out
