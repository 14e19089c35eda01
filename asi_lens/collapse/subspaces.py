"""Subspaces side by side: principal angles, the Projection Kernel, and its value for random subspaces.

The Projection Kernel of two subspaces with orthonormal bases A and B is |A^T B|_F^2, the sum of the squared
cosines of their principal angles (arXiv 2601.10266 compares attention heads with it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import DataError, OptionError, require, require_whole

# Largest entry of A^T A - 1 for a basis that counts as orthonormal.
_ORTHONORMAL = 1e-4
# Smallest cosine of a principal angle that counts as below 90 degrees.
_RIGHT_ANGLE = 1e-9


@dataclass(frozen=True)
class Overlap:
    """Overlap of two subspaces of dimensions `r_a` and `r_b` in `d` dimensions."""

    mean_cosine: float
    """Mean cosine of the principal angles, 0 to 1."""
    kernel: float
    """Projection Kernel over the smaller dimension, 0 (orthogonal) to 1 (one contains the other)."""
    random_kernel: float
    """Expected `kernel` of two random subspaces of the same dimensions."""
    random_deviation: float
    """Standard deviation of `kernel` for random subspaces."""


def principal_cosines(a: Float[Tensor, "d r_a"], b: Float[Tensor, "d_b r_b"]) -> Float[Tensor, " r"]:
    """Return the cosines of the min(r_a, r_b) principal angles, descending, float64 in 0 to 1.

    Raises OptionError for bases of different width, or whose columns are not orthonormal.
    """
    a, b = (_checked(name, basis) for name, basis in (("a", a), ("b", b)))
    if a.shape[0] != b.shape[0]:
        raise OptionError(f"subspaces of {a.shape[0]} and {b.shape[0]} dimensions cannot be compared")
    return torch.linalg.svdvals(a.T @ b.to(a.device)).clamp(0, 1)


def overlap(a: Float[Tensor, "d r_a"], b: Float[Tensor, "d_b r_b"]) -> Overlap:
    """Return the overlap of two subspaces, given as orthonormal columns. Raises as `principal_cosines`."""
    cosines = principal_cosines(a, b)
    d, r_a, r_b = a.shape[0], a.shape[1], b.shape[1]
    expected, deviation = random_kernel(d, r_a, r_b)
    return Overlap(cosines.mean().item(), cosines.square().mean().item(), expected, deviation)


def random_kernel(d: int, r_a: int, r_b: int) -> tuple[float, float]:
    """Return mean and standard deviation of `Overlap.kernel` for uniformly random subspaces.

    The Projection Kernel of independent uniform subspaces has the mean r_a r_b / d and the variance
    2 r_a r_b (d - r_a) (d - r_b) / (d^2 (d - 1) (d + 2)). Raises OptionError for dimensions out of range.
    """
    require_whole("d", d, 2)
    for name, r in (("r_a", r_a), ("r_b", r_b)):
        require_whole(name, r, 1)
        require(r <= d, name, r, f"from 1 to d={d}")
    variance = 2 * r_a * r_b * (d - r_a) * (d - r_b) / (d**2 * (d - 1) * (d + 2))
    return r_a * r_b / d / min(r_a, r_b), math.sqrt(variance) / min(r_a, r_b)


def direct_rotation(a: Float[Tensor, "d r_a"], b: Float[Tensor, "d_b r_b"]) -> Float[Tensor, "d d"]:
    """Return the rotation R [d d], float64, that maps the span of `a` onto that of `b` and moves least else.

    R is the orthogonal matrix nearest to P_b P_a + (1 - P_b) (1 - P_a), P the projections (orthogonal
    Procrustes, closed form by one SVD): it turns each principal vector of `a` into that of `b`, and leaves
    what both spans lack (Davis and Kahan 1970). A column x becomes R x. Raises as `principal_cosines`,
    OptionError for subspaces of different dimension, and DataError for a principal angle of 90 degrees, where
    R is not unique.
    """
    cosines = principal_cosines(a, b)
    require(a.shape[1] == b.shape[1], "b", f"{b.shape[1]} columns", f"{a.shape[1]} columns, as a")
    if cosines.min().item() < _RIGHT_ANGLE:
        raise DataError("the subspaces have a principal angle of 90 degrees, so no rotation is the nearest")
    P_a, P_b = (basis @ basis.T for basis in (a.double(), b.double().to(a.device)))
    rest = torch.eye(len(P_a), dtype=P_a.dtype, device=P_a.device)
    u, _, vh = torch.linalg.svd(P_b @ P_a + (rest - P_b) @ (rest - P_a))
    return u @ vh


def _checked(name: str, basis: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    exact = basis.double()
    off = (exact.T @ exact - torch.eye(exact.shape[1], dtype=exact.dtype, device=exact.device)).abs().max()
    if not off.item() <= _ORTHONORMAL:
        raise OptionError(f"{name} is not allowed: its columns are not orthonormal (off by {off.item():.2g})")
    return exact
