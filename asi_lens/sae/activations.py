"""Activation functions of dictionaries trained elsewhere, for inference: ReLU and JumpReLU.

Unlike TopK they fire on any number of features, so a code is as wide as its widest row; the places that a
row does not need hold zeros, which did not fire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad, relu

from asi_lens.sae.sparse_ops import CHUNK_BYTES, SparseCode, Workspace


@runtime_checkable
class HasWidth(Protocol):
    """The part of `SAEConfig` that is needed here."""

    @property
    def d_sae(self) -> int:
        """Number of features."""


class ReLU:
    """ReLU(.): every feature with a positive pre-activation fires ("standard" in SAELens)."""

    def __init__(self, config: HasWidth):
        del config

    def code(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        workspace: Workspace | None = None,
    ) -> SparseCode:
        """See `dictionary.Activation.code`."""
        return _fired(x, encoder, bias, relu)


class JumpReLU(nn.Module):
    """z if z > threshold, else 0, and never below 0 (Rajamanoharan et al. 2024); `threshold [d_sae]`."""

    threshold: nn.Parameter

    def __init__(self, config: HasWidth):
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))

    def code(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        workspace: Workspace | None = None,
    ) -> SparseCode:
        """See `dictionary.Activation.code`."""
        threshold = self.threshold.to(x)
        return _fired(x, encoder, bias, lambda z: relu(z) * (z > threshold))


def stack_codes(codes: Sequence[SparseCode]) -> SparseCode:
    """The rows of several codes; narrower ones are filled up with zeros of feature 0."""
    width = max(code.values.shape[1] for code in codes)
    indices = [pad(code.indices, (0, width - code.indices.shape[1])) for code in codes]
    values = [pad(code.values, (0, width - code.values.shape[1])) for code in codes]
    return SparseCode(torch.cat(indices), torch.cat(values))


def _fired(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    gate: Callable[[Tensor], Tensor],
) -> SparseCode:
    codes = []
    for block in x.split(max(1, CHUNK_BYTES // (4 * len(encoder)))):
        values = gate(linear(block, encoder, bias.to(block)))
        width = max(1, int((values > 0).sum(1).max()))
        found = values.topk(width, dim=1, sorted=False)
        codes.append(SparseCode(found.indices, found.values))
    return stack_codes(codes)
