"""The pass of one batch through a dictionary, plain or by the GPU kernels, and AuxK's part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.gradients import Term, decode_sum
from asi_lens.kernels.topk import Workspace, encode_topk
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.training.mesh import Mesh


@dataclass
class Pass:
    """A batch that has been encoded and decoded, ready for its update. Nothing has been changed.

    Attributes:
        code: picks of all tokens among this rank's features.
        x, goal: centered rows and targets of all tokens; one tensor for an autoencoder.
        error: sum of squared errors. aux_loss, penalty: as in `StepOutput`.
        check: number that is not finite if a gradient is not finite.
        apply: updates the dictionary, given the learning rate, a factor on the gradients, and the features
            per token of the batch.
        overflow: number of rows whose picks may be wrong; only the GPU kernels have such rows.
    """

    code: SparseCode
    x: Float[Tensor, "batch d_in"]
    goal: Float[Tensor, "batch d_out"]
    error: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    check: Float[Tensor, ""]
    apply: Callable[[float, float, float], None]
    overflow: Int[Tensor, ""] | None = None


def auxiliary_term(
    sae: SparseAutoencoder,
    mesh: Mesh,
    x: Float[Tensor, "part d_in"],
    residual: Float[Tensor, "batch d_out"],
    dead: Int[Tensor, " n_dead"],
    k: int,
    weight: float,
    to_b_enc: bool,
    dtype: torch.dtype,
    workspace: Workspace,
) -> tuple[Term, Float[Tensor, ""]]:
    """Return AuxK's term and L_aux: the top k dead features of each token reconstruct the error of the others
    (Gao et al. 2024).

    L_aux = sum |e - e^|^2 / sum |e - mean e|^2 with e = x_n - reconstruction, held constant, and e^ without
    b_dec. The term added to the loss is weight * d_out * L_aux. The main loss, too, is d_out times an error
    over a variance, because normalized targets have mean square norm d_out.

    `residual` is reconstruction - x_n, of all tokens. Without `to_b_enc`, closed gates decide which features
    fire, and values do not depend on b_enc.
    """
    # Features with closed gates have no value; without the bias their values can still learn.
    bias = sae.b_enc.data if to_b_enc else torch.zeros_like(sae.b_enc)
    code = encode_topk(x.to(dtype), sae.encoder_rows, bias, k, features=dead, workspace=workspace)
    n = len(residual)
    first, last = mesh.tokens(n)
    code = mesh.pick(code, k)
    # residual is reconstruction - x_n, which is -e.
    missed = mesh.over_features(decode_sum(code, sae.W_dec.data)).add_(residual[first:last])
    code, missed = mesh.whole_code(code, n), mesh.whole(missed, n)
    spread = (residual - residual.mean(0)).square().sum()
    share = torch.where(spread > 0, 1 / spread, 0.0)
    factor = 2 * weight * sae.d_out * share
    return Term(code, missed * factor, holds_b_dec=False, to_b_enc=to_b_enc), missed.square().sum() * share
