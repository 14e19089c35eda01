"""BatchTopK: the k x batch largest pre-activations of a batch fire (Bussmann et al. 2024)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.codes import SparseCode, keep
from asi_lens.kernels.topk import Workspace
from asi_lens.sae.kinds.free import Thresholded
from asi_lens.sae.kinds.kind import Sizes, Training, largest

# Weight of the newest batch in the running threshold.
_NEWEST = 0.01


class BatchTopKTraining(Training["BatchTopK"]):
    """Training of BatchTopK: the k x batch largest pre-activations above zero fire. There is no penalty."""

    _least: Tensor | None = None

    def code(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> SparseCode:
        """See `Training.code`."""
        sae = self.sae
        found, least = largest(x, sae.encoder_rows, sae.b_enc.data, self.target(step), workspace)
        kept = (found.values >= least) & (found.values > 0)
        self._least = found.values[kept].amin() if bool(kept.any()) else None
        return keep(found, kept)

    def after(self, l0: float, step: int) -> None:
        """See `Training.after`. Updates the threshold of inference."""
        threshold = self.kind.threshold
        if self._least is not None:
            # The first batch sets the threshold, unless `set_threshold` did.
            share = _NEWEST if bool(threshold > 0) else 1.0
            threshold.lerp_(self._least.to(threshold), share)


class BatchTopK(Thresholded):
    """BatchTopK, with one `threshold []` for all features: the running mean of the smallest value that fired
    in a batch. So inference does not depend on how tokens are batched. SAELens reads it as JumpReLU."""

    title = "BatchTopK"
    trained_by = BatchTopKTraining
    also_nested = True
    saelens_reads = False

    def __init__(self, config: Sizes):
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros(()))
