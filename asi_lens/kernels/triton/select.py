"""The k largest keys of each row, and groups that are scored again; see `encode` for the reason."""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.kernels.triton.language import jit, next_power_of_2, tl
from asi_lens.kernels.triton.plan import Plan


@jit()
@no_type_check
def cut(a, c, k):
    """Return `least` and how many entries of a and c are above it: at most k, and with those equal to it at
    least k. Entries are 0 or more, or -1.

    Keys are floats' bits, so halving the interval from `least` to `most` halves it in their logarithm. The
    first trial is four octaves below the largest. The search ends where k entries are from a trial on, or at
    the k-th largest. No bound is above the largest entry: NaN has all 31 bits.
    """
    most = tl.maximum(tl.max(a, 0), tl.max(c, 0))
    least, above = most * 0, most * 0
    trial = tl.maximum(most - (4 << 23), 1)
    while least < most:
        if a.shape[0] == c.shape[0]:  # known when it compiles: one reduction for both
            n = tl.sum((a >= trial).to(tl.int32) + (c >= trial).to(tl.int32))
        else:
            n = tl.sum((a >= trial).to(tl.int32)) + tl.sum((c >= trial).to(tl.int32))
        # With exactly k from `trial` on, the next smaller number divides them from the others.
        least = tl.where(n < k, least, tl.where(n == k, trial - 1, trial))
        most, above = tl.where(n > k, most, trial - 1), tl.where(n > k, above, n)
        trial = most - (most - least) // 2
    return least, above


@jit()
@no_type_check
def feature_of(key, group, BN: tl.constexpr, G: tl.constexpr):
    """Return the feature of a key: groups are interleaved within a block of BN features."""
    S: tl.constexpr = BN // G
    return group // S * BN + (G - 1 - (key & (G - 1))) * S + group % S


@jit()
@no_type_check
def put(key, feature, least, room, taken, ties, k, indices, values, row, G: tl.constexpr):
    """Store the chosen of these entries after the `taken` ones: those above `least`, and the first `room` of
    those equal to it, of which `ties` were seen. Return which were chosen, and the new `taken`, `ties`."""
    over, tie = key > least, key == least
    both = over.to(tl.int32) + (tie.to(tl.int32) << 16)  # two counts in one scan
    upto, total = tl.cumsum(both), tl.sum(both)
    seen = (upto >> 16) + ties
    chosen = over | (tie & (seen <= room))
    place = taken - tl.minimum(ties, room) + (upto & 0xFFFF) + tl.minimum(seen, room) - 1
    # The middle of the interval that was cut to the key.
    value = ((key & -G) | (G // 2)).to(tl.float32, bitcast=True)
    tl.store(indices + row * k + place, feature, mask=chosen)
    tl.store(values + row * k + place, tl.where(key < G, 0.0, value), mask=chosen)
    more = tl.minimum(ties + (total >> 16), room) - tl.minimum(ties, room)
    return chosen, taken + (total & 0xFFFF) + more, ties + (total >> 16)


@jit()
@no_type_check
def select_kernel(
    first,
    second,
    indices,
    values,
    which,
    unsure,
    GROUPS,
    k,
    P: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
):
    """Choose the k largest keys of a row; list up to A groups whose second is among them, and count all."""
    row, g = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    a = tl.load(first + row * GROUPS + g, mask=g < GROUPS, other=-1)
    c = tl.load(second + row * GROUPS + g, mask=g < GROUPS, other=-1)
    least, above = cut(a, c, k)
    room = k - above
    _, taken, ties = put(a, feature_of(a, g, BN, G), least, room, 0, 0, k, indices, values, row, G)
    chosen, taken, ties = put(
        c, feature_of(c, g, BN, G), least, room, taken, ties, k, indices, values, row, G
    )
    maybe = (chosen & (c >= G)).to(tl.int32)  # behind a second of zero there are only zeros
    n = tl.sum(maybe)
    tl.store(unsure + row, n)
    if n > 0:  # few rows
        place = tl.cumsum(maybe) - 1
        tl.store(which + row * A + place, g, mask=(maybe > 0) & (place < A))


@jit(do_not_specialize=("N",))
@no_type_check
def settle_kernel(
    x,
    w,
    b,
    first,
    second,
    indices,
    values,
    which,
    unsure,
    N,
    GROUPS,
    k,
    KP: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
):
    """Score the other members of the listed groups and choose again. Most rows have no such group."""
    row, S = tl.program_id(0).to(tl.int64), BN // G
    listed = tl.load(unsure + row)
    if listed > 0:
        place, slot = tl.arange(0, G), tl.arange(0, A)
        more = tl.full((A, G), -1, tl.int32)
        what = tl.zeros((A, G), tl.int32)
        for i in tl.static_range(A):
            if i < listed:
                group = tl.load(which + row * A + i)
                feature = group // S * BN + place * S + group % S
                there = feature < N
                score = tl.load(b + feature, mask=there, other=0.0)
                for at in range(0, K, BK):
                    rk = at + tl.arange(0, BK)
                    own = w + feature.to(tl.int64)[:, None] * K + rk[None, :]
                    weights = tl.load(own, mask=there[:, None], other=0.0).to(tl.float32)
                    score += tl.sum(weights * tl.load(x + row * K + rk).to(tl.float32)[None, :], 1)
                one = tl.load(first + row * GROUPS + group)
                two = tl.load(second + row * GROUPS + group)
                key = (tl.maximum(score.to(tl.int32, bitcast=True), 0) & -G) | (G - 1 - place)
                known = (place == G - 1 - (one & (G - 1))) | (place == G - 1 - (two & (G - 1)))
                # A third is at most the second; summed in another order its score might be more.
                key = tl.where(known | (feature >= N), -1, tl.minimum(key, two))
                here = (slot == i)[:, None]
                more = tl.where(here, key[None, :], more)
                what = tl.where(here, feature[None, :], what)
        j = tl.arange(0, KP)
        old = tl.load(indices + row * k + j, mask=j < k, other=0)
        value = tl.load(values + row * k + j, mask=j < k, other=0.0)
        a = tl.where(j < k, value.to(tl.int32, bitcast=True) & -G, -1)
        c = tl.reshape(tl.where(more < 0, -1, more & -G), (A * G,))
        what = tl.reshape(what, (A * G,))
        least, above = cut(a, c, k)
        tl.debug_barrier()  # all of the row is read before any of it is written
        _, taken, ties = put(a, old, least, k - above, 0, 0, k, indices, values, row, G)
        put(c, what, least, k - above, taken, ties, k, indices, values, row, G)


def select(
    first: Int[Tensor, "batch groups"],
    second: Int[Tensor, "batch groups"],
    plan: Plan,
    indices: Int[Tensor, "batch k"],
    values: Float[Tensor, "batch k"],
    unsure: Int[Tensor, " batch"],
) -> Int[Tensor, "batch settled"]:
    """Fill the code with the k largest keys, and `unsure` with each row's number of groups that may hold a
    third. Returns these groups, up to `plan.settled` of a row; other places of the result are undefined."""
    which = torch.empty(len(first), plan.settled, dtype=torch.int32, device=first.device)
    padded = next_power_of_2(plan.groups)
    select_kernel[(len(first),)](
        first,
        second,
        indices,
        values,
        which,
        unsure,
        plan.groups,
        plan.k,
        padded,
        plan.features,
        plan.group,
        plan.settled,
        num_warps=select_warps(plan.groups),
    )
    return which


def select_warps(groups: int) -> int:
    """Return the warps of a program of `select`: about 64 keys a thread, from 4 to 8 warps."""
    return max(4, next_power_of_2(groups) // 1024)


def settle(
    x: Float[Tensor, "batch d"],
    encoder: Float[Tensor, "n d"],
    bias: Float[Tensor, " n"],
    first: Int[Tensor, "batch groups"],
    second: Int[Tensor, "batch groups"],
    plan: Plan,
    which: Int[Tensor, "batch settled"],
    indices: Int[Tensor, "batch k"],
    values: Float[Tensor, "batch k"],
    unsure: Int[Tensor, " batch"],
) -> None:
    """Correct the code of rows with groups that may hold a third, the first `plan.settled` of them."""
    settle_kernel[(len(x),)](
        x,
        encoder,
        bias,
        first,
        second,
        indices,
        values,
        which,
        unsure,
        plan.n,
        plan.groups,
        plan.k,
        next_power_of_2(plan.k),
        plan.d,
        plan.depth,
        plan.features,
        plan.group,
        plan.settled,
    )
