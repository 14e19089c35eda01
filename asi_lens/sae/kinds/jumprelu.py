"""JumpReLU: a learned threshold for each feature (Rajamanoharan et al. 2024).

Thresholds learn through a rectangular kernel of width `bandwidth`: d act / d threshold =
-(threshold / bandwidth) K, d [fired] / d threshold = -(1 / bandwidth) K, where K is 1 for pre-activations
within half a bandwidth of the threshold. The penalty is `l0`: c d_out (l0 / target - 1)^2, or `tanh`:
c d_out / target mean_b sum_j tanh(act), with a steered coefficient c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.kernels.codes import SparseCode, pick, stack_codes
from asi_lens.kernels.gradients import Term, add_at, picked_dots
from asi_lens.kernels.topk import Workspace
from asi_lens.sae.kinds.free import Thresholded
from asi_lens.sae.kinds.kind import Penalized, Picked, Sizes
from asi_lens.sae.sparsity import SparsityConfig


@dataclass(frozen=True)
class JumpPicks(Picked):
    """Picked of a batch, and the pre-activations near a threshold, from which thresholds learn.

    Attributes:
        near: features near their threshold, with ones; zeros are padding.
        acts: values of these features, zero for those that did not fire.
    """

    near: SparseCode
    acts: Float[Tensor, "batch near"]


class JumpReLUTraining(Penalized["JumpReLU", JumpPicks]):
    """Training of JumpReLU: thresholds learn from the pre-activations near them."""

    def picks(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> JumpPicks:
        """See `Training.picks`."""
        threshold = self._threshold()
        fired, near, acts = [], [], []
        for z in self.pre_activations(x):
            on = (z > threshold) & (z > 0)
            fired.append(pick(on, z))
            close = (z - threshold).abs() < self.config.bandwidth / 2
            near.append(pick(close, torch.ones_like(z)))
            acts.append(pick(close, z * on))
        return JumpPicks(stack_codes(fired), stack_codes(near), stack_codes(acts).values)

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
        indices, marks = picks.near
        threshold = self._threshold()
        there = threshold[indices]
        into = torch.zeros_like(marks)
        for term, size in zip(terms, [len(threshold), *self.config.prefixes], strict=True):
            into += picked_dots(term.grad, self.sae.W_dec.data, indices) * (indices < size)
        if self.config.penalty == "tanh":
            into += slope * (1 - torch.tanh(picks.acts).square())
        gradient = -(there * into + by_count) / width * marks
        return add_at(torch.zeros_like(threshold), indices.flatten(), gradient.flatten())

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
