"""TopK(ReLU(x W + b)) without an array of batch x d_sae: the products, of which two keys a group remain.

A key is a positive score's bits as an integer, the lowest replaced by the score's place in its group of G
features. Within a group keys differ, and they order scores cut to 23 - log2 G bits of mantissa. The product's
epilogue keeps the two largest keys of each group in registers; `select` finds the k largest of all that were
kept. A score that was not kept is at most its group's second. If that second is not among the k largest kept
ones, k kept keys precede it, and so the score is not among the k largest either. Hence only groups whose
second was chosen can hide a score; `select` scores their members again and chooses anew ("settles" them).
Equal keys are chosen by group, then by place. All this is exact up to the cut: 2^-20 of a score for G = 8,
2^-16 for G = 128, beside 2^-9 for products rounded to bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.triton.card import require_contiguous
from asi_lens.kernels.triton.language import interpreted, jit, tl
from asi_lens.kernels.triton.plan import Plan
from asi_lens.kernels.triton.select import select, settle


class Keys(NamedTuple):
    """The two largest keys of each group."""

    first: Int[Tensor, "batch groups"]
    second: Int[Tensor, "batch groups"]


@jit(do_not_specialize=("M", "N", "BAND"))
@no_type_check
def encode_kernel(
    x,
    w,
    b,
    first,
    second,
    M,
    N,
    GROUPS,
    BAND,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    G: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Scores of BM rows and BN features, and the two largest keys of each of their groups.

    A group is the columns of the block that are S = BN / G apart. With S = 8, a thread of wgmma holds whole
    groups, so the maxima need no exchange between threads.
    """
    S: tl.constexpr = BN // G
    program, blocks = tl.program_id(0), tl.cdiv(M, BM)
    per_band = BAND * tl.cdiv(N, BN)
    head = program // per_band * BAND
    height = min(blocks - head, BAND)
    m, n = head + program % per_band % height, program % per_band // height
    rm, rn, rk = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end are computed again from the start, and not stored.
    px = x + (rm % M).to(tl.int64)[:, None] * K + rk[None, :]
    pw = w + (rn % N).to(tl.int64)[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        p, q = tl.load(px), tl.load(pw)
        if WIDE:  # Triton's interpreter multiplies the bits of bfloat16 as integers
            p, q = p.to(tl.float32), q.to(tl.float32)
        acc = tl.dot(p, q, acc, input_precision="ieee")
        px += BK
        pw += BK
    acc += tl.load(b + rn, mask=rn < N, other=0.0)[None, :]
    place = tl.arange(0, BN) // S
    bits = tl.maximum(acc.to(tl.int32, bitcast=True), 0)  # ReLU: negative floats are negative integers
    key = (bits & -G) | (G - 1 - place)[None, :]
    key = tl.reshape(tl.where((rn < N)[None, :], key, -1), (BM, G, S))
    largest = tl.max(key, 1)
    next_one = tl.max(tl.where(key == tl.expand_dims(largest, 1), -1, key), 1)
    group = n * S + tl.arange(0, S)
    out = rm.to(tl.int64)[:, None] * GROUPS + group[None, :]
    keep = (rm < M)[:, None] & (group < GROUPS)[None, :]
    tl.store(first + out, largest, mask=keep)
    tl.store(second + out, next_one, mask=keep)


def products(
    x: Float[Tensor, "batch d"],
    encoder: Float[Tensor, "n d"],
    bias: Float[Tensor, " n"],
    plan: Plan,
    keys: Keys,
) -> None:
    """Fill `keys`. Rows and encoder are in bfloat16 and contiguous, the bias is in float32."""
    require_contiguous(x=x, encoder=encoder, keys=keys.first)
    programs = -(-len(x) // plan.rows) * -(-plan.n // plan.features)
    encode_kernel[(programs,)](
        x,
        encoder,
        bias,
        *keys,
        len(x),
        plan.n,
        plan.groups,
        plan.band,
        plan.d,
        plan.rows,
        plan.features,
        plan.depth,
        plan.group,
        interpreted(),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )


def encode(
    x: Float[Tensor, "batch d"],
    encoder: Float[Tensor, "n d"],
    bias: Float[Tensor, " n"],
    plan: Plan,
) -> tuple[SparseCode, Int[Tensor, ""]]:
    """Return the code TopK(ReLU(x encoder^T + bias)), and how many rows overflowed.

    A row overflows if more than `plan.settled` groups may hide a score. Its picks may then be wrong, and the
    caller must encode the batch in another way. The count stays on the device: nothing here waits for it.

    Args:
        x: centered rows in bfloat16. encoder: one feature per row, in bfloat16. bias: in float32.

    The code's indices are int32, its values float32, in no particular order.
    """
    indices = torch.empty(len(x), plan.k, dtype=torch.int32, device=x.device)
    values = torch.empty(len(x), plan.k, dtype=torch.float32, device=x.device)
    unsure = torch.empty(len(x), dtype=torch.int32, device=x.device)
    rows = min(len(x), plan.rows_at_a_time)
    keys = Keys(*torch.empty(2, rows, plan.groups, dtype=torch.int32, device=x.device))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        own = Keys(*(key[: len(x[part])] for key in keys))
        products(x[part], encoder, bias, plan, own)
        which = select(*own, plan, indices[part], values[part], unsure[part])
        settle(x[part], encoder, bias, *own, plan, which, indices[part], values[part], unsure[part])
    return SparseCode(indices, values), (unsure > plan.settled).sum()
