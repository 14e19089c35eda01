"""Checks that weights are whole, and weights, rows and gradients finite, and sums that make them cheap."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.base.errors import DataError, require
from asi_lens.base.threads import one_thread
from asi_lens.kernels.gradients import Gradients

# Largest distance of a decoder row's norm from 1 that rounding explains.
_NORM_ERROR = 1e-3


def require_sizes(sae: Any) -> None:
    """Raise OptionError unless the weights of a dictionary have the sizes of its configuration.

    A weight can be replaced by one of another shape (a pruned one). What is computed then is not the
    dictionary that the configuration describes.
    """
    d_in, d_sae, d_out = sae.d_in, sae.d_sae, sae.d_out
    sizes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    for name, size in sizes.items():
        found = tuple(sae.get_parameter(name).shape)
        require(found == size, name, f"of shape {found}", f"of shape {size}, as the configuration says")


def require_master(dtype: torch.dtype) -> None:
    """Raise OptionError unless master weights may have the dtype: half precision loses small steps."""
    masters = (torch.float32, torch.float64)
    require(dtype in masters, "dtype", dtype, "float32 or float64 (master weights)")


def require_weights(sae: Any) -> None:
    """Raise OptionError unless a dictionary has weights that can be trained and written (`require_sizes`)."""
    require_sizes(sae)
    require_master(sae.W_dec.dtype)


def require_trainable(sae: nn.Module, decoder: Float[Tensor, "n d"]) -> None:
    """Raise DataError for NaN or infinity in weights, or decoder rows without unit norm.

    One call suffices: steps keep finite weights finite and decoder rows at norm 1.
    """
    for name, weight in sae.named_parameters():
        if not bool(weight.sum().isfinite()):
            raise DataError(f"{name} holds NaN or infinity")
    norms = torch.linalg.vector_norm(decoder, dim=1)
    if not bool(((norms - 1).abs() <= _NORM_ERROR).all()):
        raise DataError(
            f"rows of W_dec have norms from {norms.min().item():.4g} to {norms.max().item():.4g}; training "
            "keeps them at 1, so the first step would change what this dictionary computes. Only one whose "
            "decoder rows have unit norm can be trained on"
        )


def require_varying(sample: Float[Tensor, "n d"]) -> None:
    """Raise DataError for a sample of one row, or of rows that are all the same."""
    if not bool((sample != sample[:1]).any()):
        raise DataError(
            f"the {len(sample)} rows of the sample never vary, so no share of their variance can be explained"
        )


def require_finite_rows(rows: Float[Tensor, "n d"], name: str) -> None:
    """Raise DataError, with the number of rows and their name, for NaN or infinity."""
    bad = int((~torch.isfinite(rows)).any(1).sum())
    if bad:
        raise DataError(f"{bad} of {len(rows)} {name} rows hold NaN or infinity")


def power(rows: Tensor) -> Float[Tensor, ""]:
    """Return the sum of all squares, without an array of squares, and the same for any number of threads."""
    flat = rows.flatten()
    with one_thread() if flat.is_cpu else nullcontext():
        return flat @ flat


def total_of(grads: Gradients, own: Mapping[str, Tensor]) -> Tensor:
    """Return a sum that is not finite if the gradient of a pick is not finite."""
    total = grads.b_enc.sum() + grads.b_dec.sum() + grads.parallel.sum()
    return total + sum(grad.sum() for grad in own.values())
