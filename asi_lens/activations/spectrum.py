"""Spectra of centred activations: effective rank, related ranks, and the active subspace.

Definitions follow Roy and Vetterli (2007) for the effective rank and arXiv 2508.16929 for its use on
attention outputs. Notation: s_i are the singular values of the centred rows X [n d], l_i = s_i^2 / n the
eigenvalues of their covariance.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.moments import Moments
from asi_lens.activations.precision import (
    MOST_UNCERTAIN,
    covariance_eigenvalues,
    entropy_rank,
    few_threads,
    uncertainty,
)
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, require
from asi_lens.base.facts import facts_html

# With fewer rows per dimension the measured rank is visibly below its limit.
ROWS_PER_DIMENSION = 20
# Relative rounding of a float32 activation.
_ROUNDING = torch.finfo(torch.float32).eps


class FewTokensWarning(UserWarning):
    """Fewer than 20 d rows: the effective rank is biased downwards."""


@checked
class Spectrum:
    """Eigenvalues of the covariance of centred activations, with ranks and subspaces computed from them.

    `eigenvalues [d]`: descending, float64 (variances, in squared activation units). `mean [d]`: the mean
    activation, float64. `n`: rows (tokens) counted. `d`: width. `left_out`: tokens with massive activations
    that were not counted (`massive`). `rank_with_massive`: effective rank over d with these tokens counted;
    None if there are none, or if it was not measured. Eigenvectors are computed on first use.
    """

    def __init__(
        self,
        eigenvalues: Float[Tensor, " d"],
        mean: Float[Tensor, " d"],
        n: int,
        covariance: Float[Tensor, "d d"] | Callable[[], Float[Tensor, "d d"]],
        *,
        name: str = "",
        left_out: int = 0,
        rank_with_massive: float | None = None,
        noise: float = 0.0,
    ):
        """`noise` is the Frobenius norm of the covariance's rounding error."""
        self.eigenvalues = eigenvalues
        self.mean = mean
        self.n = n
        self.name = name
        self.left_out = left_out
        self.rank_with_massive = rank_with_massive
        self.noise = noise
        # A spectrum read from disk loads its covariance only when directions are asked for.
        self._covariance = covariance

    @classmethod
    def from_moments(cls, moments: Moments, *, name: str = "", left_out: int = 0) -> Spectrum:
        """Return the spectrum of accumulated moments. Raises DataError if they are not finite."""
        covariance, noise = moments.covariance, moments.noise / moments.n
        values = covariance_eigenvalues(covariance)
        options = {"name": name, "left_out": left_out, "noise": noise}
        return cls(values, moments.mean, moments.n, covariance, **options)  # type: ignore[arg-type]

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], *, name: str = "") -> Spectrum:
        """Return the spectrum of rows in memory; warns if there are few rows (FewTokensWarning).

        Raises DataError if a value is not finite.
        """
        spectrum = cls.from_moments(Moments.of(rows), name=name)
        warn_if_few([spectrum])
        return spectrum

    @property
    def d(self) -> int:
        """Width of the site."""
        return self.eigenvalues.shape[0]

    @property
    def is_few(self) -> bool:
        """Whether there are fewer than 20 rows per dimension, so that the rank is biased downwards."""
        return self.n < ROWS_PER_DIMENSION * self.d

    @cached_property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Covariance of the centred rows, float64."""
        return self._covariance() if callable(self._covariance) else self._covariance

    @cached_property
    def eigenvectors(self) -> Float[Tensor, "d d"]:
        """Principal directions as columns, in the order of the eigenvalues, float64."""
        with few_threads(self.d):
            vectors = torch.linalg.eigh(self.covariance, UPLO="U").eigenvectors.flip(1)
        # An eigenvector's sign is arbitrary. Its largest entry is made positive, so that runs agree.
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        return vectors * signs

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the mean, any eigenvalue, and a covariance given as a tensor.

        One that is loaded when it is asked for is known by its eigenvalues.
        """
        parts = [self.mean, self.eigenvalues]
        if not callable(self._covariance):
            parts.append(self._covariance)
        content = b"".join(part.cpu().numpy().tobytes() for part in parts)
        return hashlib.sha256(content).hexdigest()[:16]

    @property
    def singular_values(self) -> Float[Tensor, " d"]:
        """Singular values of the centred rows, sqrt(n l_i), descending."""
        return (self.eigenvalues * self.n).sqrt()

    @property
    def relative_singular_values(self) -> Float[Tensor, " d"]:
        """s_i / s_1, between 0 and 1."""
        return (self.eigenvalues / self.eigenvalues[0]).sqrt()

    @cached_property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), 1 to d.

        Raises DataError if rounding errors of the covariance could move it by more than 0.5 %.
        """
        moved = uncertainty(self.eigenvalues, self.noise)
        if moved > MOST_UNCERTAIN:
            raise DataError(
                f"{self.name or 'this spectrum'}: rounding errors of sums in float32 may move the effective "
                f"rank by {moved:.1%}, more than {MOST_UNCERTAIN:.1%}; count the rows again (they are then "
                "summed in float64): delete the cached file, or take the moments of `rows.double()`"
            )
        return entropy_rank(self.eigenvalues.sqrt())

    @property
    def effective_rank_fraction(self) -> float:
        """Effective rank over the site's width, 0 to 1."""
        return self.effective_rank / self.d

    def intrinsic_dimension(self, share: float = 0.99) -> int:
        """Return the smallest r whose r leading eigenvalues hold at least `share` of the variance."""
        require(0 < share <= 1, "share", share, "above 0 and at most 1")
        cumulative = self.eigenvalues.cumsum(0)
        # The last sum equals the total exactly, so that share=1 has an answer.
        return int(torch.searchsorted(cumulative, share * cumulative[-1]).item()) + 1

    @property
    def rank(self) -> int:
        """Directions with variance: eigenvalues above the rounding of float32 activations, at most n - 1."""
        floor = self.d * _ROUNDING**2 * self.eigenvalues[0]
        return min(int((self.eigenvalues > floor).sum()), self.n - 1)

    @property
    def participation_ratio(self) -> float:
        """(sum l)^2 / sum l^2, 1 to d."""
        return (self.eigenvalues.sum() ** 2 / self.eigenvalues.square().sum()).item()

    @property
    def stable_rank(self) -> float:
        """sum l / l_1, 1 to d."""
        return (self.eigenvalues.sum() / self.eigenvalues[0]).item()

    def explained_variance(self, r: int) -> float:
        """Return the share of the variance inside the top r principal directions, 0 to 1."""
        require(0 <= r <= self.d, "r", r, f"from 0 to {self.d}")
        return (self.eigenvalues[:r].sum() / self.eigenvalues.sum()).item()

    def active_subspace(self, d_init: int) -> Float[Tensor, "d d_init"]:
        """Return the top `d_init` principal directions as orthonormal columns, float64 (paper: V_active)."""
        known = isinstance(d_init, int) and 1 <= d_init <= self.d
        require(known, "d_init", d_init, f"a whole number from 1 to {self.d}")
        return self.eigenvectors[:, :d_init]

    def summary(self) -> dict[str, float | int | None]:
        """Return the numbers of `01_rank_curves.csv`: d, ranks and dimensions."""
        return {
            "d": self.d,
            "effective_rank": self.effective_rank,
            "effective_rank_fraction": self.effective_rank_fraction,
            "intrinsic_dimension_99": self.intrinsic_dimension(0.99),
            "participation_ratio": self.participation_ratio,
            "stable_rank": self.stable_rank,
            "n_left_out": self.left_out,
            "rank_with_massive": self.rank_with_massive,
        }

    def __repr__(self) -> str:
        without = f" without {self.left_out:,} massive" if self.left_out else ""
        return (
            f"Spectrum({self.name or 'unnamed'}: n={self.n:,}{without}, d={self.d}, "
            f"effective_rank={self.effective_rank:.1f} ({self.effective_rank_fraction:.3f} of d))"
        )

    def _repr_html_(self) -> str:
        few = f"fewer than {ROWS_PER_DIMENSION} rows per dimension: the effective rank is biased downwards"
        share = self.intrinsic_dimension(0.99)
        facts = {
            "rows n": self.n,
            "width d": self.d,
            "effective rank": f"{self.effective_rank:.1f} ({self.effective_rank_fraction:.3f} of d)",
            "directions for 99 % of the variance": f"{share:,} ({share / self.d:.3f} of d)",
            "participation ratio": self.participation_ratio,
            "stable rank": self.stable_rank,
            "massive rows left out": self.left_out or None,
            "effective rank / d with them": self.rank_with_massive,
            "warning": few if self.is_few else None,
        }
        return facts_html(f"Spectrum of {self.name or 'rows'}", facts)


def warn_if_few(spectra: Iterable[Spectrum]) -> None:
    """Issue one FewTokensWarning that names every spectrum with fewer than 20 rows per dimension."""
    few = [s for s in spectra if s.is_few]
    if few:
        names = ", ".join(s.name or "unnamed" for s in few[:4]) + (" ..." if len(few) > 4 else "")
        warnings.warn(
            f"{names}: {min(s.n for s in few):,} rows for width {max(s.d for s in few)}; below "
            f"{ROWS_PER_DIMENSION} rows per dimension the effective rank is biased downwards "
            "(rank_growth shows by how much)",
            FewTokensWarning,
            stacklevel=3,
        )


@checked
def effective_rank_limit(n: Sequence[int], ranks: Sequence[float]) -> float:
    """Return the effective rank that a growing sample tends to, from ranks measured on nested samples.

    Sample eigenvalues are off by O(1/n) (Lawley 1956), and so is the rank: r(n) = r_limit - a / n is
    fitted to the two largest samples. The estimate is good if n is well above d.
    Raises OptionError for fewer than two sizes or sizes that are not distinct and positive.
    """
    require(len(n) == len(ranks) and len(n) >= 2, "n", list(n), "two or more sizes, one per rank")
    require(len(set(n)) == len(n) and min(n) > 0, "n", list(n), "distinct and positive")
    (n1, r1), (n2, r2) = sorted(zip(n, ranks, strict=True))[-2:]
    return (r2 * n2 - r1 * n1) / (n2 - n1)
