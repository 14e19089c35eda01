"""ReLU with L1 ("standard" in SAELens): every feature with a positive pre-activation fires.

Penalty, with a steered coefficient c: c d_out / target mean_b sum_j act (L1 with unit decoder rows).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import relu

from asi_lens.kernels.gradients import Term
from asi_lens.sae.kinds.free import FiresFreely
from asi_lens.sae.kinds.kind import Penalized, Picked
from asi_lens.sae.sparsity import SparsityConfig


class ReLUTraining(Penalized["ReLU", Picked]):
    """Training of ReLU: L1, steered towards the target."""

    def penalize(self, terms: list[Term], picks: Picked, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Training.penalize`."""
        code, batch = terms[0].code, len(terms[0].grad)
        weight = self.weight(step) / (self.target(step) * batch)
        terms[0] = terms[0]._replace(pull=torch.full_like(code.values, weight))
        return weight * code.values.sum(), {}

    def after(self, picks: Picked, l0: float, step: int) -> None:
        """See `Training.after`."""
        self.steer(l0, step)


class ReLU(FiresFreely):
    """ReLU(.). `set_threshold` subtracts the threshold from b_enc. That shrinks values too, but without it
    half of all features would fire at first."""

    title = "ReLU with L1"
    trained_by = ReLUTraining
    default = SparsityConfig(coefficient=0.05)
    saelens = "standard"
    saelens_transcoder = "transcoder"

    def values(self, z: Tensor, bias: Tensor) -> Tensor:
        """See `FiresFreely.values`."""
        return relu(z)
