"""Stores seen through an affine map: x' = (x - center) M, without a copy; and maps that change the spectrum.

A shaped store has x' = (x - mean) V diag(gains) V^T, V the principal directions. Its texts and its sparse
content are those of the store; only the variances along V differ. Whitening is the power 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.activations.moments import Moments
from asi_lens.activations.spectrum import Spectrum
from asi_lens.activations.store import ActivationStore, ReadRows
from asi_lens.base.errors import DataError, require


class LinearStore(ActivationStore):
    """Rows (x - center) M of a store, computed as they are read.

    Attributes:
        of: the store. matrix: M [d r], float64. center [d]: float64.
    """

    def __init__(self, of: ActivationStore, matrix: Float[Tensor, "d r"], center: Float[Tensor, " width"]):
        """Raises OptionError for a matrix or a center of another width than the store."""
        require(matrix.shape[0] == of.d, "matrix", f"of {matrix.shape[0]} rows", f"of {of.d} rows")
        require(center.shape == (of.d,), "center", tuple(center.shape), f"of shape ({of.d},)")
        self.of, self.matrix, self.center = of, matrix.double().cpu(), center.double().cpu()
        scatter = self.matrix.T @ of.moments.scatter.to(self.matrix) @ self.matrix
        mean = (of.mean.to(self.matrix) - self.center) @ self.matrix
        moments = Moments.exact(of.n, mean, scatter)
        square = scatter.diagonal().sum().item() / of.n
        empty = torch.empty(0, self.matrix.shape[1], dtype=torch.float32, device=of.parts[0].device)
        super().__init__([empty], lambda: moments, mean, square, of.metadata, left_out=lambda: of.left_out)
        self.n = of.n
        self._shift, self._map = self.center.float(), self.matrix.float()

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint that changes with the rows, the matrix and the center."""
        digest = hashlib.sha256(self.of.fingerprint.encode())
        for part in (self.matrix, self.center):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def in_order(self, batch_size: int) -> Iterator[Float[Tensor, "batch r"]]:
        """Yield all rows once, in order."""
        return (self._mapped(part.float()) for part in self.of.in_order(batch_size))

    def _read(self, index: Int[Tensor, " batch"]) -> ReadRows:
        return self.of._read(index)

    @property
    def _stored(self) -> Sequence[Float[Tensor, "n_i width"]]:
        return self.of._stored

    def _seen(self, stored: Float[Tensor, "batch width"], dtype: torch.dtype | None) -> Tensor:
        return self._mapped(self.of._seen(stored, torch.float32)).to(dtype or self.dtype)

    def _mapped(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
        # They move once: the batches of a training lie on one device.
        self._shift, self._map = self._shift.to(rows), self._map.to(rows)
        return (rows - self._shift) @ self._map


class ShapedStore(LinearStore):
    """Rows (x - mean) V diag(gains) V^T, with mean and V of `spectrum`.

    Attributes:
        gains [d]: factors along the principal directions. inverse [d d]: V diag(1 / gains) V^T.
    """

    def __init__(self, of: ActivationStore, gains: Float[Tensor, " d"], spectrum: Spectrum | None = None):
        """`spectrum`: whose mean and directions are taken; by default the store's own. Held-out rows take the
        training store's. Raises OptionError for gains that are not finite and above zero."""
        self.base = of.spectrum if spectrum is None else spectrum
        good = gains.shape == (of.d,) and bool((torch.isfinite(gains) & (gains > 0)).all())
        require(good, "gains", tuple(gains.shape), f"{of.d} finite numbers above 0")
        self.gains = gains.double().cpu()
        V = self.base.eigenvectors.cpu()
        super().__init__(of, (V * self.gains) @ V.T, self.base.mean)
        self.inverse = (V / self.gains) @ V.T

    @cached_property
    def spectrum(self) -> Spectrum:
        """Spectrum with the directions of the base in their order, also where variances are equal.

        For a store shaped by another store's spectrum, that of its own rows.
        """
        if self.base is not self.of.spectrum:
            return super().spectrum
        values = self.base.eigenvalues.cpu() * self.gains.square()
        found = Spectrum(values, self.mean, self.n, lambda: self.moments.covariance, name=self.base.name)
        found.eigenvectors = self.base.eigenvectors
        return found


def power_gains(spectrum: Spectrum, power: float | int) -> Float[Tensor, " d"]:
    """Return gains that raise every eigenvalue l to l^power, times a factor that keeps the total variance.

    1 changes nothing, 0 whitens, above 1 collapses further. Raises DataError for a power below 1 and a
    spectrum with directions of zero variance, as in a sample with fewer rows than dimensions.
    """
    require(0 <= power <= 4, "power", power, "from 0 to 4")
    values = spectrum.eigenvalues.double().cpu()
    zero = int((values <= 0).sum())
    if power < 1 and zero:
        raise DataError(
            f"{spectrum.name or 'the site'}: {zero} of {spectrum.d} directions have zero variance and cannot "
            f"be whitened (n={spectrum.n:,} rows); take more text, or a power of 1 or more"
        )
    # With 0 ** 0 excluded above, directions without variance have gain 0 ** (positive), replaced by 1.
    gains = torch.where(values > 0, values.clamp_min(1e-300) ** ((power - 1) / 2), 1.0)
    return _same_variance(values, gains)


def flat_head_gains(spectrum: Spectrum, share: float | int = 0.1) -> Float[Tensor, " d"]:
    """Return gains that lower the leading `share` of the eigenvalues to the next one (same total)."""
    values, cut = _cut(spectrum, share)
    gains = torch.ones_like(values)
    gains[:cut] = (values[cut] / values[:cut]).sqrt()
    return _same_variance(values, gains)


def lifted_tail_gains(spectrum: Spectrum, share: float | int = 0.5) -> Float[Tensor, " d"]:
    """Return gains that raise the last `share` of the eigenvalues to the one before (same total)."""
    values, cut = _cut(spectrum, 1 - share)
    gains = torch.ones_like(values)
    gains[cut:] = (values[cut - 1] / values[cut:]).sqrt()
    return _same_variance(values, gains)


def _cut(spectrum: Spectrum, share: float | int) -> tuple[Float[Tensor, " d"], int]:
    """Return the eigenvalues, and the number of them in the leading `share`."""
    require(0 < share < 1, "share", share, "between 0 and 1")
    values = spectrum.eigenvalues.double().cpu()
    if not bool((values > 0).all()):
        raise DataError(
            f"{spectrum.name or 'the site'} has directions of zero variance, which no gain can lift"
        )
    return values, min(spectrum.d - 1, max(1, round(share * spectrum.d)))


def _same_variance(values: Float[Tensor, " d"], gains: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    return gains * (values.sum() / (values * gains.square()).sum()).sqrt()
