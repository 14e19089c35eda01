"""Precision of spectra: eigenvalues, the effective rank, and how far rounding errors could move it.

The rank counts square roots of eigenvalues, so small errors of a product weigh much: float32 sums of rows of
rank 1 have an error of 1e-7 of their largest eigenvalue, and its root, 3e-4, stands in every direction. At
width 2,048 the rank then is 1.4 instead of 1. Spectra of language models are far from that.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import DataError
from asi_lens.base.threads import one_thread

MOST_UNCERTAIN = 0.005
"""Largest relative uncertainty of an effective rank that is given out."""
# Share of it that sums in float32 may use up, since the estimate itself is not exact.
_SHARE = 0.5


def entropy_rank(singular_values: Float[Tensor, " d"]) -> float:
    """Return exp(H(p)), p_i = s_i / sum_j s_j, H in nats (Roy and Vetterli 2007). Between 1 and d.

    The sum runs over singular values, not their squares. Raises DataError for values that are negative,
    not finite, or all zero.
    """
    values = singular_values.double()
    if not torch.isfinite(values).all() or (values < 0).any():
        raise DataError("singular values must be finite and at least 0")
    total = values.sum()
    if total == 0:
        raise DataError("a spectrum of zeros has no effective rank (the activations do not vary)")
    p = values / total
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def few_threads(d: int) -> AbstractContextManager[None]:
    """Return a context in which decompositions of up to 2,048 dimensions run on one thread."""
    return one_thread() if d <= 2048 else nullcontext()


def covariance_eigenvalues(covariance: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Return the eigenvalues of a covariance, descending, float64. Raises DataError if it is not finite.

    Only the upper triangle is read, in which moments are stored. Eigenvalues below d * eps * l_1 (the
    tolerance of a numerical rank) are rounding errors and set to zero: their square roots would count as
    directions of relative size 1e-8.
    """
    if not torch.isfinite(covariance).all():
        raise DataError("a covariance holds NaN or infinity: the activations are too large")
    with few_threads(covariance.shape[0]):
        values = torch.linalg.eigvalsh(covariance.double(), UPLO="U").flip(0)
    return values.where(values > len(values) * torch.finfo(torch.float64).eps * values[0], 0.0)


def uncertainty(eigenvalues: Float[Tensor, " d"], noise: float) -> float:
    """Return how much larger, relatively, the effective rank is if errors raise all eigenvalues.

    `noise` is the Frobenius norm of the error of a d x d matrix. Random errors of that norm have eigenvalues
    up to 2 noise / sqrt(d) (Wigner 1958), the amount added here. 0 for a spectrum of zeros.
    """
    if not eigenvalues.sum() > 0:
        return 0.0
    raised = eigenvalues + 2 * noise / math.sqrt(len(eigenvalues))
    return entropy_rank(raised.sqrt()) / entropy_rank(eigenvalues.sqrt()) - 1


def tolerance(eigenvalues: Float[Tensor, " d"]) -> float:
    """Return the largest noise for which `uncertainty` stays below half of `MOST_UNCERTAIN`."""
    low, high = -60.0, 0.0  # powers of two of the eigenvalues' sum
    total = eigenvalues.sum().item()
    for _ in range(12):
        middle = (low + high) / 2
        fits = uncertainty(eigenvalues, total * 2**middle) <= _SHARE * MOST_UNCERTAIN
        low, high = (middle, high) if fits else (low, middle)
    return total * 2**low if low > -60.0 else 0.0


@functools.lru_cache(maxsize=32)
def signs(d: int, device: torch.device) -> Float[Tensor, " d"]:
    """Return a fixed vector of random signs, float64. For any E the mean of |E signs|^2 is |E|_F^2."""
    generator = torch.Generator().manual_seed(d)
    drawn = torch.randint(2, (d,), generator=generator, device="cpu", dtype=torch.int64)
    return (2 * drawn - 1).double().to(device)
