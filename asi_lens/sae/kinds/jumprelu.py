"""JumpReLU: a learned threshold for each feature (Rajamanoharan et al. 2024).

Thresholds learn through a rectangular kernel of width `bandwidth`: d act / d threshold =
-(threshold / bandwidth) K, d [fired] / d threshold = -(1 / bandwidth) K, where K is 1 for pre-activations
within half a bandwidth of the threshold. The penalty is `l0`: c d_out (l0 / target - 1)^2, or `tanh`:
c d_out / target mean_b sum_j tanh(act), with a steered coefficient c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from asi_lens.kernels import devices
from asi_lens.kernels.codes import FlatCode, flat_code
from asi_lens.kernels.gradients import Term, add_at
from asi_lens.kernels.topk import Workspace
from asi_lens.sae.kinds.free import Thresholded
from asi_lens.sae.kinds.kind import Penalized, Picked, Sizes, pre_activations
from asi_lens.sae.sparsity import SparsityConfig

# Share of a block's pre-activations near their thresholds, or above, from which a CPU takes less time for a
# product over all features than for their list. With a wide kernel and a high l0 a third of all are near.
_CROWDED = 1 / 16


@dataclass(frozen=True)
class JumpPicks(Picked):
    """Picked of a batch, and the pre-activations near a threshold, from which thresholds learn.

    Attributes:
        near: these pre-activations, zero for those that did not fire.
        crowded: blocks of rows with too many of them for a list: first row, and all pre-activations.
    """

    near: FlatCode
    crowded: list[tuple[int, Float[Tensor, "block d_sae"]]]


class JumpReLUTraining(Penalized["JumpReLU", JumpPicks]):
    """Training of JumpReLU: thresholds learn from the pre-activations near them."""

    def picks(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> JumpPicks:
        """See `Training.picks`."""
        threshold, half = self._threshold(), self.config.bandwidth / 2
        # What fires or is near lies above the lower end of the kernel: one look at all pre-activations.
        least, listed = threshold - half, torch.ones(len(x), dtype=torch.bool, device=x.device)
        crowded = []

        def marked() -> Iterator[tuple[Bool[Tensor, "block d_sae"], Float[Tensor, "block d_sae"]]]:
            first = 0
            for block in pre_activations(x, self.sae.encoder_rows, self.sae.b_enc.data):
                z = block.to(threshold)
                mask, last = z > least, first + len(z)
                if devices.is_host(z.device) and int(mask.count_nonzero()) > _CROWDED * z.numel():
                    crowded.append((first, block))
                    listed[first:last] = False
                    mask = z > threshold
                yield mask, z
                first = last

        found = flat_code(marked())
        above = found.values - threshold[found.indices]
        on, close = (above > 0) & (found.values > 0), (above.abs() < half) & listed[found.rows]
        near = found._replace(values=found.values * on).kept(close)
        return JumpPicks(found.kept(on).code(len(x)), near, crowded)

    def penalize(self, terms: list[Term], picks: JumpPicks, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Training.penalize`."""
        code, batch = terms[0].code, len(terms[0].grad)
        weight, target, width = self.weight(step), self.target(step), self.config.bandwidth
        l0 = (code.values > 0).to(code.values.dtype).sum() / batch
        by_l0 = torch.zeros_like(l0)
        if self.config.penalty == "l0":
            excess = l0 / target - 1
            loss, by_l0 = weight * excess.square(), 2 * weight * excess / target
        else:
            soft = torch.tanh(code.values)
            loss = weight / (target * batch) * soft.sum()
            terms[0] = terms[0]._replace(pull=weight / (target * batch) * (1 - soft.square()))
        return loss, {
            "threshold": self._threshold_gradient(
                terms, picks, by_l0 / batch, weight / (target * batch), width
            )
        }

    def _threshold_gradient(
        self, terms: list[Term], picks: JumpPicks, by_count: Tensor, slope: float, width: float
    ) -> Tensor:
        """Return sums of -(threshold / width) dL/d act - (1 / width) dL/d [fired] over the picks near each
        threshold."""
        threshold, (_, indices, acts) = self._threshold(), picks.near
        into = self.into_values(terms, picks.near)
        if self.config.penalty == "tanh":
            into += slope * (1 - torch.tanh(acts).square())
        summed = add_at(torch.zeros_like(threshold), indices, threshold[indices] * into + by_count)
        for (_, block), into in zip(picks.crowded, self._into_all(terms, picks.crowded), strict=True):
            z = block.to(threshold)
            near = (z - threshold).abs() < width / 2
            if self.config.penalty == "tanh":
                into += slope * (1 - torch.tanh(z.relu() * (z > threshold)).square())
            summed += threshold * into.mul_(near).sum(0) + by_count * near.sum(0)
        return summed / -width

    def _into_all(
        self, terms: list[Term], blocks: list[tuple[int, Float[Tensor, "block d_sae"]]]
    ) -> Iterator[Float[Tensor, "block d_sae"]]:
        """Yield what `into_values` returns for all features of each block, from products in its dtype."""
        if not blocks:
            return
        decoder = self.sae.W_dec.data.to(blocks[0][1])
        for first, block in blocks:
            into = torch.zeros_like(block, dtype=self.sae.W_dec.dtype)
            for term, size in zip(terms, [block.shape[1], *self.config.prefixes], strict=True):
                into[:, :size] += term.grad[first : first + len(block)].to(block) @ decoder[:size].T
            yield into

    def _threshold(self) -> Tensor:
        return self.kind.threshold.detach()

    def after(self, picks: JumpPicks, l0: float, step: int) -> None:
        """See `Training.after`. Sets thresholds below zero to zero."""
        self._threshold().clamp_(min=0)
        if self.config.penalty == "tanh":
            self.steer(l0, step)


class JumpReLU(Thresholded):
    """JumpReLU, with a learned `threshold [d_sae]`."""

    title = "JumpReLU"
    trained_by = JumpReLUTraining
    default = SparsityConfig(bandwidth=0.5)
    threshold_learns = True

    def __init__(self, config: Sizes):
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))
