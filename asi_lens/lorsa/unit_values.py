"""Values of units at the positions where they write: the choice of the k largest, and its sparse gradient.

The choice needs every value once, one head's at a time. The gradient is that of the values that were chosen,
a few in a thousand: it is summed over picks, where autograd would multiply arrays of all positions and units.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from asi_lens.kernels import devices
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.gradients import sum_bags
from asi_lens.kernels.topk import topk_exact


def largest_values(
    x: Float[Tensor, "batch position d_in"],
    patterns: Float[Tensor, "batch head position position"],
    W_V: Float[Tensor, "unit d_in"],
    b_V: Float[Tensor, " unit"],
    k: int,
    rectify: bool,
) -> SparseCode:
    """Return the k units of each position with the largest values z~ (see `lorsa`), [batch position k].

    Unit i belongs to head i // (units / heads). If `rectify`, values below zero become zero, else units have
    the values of largest size. Autograd reaches all arguments. The order of units is unspecified.
    """
    return SparseCode(*_Largest.apply(x, patterns, W_V, b_V, k, rectify))


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, patterns: Tensor, W_V: Tensor, b_V: Tensor, k: int, rectify: bool
    ) -> tuple[Tensor, Tensor]:
        (batch, heads, positions, _), n_ov = patterns.shape, len(W_V)
        group = n_ov // heads
        read, units, values = x.new_empty(batch, n_ov, positions), [], []
        for head, start in enumerate(range(0, n_ov, group)):
            served = slice(start, start + group)
            there = read[:, served]
            torch.baddbmm(b_V[served, None], W_V[served].expand(batch, -1, -1), x.mT, out=there)
            z = (patterns[:, head] @ there.mT).flatten(0, 1)
            unit = topk_exact(z if rectify else z.abs(), min(k, group)).indices
            units.append(unit + start)
            values.append(z.gather(1, unit))
        unit, value = torch.cat(units, 1), torch.cat(values, 1)
        best = (value if rectify else value.abs()).topk(k, sorted=False).indices
        unit, value = (part.gather(1, best).view(batch, positions, k) for part in (unit, value))
        value = value.relu() if rectify else value
        ctx.save_for_backward(x, patterns, W_V, read, unit, value)
        ctx.rectify = rectify
        ctx.mark_non_differentiable(unit)
        return unit, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, patterns, W_V, read, unit, value = ctx.saved_tensors
        (batch, heads, positions, _), n_ov = patterns.shape, len(W_V)
        weight = (grad * (value > 0) if ctx.rectify else grad).flatten()
        # A pick joins a row of `patterns` (where its head looks) and a row of `read` (what its unit reads).
        sequence = torch.arange(batch, device=x.device)[:, None, None]
        looks = (sequence * heads + unit // (n_ov // heads)) * positions
        looks = (looks + torch.arange(positions, device=x.device)[:, None]).flatten()
        reads = (sequence * n_ov + unit).flatten()
        starts, every = torch.arange(1, batch, device="cpu") * n_ov, None
        if devices.is_host(x.device):
            there = weight.nonzero().flatten()
            weight, looks, reads = weight[there], looks[there], reads[there]
        else:  # The host would wait for the number of rows with a pick.
            every = torch.arange(batch * n_ov, device=x.device)
        all_looks = torch.arange(patterns[..., 0].numel(), device=x.device)
        d_patterns = _sums(looks, all_looks, read.flatten(0, 1), reads, weight)[1]
        rows, d_read = _sums(reads, every, patterns.flatten(0, 2), looks, weight)
        bounds = torch.searchsorted(rows, starts) if every is None else starts
        d_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        d_W, d_b = torch.zeros_like(W_V), W_V.new_zeros(n_ov)
        of_sequences = zip(rows.tensor_split(bounds), d_read.tensor_split(bounds), strict=True)
        for of, (units, slopes) in enumerate(of_sequences):
            units = units - of * n_ov
            d_W.index_add_(0, units, slopes @ x[of])
            d_b.index_add_(0, units, slopes.sum(1))
            if d_x is not None:
                d_x[of] = slopes.T @ W_V[units]
        return d_x, d_patterns.view_as(patterns), d_W, d_b, None, None


def _sums(
    bag: Int[Tensor, " picks"],
    bags: Int[Tensor, " bags"] | None,
    table: Float[Tensor, "rows width"],
    row: Int[Tensor, " picks"],
    weight: Float[Tensor, " picks"],
) -> tuple[Int[Tensor, " bags"], Float[Tensor, "bags width"]]:
    """Return the bags, and the sum of weight times the row of the table over the picks of each.

    `bags` are ascending and hold every pick's; None: those that have a pick.
    """
    bag, order = bag.sort(stable=True)
    bags = bag.unique_consecutive() if bags is None else bags
    bounds = pad(torch.searchsorted(bag, bags), (0, 1), value=len(bag))
    return bags, sum_bags(table, row[order], weight[order], bounds)
