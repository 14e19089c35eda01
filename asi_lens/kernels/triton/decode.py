"""The error of a sparse code: picked decoder rows minus the goal, one program a row."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.triton.card import require_contiguous
from asi_lens.kernels.triton.language import jit, next_power_of_2, tl


class Missed(NamedTuple):
    """Reconstruction minus goal, times a scale, and each row's squared error before that."""

    residual: Float[Tensor, "batch d"]
    error: Float[Tensor, " batch"]


@jit()
@no_type_check
def decode_kernel(
    indices, values, decoder, goal, residual, error, k, scale, D: tl.constexpr, DP: tl.constexpr
):
    """Sum the picked rows of one code in the order of its picks."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    acc = -tl.load(goal + row * D + d, mask=d < D, other=0.0)
    for j in range(k):
        feature, value = tl.load(indices + row * k + j).to(tl.int64), tl.load(values + row * k + j)
        if value != 0:  # so that NaN is seen
            acc += value * tl.load(decoder + feature * D + d, mask=d < D, other=0.0)
    tl.store(residual + row * D + d, acc * scale, mask=d < D)
    tl.store(error + row, tl.sum(acc * acc))


def decode(
    code: SparseCode, decoder: Float[Tensor, "n d"], goal: Float[Tensor, "batch d"], scale: float
) -> Missed:
    """Return sum_j values[b, j] decoder[indices[b, j]] - goal[b], times `scale`, and its squared norm before
    that. All are float32 and contiguous, indices are int32."""
    require_contiguous(decoder=decoder, goal=goal)
    (batch, d), k = goal.shape, code.values.shape[1]
    out = Missed(torch.empty_like(goal), goal.new_empty(batch))
    decode_kernel[(batch,)](
        *code, decoder, goal, *out, k, scale, d, next_power_of_2(d), num_warps=row_warps(d)
    )
    return out


def row_warps(d: int) -> int:
    """Return the warps of a program that holds a row of width d: 2 up to 1,024 columns, 8 at 4,096."""
    return max(2, next_power_of_2(d) // 512)
