"""Gradients of the picks, Adam, unit norm and the bfloat16 copy, in one pass over each weight's rows.

A program sums the picks of a feature in registers, in a fixed order, and updates its row: every row of
weights and moments is read and written once, and a gradient is never stored. Decoder rows come first, and
leave the dots of their picks for the encoder rows. A feature with many picks is summed in pieces by other
programs before. There are no atomic operations.

With r the gradient in the reconstruction (`decode`), v the value and x the input of a pick:

    dot = r . decoder row,  d encoder row = sum dot x,  d bias = sum dot,
    d decoder row = sum v r - (sum v dot) decoder row   (without the part along the row)
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.kernels.triton.card import require_contiguous
from asi_lens.kernels.triton.decode import row_warps
from asi_lens.kernels.triton.language import jit, next_power_of_2, tl
from asi_lens.kernels.triton.picks import Picks
from asi_lens.kernels.triton.plan import PIECE

PROGRAMS = 8448
"""Programs of the update. The same on every card, since the sum of their parts of b_dec depends on it."""
_AT_ONCE = 2  # picks summed at a time


class Moments(NamedTuple):
    """A weight and its moments, float32, with a row (a number, for the bias) for each feature."""

    weight: Float[Tensor, "*shape"]
    m: Float[Tensor, "*shape"]
    v: Float[Tensor, "*shape"]


class Adam(NamedTuple):
    """Numbers of one step of Adam.

    Attributes:
        step: its number, from 1. lr: learning rate. b1, b2, eps: as usual. encoder_lr: factor on the learning
            rate of the encoder's rows.
    """

    step: int
    lr: float
    b1: float
    b2: float
    eps: float
    encoder_lr: float = 1.0


@jit()
@no_type_check
def decoder_sums(
    begin, end, rows, vals, R, row, dots, d, D: tl.constexpr, DP: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Return sum v r, sum dot and sum v dot over the picks from `begin` to `end`, and store their dots."""
    dec, bias, along = tl.zeros((DP,), tl.float32), 0.0, 0.0
    for at in range(begin, end, AT_ONCE):
        i = at + tl.arange(0, AT_ONCE)
        of = tl.load(rows + i, mask=i < end, other=0).to(tl.int64)
        v = tl.load(vals + i, mask=i < end, other=0.0)
        here = (i < end)[:, None] & (d < D)[None, :]
        r = tl.load(R + of[:, None] * D + d[None, :], mask=here, other=0.0)
        dot = tl.sum(r * row[None, :], 1)
        tl.store(dots + i, dot, mask=i < end)
        dec += tl.sum(v[:, None] * r, 0)
        bias += tl.sum(dot)
        along += tl.sum(v * dot)
    return dec, bias, along


@jit()
@no_type_check
def encoder_sum(begin, end, rows, dots, X, d, D: tl.constexpr, DP: tl.constexpr, AT_ONCE: tl.constexpr):
    """Return sum dot x over the picks from `begin` to `end`."""
    enc = tl.zeros((DP,), tl.float32)
    for at in range(begin, end, AT_ONCE):
        i = at + tl.arange(0, AT_ONCE)
        of = tl.load(rows + i, mask=i < end, other=0).to(tl.int64)
        dot = tl.load(dots + i, mask=i < end, other=0.0)
        here = (i < end)[:, None] & (d < D)[None, :]
        enc += tl.sum(dot[:, None] * tl.load(X + of[:, None] * D + d[None, :], mask=here, other=0.0), 0)
    return enc


@jit()
@no_type_check
def piece_kernel(
    features,
    offsets,
    slots,
    begins,
    n_pieces,
    rows,
    vals,
    R,
    X,
    decoder,
    dots,
    part,
    D: tl.constexpr,
    DP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Sums over up to PIECE picks of a feature that has more."""
    piece, d = tl.program_id(0), tl.arange(0, DP)
    if piece < tl.load(n_pieces):
        slot, begin = tl.load(slots + piece), tl.load(begins + piece)
        own = decoder + tl.load(features + slot).to(tl.int64) * D + d
        row = tl.load(own, mask=d < D, other=0.0)
        end = min(begin + PIECE, tl.load(offsets + slot + 1))
        dec, bias, along = decoder_sums(begin, end, rows, vals, R, row, dots, d, D, DP, AT_ONCE)
        tl.debug_barrier()  # the dots are there for all threads
        enc = encoder_sum(begin, end, rows, dots, X, d, D, DP, AT_ONCE)
        out = part + piece.to(tl.int64) * (2 * D + 2)
        tl.store(out + d, enc, mask=d < D)
        tl.store(out + D + d, dec, mask=d < D)
        tl.store(out + 2 * D, bias)
        tl.store(out + 2 * D + 1, along)


@jit()
@no_type_check
def read(w, m, v, at, keep):
    """A weight and its moments."""
    return (
        tl.load(w + at, mask=keep, other=0.0),
        tl.load(m + at, mask=keep, other=0.0),
        tl.load(v + at, mask=keep, other=0.0),
    )


@jit()
@no_type_check
def moved(w, old_m, old_v, m, v, at, g, keep, size, root, fade1, fade2, B1, B2, EPS):
    """Store new moments and return new weights. `fade1` and `fade2`: decay that the moments missed."""
    old_m, old_v = old_m * fade1, old_v * fade2
    new_m, new_v = old_m + (1 - B1) * (g - old_m), B2 * old_v + (1 - B2) * g * g
    tl.store(m + at, new_m, mask=keep)
    tl.store(v + at, new_v, mask=keep)
    return w - size * new_m / (tl.sqrt(new_v) / root + EPS)


@jit()
@no_type_check
def fades(updated, f, step, log1, log2, FADE: tl.constexpr):
    """Decay of both moments that a feature missed."""
    fade1, fade2 = 1.0, 1.0
    if FADE:
        missed = (step - 1 - tl.load(updated + f)).to(tl.float32)
        fade1, fade2 = tl.exp2(missed * log1), tl.exp2(missed * log2)
    return fade1, fade2


@jit(do_not_specialize=("step",))
@no_type_check
def decoder_kernel(
    features,
    offsets,
    n_slots,
    first_piece,
    rows,
    vals,
    R,
    part,
    dots,
    biases,
    w,
    m,
    v,
    be,
    mb,
    vb,
    updated,
    step,
    size,
    root,
    log1,
    log2,
    B1: tl.constexpr,
    B2: tl.constexpr,
    EPS: tl.constexpr,
    FADE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Update the decoder rows and biases of every PROGRAMS-th slot, and store the bias's gradient."""
    d = tl.arange(0, DP)
    for slot in range(tl.program_id(0), tl.load(n_slots), tl.num_programs(0)):
        f = tl.load(features + slot).to(tl.int64)
        begin, end = tl.load(offsets + slot), tl.load(offsets + slot + 1)
        at, keep = f * D + d, d < D
        # All is read before the sums: they wait for rows, and these come meanwhile.
        row, old_m, old_v = read(w, m, v, at, keep)
        old_b, old_mb, old_vb = read(be, mb, vb, f, True)
        few = tl.where(end - begin <= PIECE, end, begin)
        dec, bias, along = decoder_sums(begin, few, rows, vals, R, row, dots, d, D, DP, AT_ONCE)
        if few < end:
            for i in range(tl.cdiv(end - begin, PIECE)):
                own = part + (tl.load(first_piece + slot) + i).to(tl.int64) * (2 * D + 2)
                dec += tl.load(own + D + d, mask=keep, other=0.0)
                bias += tl.load(own + 2 * D)
                along += tl.load(own + 2 * D + 1)
        tl.store(biases + slot, bias)
        fade1, fade2 = fades(updated, f, step, log1, log2, FADE)
        new = moved(
            row, old_m, old_v, m, v, at, dec - along * row, keep, size, root, fade1, fade2, B1, B2, EPS
        )
        tl.store(w + at, new / tl.sqrt(tl.sum(tl.where(keep, new * new, 0.0))), mask=keep)
        new = moved(old_b, old_mb, old_vb, mb, vb, f, bias, True, size, root, fade1, fade2, B1, B2, EPS)
        tl.store(be + f, new)


@jit(do_not_specialize=("step",))
@no_type_check
def encoder_kernel(
    features,
    offsets,
    n_slots,
    first_piece,
    rows,
    dots,
    X,
    part,
    biases,
    w,
    m,
    v,
    low,
    through,
    updated,
    step,
    size,
    root,
    log1,
    log2,
    B1: tl.constexpr,
    B2: tl.constexpr,
    EPS: tl.constexpr,
    FADE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Update the encoder rows of every PROGRAMS-th slot, and sum what b_dec gets through them."""
    d, gone = tl.arange(0, DP), tl.zeros((DP,), tl.float32)
    for slot in range(tl.program_id(0), tl.load(n_slots), tl.num_programs(0)):
        f = tl.load(features + slot).to(tl.int64)
        begin, end = tl.load(offsets + slot), tl.load(offsets + slot + 1)
        at, keep = f * D + d, d < D
        row, old_m, old_v = read(w, m, v, at, keep)
        few = tl.where(end - begin <= PIECE, end, begin)
        enc = encoder_sum(begin, few, rows, dots, X, d, D, DP, AT_ONCE)
        if few < end:
            for i in range(tl.cdiv(end - begin, PIECE)):
                own = part + (tl.load(first_piece + slot) + i).to(tl.int64) * (2 * D + 2)
                enc += tl.load(own + d, mask=keep, other=0.0)
        fade1, fade2 = fades(updated, f, step, log1, log2, FADE)
        gone += tl.load(biases + slot) * row
        new = moved(row, old_m, old_v, m, v, at, enc, keep, size, root, fade1, fade2, B1, B2, EPS)
        tl.store(w + at, new, mask=keep)
        # To the nearest, ties to even, as PyTorch rounds; Triton's interpreter would cut the bits off.
        bits = new.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        tl.store(low + at, (bits >> 16).to(tl.int16), mask=keep)
        if FADE:
            tl.debug_barrier()  # all threads have read the old number
            tl.store(updated + f, step)
    tl.store(through + tl.program_id(0).to(tl.int64) * D + d, gone, mask=d < D)


def update(
    picks: Picks,
    grad: Float[Tensor, "batch d"],
    x: Float[Tensor, "batch d"],
    encoder: Moments,
    decoder: Moments,
    bias: Moments,
    low: Float[Tensor, "n d"],
    adam: Adam,
    updated: Int[Tensor, " n"] | None = None,
    *,
    piece: int = PIECE,
    programs: int = PROGRAMS,
) -> Float[Tensor, " d"]:
    """Update encoder, decoder and bias of every slot of `picks`, in place.

    Args:
        grad: gradient of the loss in the reconstruction. x: centered rows that were encoded.
        low: bfloat16 copy of the encoder, written with it.
        updated: step of each feature's last update, for `sparse_adam_decay`: the moments of a feature decay
            by the steps that it missed. None if they do not.

    Returns the gradient of b_dec through the encoder, which b_dec enters with a minus.
    """
    given = {"encoder": encoder, "decoder": decoder, "bias": bias}
    named = {f"{name}.{part}": t for name, three in given.items() for part, t in three._asdict().items()}
    require_contiguous(grad=grad, x=x, low=low, **named)
    d = x.shape[1]
    how = {"D": d, "DP": next_power_of_2(d), "AT_ONCE": _AT_ONCE, "PIECE": piece, "num_warps": row_warps(d)}
    part, dots = x.new_empty(len(picks.slots), 2 * d + 2), torch.empty_like(picks.values)
    piece_kernel[(len(picks.slots),)](
        picks.features,
        picks.offsets,
        picks.slots,
        picks.begins,
        picks.n_pieces,
        picks.rows,
        picks.values,
        grad,
        x,
        decoder.weight,
        dots,
        part,
        **how,
    )
    programs = min(programs, len(picks.features))
    slots = (picks.features, picks.offsets, picks.n_slots, picks.first_piece, picks.rows)
    biases, through = x.new_empty(len(picks.features)), x.new_empty(programs, d)
    size = adam.lr / (1 - adam.b1**adam.step)
    before = (picks.features if updated is None else updated, adam.step)
    after = (
        (1 - adam.b2**adam.step) ** 0.5,
        math.log2(adam.b1),
        math.log2(adam.b2),
        adam.b1,
        adam.b2,
        adam.eps,
        updated is not None,
    )
    decoder_kernel[(programs,)](
        *slots, picks.values, grad, part, dots, biases, *decoder, *bias, *before, size, *after, **how
    )
    own = (*before, size * adam.encoder_lr, *after)
    encoder_kernel[(programs,)](
        *slots, dots, x, part, biases, *encoder, low.view(torch.int16), through, *own, **how
    )
    return through.sum(0)
