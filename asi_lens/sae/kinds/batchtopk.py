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
        self._least = torch.where(kept, found.values, torch.inf).amin()  # infinity if nothing fired
        return keep(found, kept)

    def after(self, l0: float, step: int) -> None:
        """See `Training.after`. Updates the threshold of inference."""
        threshold = self.kind.threshold
        if self._least is not None:
            # The first batch sets the threshold, unless `set_threshold` did.
            least = torch.where(self._least.isfinite(), self._least, threshold).to(threshold)
            threshold.lerp_(least, torch.where(threshold > 0, _NEWEST, 1.0).to(threshold))


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
