"""Activation functions that fire on any number of features: ReLU, JumpReLU, BatchTopK and Gated, as they
infer.

A code is as wide as its widest row; the places that a row does not need hold zeros, which did not fire.
How they are trained is in `sparsity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from asi_lens.kernels.codes import SparseCode, pick, stack_codes
from asi_lens.kernels.topk import CHUNK_BYTES, Workspace


@runtime_checkable
class HasWidth(Protocol):
    """The part of `SAEConfig` that is needed here."""

    @property
    def d_sae(self) -> int:
        """Number of features."""


class FiresFreely:
    """What these functions share: a code of all features whose value is above zero."""

    def values(
        self, z: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """Values from pre-activations z, in which `bias` is; zero where nothing fires."""
        raise NotImplementedError

    def code(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        workspace: Workspace | None = None,
    ) -> SparseCode:
        """See `dictionary.Activation.code`."""
        codes = []
        for z in pre_activations(x, encoder, bias):
            values = self.values(z, bias)
            codes.append(pick(values > 0, values.to(bias.dtype)))
        return stack_codes(codes)


class ReLU(FiresFreely):
    """ReLU(.): every feature with a positive pre-activation fires ("standard" in SAELens)."""

    def __init__(self, config: HasWidth):
        del config

    def values(self, z: Tensor, bias: Tensor) -> Tensor:
        """See `FiresFreely.values`."""
        return relu(z)


class Thresholded(FiresFreely, nn.Module):
    """z if z > threshold, else 0, and never below 0: what JumpReLU and BatchTopK have in common."""

    threshold: Tensor

    def folded(self, scale: Float[Tensor, ""]) -> dict[str, Tensor]:
        """See `dictionary.SparseAutoencoder.folded`."""
        return {"threshold": self.threshold.detach() / scale}

    def values(self, z: Tensor, bias: Tensor) -> Tensor:
        """See `FiresFreely.values`."""
        return relu(z) * (z > self.threshold.to(z))


class JumpReLU(Thresholded):
    """A learned threshold for each feature (Rajamanoharan et al. 2024); `threshold [d_sae]`."""

    def __init__(self, config: HasWidth):
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))


class BatchTopK(Thresholded):
    """One `threshold []` for all features (Bussmann et al. 2024).

    In training the k x batch largest pre-activations of a batch fire; the threshold is the running mean of
    the smallest of them, so that inference does not depend on how tokens are batched.
    """

    def __init__(self, config: HasWidth):
        super().__init__()
        del config
        self.register_buffer("threshold", torch.zeros(()))


class Gated(FiresFreely, nn.Module):
    """Gate and magnitude apart (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated SAEs").

    A feature fires where x . w + b_enc > 0, with value ReLU(exp(r_mag) (x . w) + b_mag). Parameters: `r_mag`
    and `b_mag`, each [d_sae]; b_enc is the paper's b_gate, w its W_gate.
    """

    def __init__(self, config: HasWidth):
        super().__init__()
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def folded(self, scale: Float[Tensor, ""]) -> dict[str, Tensor]:
        """See `dictionary.SparseAutoencoder.folded`."""
        return {"r_mag": self.r_mag.detach().clone(), "b_mag": self.b_mag.detach() / scale}

    def magnitude(
        self, gate: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """Values before ReLU, from the gate's pre-activations x . w + bias."""
        return (gate - bias.to(gate)) * self.r_mag.exp().to(gate) + self.b_mag.to(gate)

    def values(self, z: Tensor, bias: Tensor) -> Tensor:
        """See `FiresFreely.values`."""
        return relu(self.magnitude(z, bias)) * (z > 0)


def pre_activations(
    x: Float[Tensor, "batch d_in"], encoder: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"]
) -> Iterator[Float[Tensor, "rows d_sae"]]:
    """x W + b in the dtype of `x`, of as many rows at a time as fit into `CHUNK_BYTES`."""
    for block in x.split(max(1, CHUNK_BYTES // (4 * len(encoder)))):
        yield linear(block, encoder.to(block), bias.to(block))
