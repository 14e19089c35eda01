"""The pass of one batch through a dictionary, plain or by the GPU kernels, before its update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.kernels.codes import SparseCode


@dataclass
class Pass:
    """A batch that has been encoded and decoded, ready for its update. Nothing has been changed.

    Attributes:
        code: picks of all tokens among this rank's features.
        x, goal: centered rows and targets of all tokens; one tensor for an autoencoder.
        error: sum of squared errors. aux_loss, penalty: as in `StepOutput`.
        check: number that is not finite if a gradient is not finite.
        apply: updates the dictionary, given the learning rate and a factor on the gradients.
        overflow: number of rows whose picks may be wrong; only the GPU kernels have such rows.
    """

    code: SparseCode
    x: Float[Tensor, "batch d_in"]
    goal: Float[Tensor, "batch d_out"]
    error: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    check: Float[Tensor, ""]
    apply: Callable[[float, float], None]
    overflow: Int[Tensor, ""] | None = None
