"""Mean and second moment of a stream of activations, numerically stable and mergeable.

Each batch is centred on its own mean before its products are summed. Batches are joined with the pairwise
update of Chan, Golub and LeVeque (1983), in float64. On a CPU the products of a batch run in float32, as long
as their rounding errors move the effective rank by much less than 0.5 % (`precision`); else, and on other
devices, in float64. The error is measured: scatter times a vector of signs is also summed in float64, at a
twentieth of the cost of the products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.precision import covariance_eigenvalues, signs, tolerance
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.base.products import exact_products

# Columns of a block of the product. Only blocks on and above the diagonal are computed, which saves 3/8 of
# the work at 4 blocks, and every block is still large enough for an efficient product.
_BLOCK = 192
# Rows of a group that is summed in float32 when a mean is corrected.
_FEW = 16
# Rows whose products with a vector are summed in float64 at a time, in the cache.
_CHECKED = 64
# Sizes of values (the largest of a batch) whose products stay far from the ends of float32 and float64.
_SINGLE, _DOUBLE = (2.0**-30, 2.0**30), (2.0**-450, 2.0**450)
# Typical and least error of float32 products, as shares of the scatter's trace. The first is assumed for
# files of older versions, which did not measure it.
TYPICAL_NOISE, _LEAST = 2.0**-26, 2.0**-28


@checked
@dataclass
class Moments:
    """Running moments of rows of width `d`.

    `n`: rows seen. `mean [d]`: float64. `scatter [d d]`: float64, the sum of (x - mean)(x - mean)^T.
    `check [d]`: scatter @ signs, summed in float64; None if an older version wrote the moments.
    `limit`: largest error of the scatter for the spectrum after `limit_at` rows.
    """

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]
    check: Float[Tensor, " d"] | None = None
    limit: float = 0.0
    limit_at: int = 0

    @classmethod
    def zeros(cls, d: int, device: torch.device | str = "cpu") -> Moments:
        """Return moments of zero rows."""
        require(d >= 1, "d", d, "at least 1")
        zeros = torch.zeros(d + 2, d, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros[2:].clone(), zeros[1].clone())

    @classmethod
    def exact(cls, n: int, mean: Float[Tensor, " d"], scatter: Float[Tensor, "d d"]) -> Moments:
        """Return moments whose scatter has no rounding errors worth mention."""
        mean, scatter = mean.double(), scatter.double()
        return cls(n, mean, scatter, scatter @ signs(len(scatter), scatter.device))

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moments:
        """Return the moments of one block of rows.

        Raises DataError if a value is not finite, too large or too small, or there are no rows.
        """
        return cls.zeros(rows.shape[1], rows.device).block(rows)

    @exact_products()
    def block(self, rows: Float[Tensor, "n d"]) -> Moments:
        """Return the moments of rows, as exact as the spectrum of these moments and the rows needs.

        The result is to be merged into these moments. Raises as `of` and `update` do.
        """
        if rows.shape[1] != self.d:
            raise OptionError(
                f"rows of width {rows.shape[1]} are not allowed; these moments have width {self.d}"
            )
        if len(rows) == 0:
            raise DataError("rows is empty; moments need at least one row")
        low, high = (float(bound) for bound in rows.aminmax())
        size = max(-low, high)
        if not math.isfinite(size):
            raise DataError("activations hold NaN or infinity")
        single = rows.device.type == "cpu" and rows.dtype != torch.float64 and _fits(size, _SINGLE)
        noise = self.noise if single else math.inf
        if single and not self._is_too_inexact(noise, len(rows)):
            found = _summed(rows.float(), is_copy=rows.dtype != torch.float32)
            noise = math.hypot(noise, found.noise)
            if self.n == 0:
                found.set_limit()
                self.limit, self.limit_at = found.limit, found.limit_at
            elif noise > self.limit and self.n >= 2 * self.limit_at:
                self.set_limit()
            if noise <= self.limit:
                return found
        if not _fits(size, _DOUBLE):
            raise DataError(
                f"activations of size {size:.3g} are not allowed: their squares are too "
                f"{'large' if size > 1 else 'small'} for float64"
            )
        return _summed(rows.double(), is_copy=rows.dtype != torch.float64)

    @property
    def noise(self) -> float:
        """Frobenius norm of the scatter's error (estimated from the product with one vector)."""
        if self.check is None:
            return TYPICAL_NOISE * self.scatter.trace().item()
        found = self.scatter @ signs(self.d, self.scatter.device)
        return torch.linalg.vector_norm(found - self.check).item()

    def set_limit(self) -> None:
        """Set the largest error that these moments may have, from their eigenvalues."""
        self.limit = tolerance(covariance_eigenvalues(self.scatter))
        self.limit_at = self.n

    def _is_too_inexact(self, noise: float, n: int) -> bool:
        """Return whether products of `n` more rows in float32 are sure to exceed the limit."""
        if self.n == 0 or self.n >= 2 * self.limit_at:
            return False
        return math.hypot(noise, _LEAST * self.scatter.trace().item() * n / self.n) > self.limit

    @property
    def d(self) -> int:
        """Width of the rows."""
        return self.mean.shape[0]

    def update(self, rows: Float[Tensor, "n d"]) -> Moments:
        """Add rows in place; returns self. Raises DataError as `of` does, and changes nothing then."""
        return self.merge(self.block(rows))

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
        weight = self.n * other.n / n
        self.scatter += other.scatter
        self.scatter.addr_(delta, delta, alpha=weight)
        if self.check is not None and other.check is not None:
            self.check += other.check
            self.check += delta * (weight * (delta @ signs(self.d, delta.device)))
        else:
            self.check = None
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
        weight = n * other.n / self.n
        scatter = (self.scatter - other.scatter).addr_(delta, delta, alpha=-weight)
        check = None
        if self.check is not None and other.check is not None:
            check = self.check - other.check - delta * (weight * (delta @ signs(self.d, delta.device)))
        return Moments(n, mean, scatter, check)

    def to(self, device: torch.device | str) -> Moments:
        """Return these moments on `device`. Tensors already on that device are shared, not copied."""
        check = None if self.check is None else self.check.to(device)
        return replace(self, mean=self.mean.to(device), scatter=self.scatter.to(device), check=check)

    def clone(self) -> Moments:
        """Return a copy that later updates do not change."""
        check = None if self.check is None else self.check.clone()
        return replace(self, mean=self.mean.clone(), scatter=self.scatter.clone(), check=check)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """scatter / n. Raises DataError if no rows were counted."""
        if self.n == 0:
            raise DataError("moments without a row have no covariance")
        return self.scatter / self.n

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store. The scatter is packed as its upper triangle: half the bytes."""
        rows, columns = torch.triu_indices(self.d, self.d, device="cpu")
        state = {
            "n": torch.tensor(self.n, dtype=torch.int64, device="cpu"),
            "mean": self.mean.cpu().contiguous(),
            "scatter": self.scatter.cpu()[rows, columns].contiguous(),
        }
        if self.check is not None:
            limit = torch.tensor([self.limit, self.limit_at], dtype=torch.float64, device="cpu")
            state |= {"check": self.check.cpu().contiguous(), "limit": limit}
        return state

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        """Inverse of `state`, also of older versions. Raises DataError if shapes do not fit together."""
        if missing := {"n", "mean", "scatter"} - set(state):
            raise DataError(f"the state of moments lacks {', '.join(sorted(missing))}")
        mean, packed = state["mean"].double(), state["scatter"].double()
        d = mean.shape[0]
        if packed.shape != (d * (d + 1) // 2,):
            raise DataError(
                f"the state's scatter has {packed.numel()} numbers; width {d} needs {d * (d + 1) // 2}"
            )
        rows, columns = torch.triu_indices(d, d, device=mean.device)
        scatter = torch.zeros(d, d, dtype=torch.float64, device=mean.device)
        scatter[rows, columns] = packed
        scatter[columns, rows] = packed
        found = cls(int(state["n"]), mean, scatter)
        if "check" in state:
            found.check = state["check"].clone()
            found.limit, found.limit_at = float(state["limit"][0]), int(state["limit"][1])
        return found


def _fits(size: float, bounds: tuple[float, float]) -> bool:
    return size == 0 or bounds[0] <= size <= bounds[1]


def _summed(rows: Float[Tensor, "n d"], *, is_copy: bool) -> Moments:
    """Return the moments of one block of rows, with products in its dtype. A copy is changed."""
    n = len(rows)
    mean = rows.mean(0)
    centred = rows.sub_(mean) if is_copy else rows - mean
    # The mean has a rounding error. The rest is subtracted in float64, from sums of a few rows each: a
    # float64 copy of all rows would cost a tenth of the products.
    few, others = _few_rows(centred)
    rest = (few.sum(1).double().sum(0) + others.double().sum(0)) / n
    scatter = _gram(centred)
    z = signs(rows.shape[1], rows.device)
    if rows.dtype == torch.float64:
        check = scatter @ z
    else:
        check = torch.zeros_like(rest)
        scratch = torch.empty(_CHECKED, len(z), dtype=torch.float64, device=rows.device)
        for part in centred.split(_CHECKED):
            exact = scratch[: len(part)].copy_(part)
            check += exact.T @ (exact @ z)
    scatter.addr_(rest, rest, alpha=-n)
    check -= rest * (n * (rest @ z))
    return Moments(n, mean.double() + rest, scatter, check)


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
