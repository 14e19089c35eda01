"""BatchTopK: the k x batch largest pre-activations of a batch fire (Bussmann et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.topk import Workspace
from asi_lens.sae.kinds.free import Thresholded
from asi_lens.sae.kinds.kind import Picked, Sizes, Training, largest

# Weight of the newest batch in the running threshold.
_NEWEST = 0.01


@dataclass(frozen=True)
class BatchPicks(Picked):
    """Picked of a batch, and the smallest value among them (infinity if nothing fired)."""

    least: Float[Tensor, ""]


class BatchTopKTraining(Training["BatchTopK", BatchPicks]):
    """Training of BatchTopK: the k x batch largest pre-activations above zero fire. There is no penalty."""

    def picks(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> BatchPicks:
        """See `Training.picks`."""
        sae = self.sae
        found, least = largest(x, sae.encoder_rows, sae.b_enc.data, self.target(step), workspace)
        kept = (found.values >= least) & (found.values > 0)
        # Infinity if nothing fired.
        return BatchPicks(found.kept(kept).code(len(x)), torch.where(kept, found.values, torch.inf).amin())

    def after(self, picks: BatchPicks, l0: float, step: int) -> None:
        """See `Training.after`. Updates the threshold of inference."""
        threshold = self.kind.threshold
        # The first batch sets the threshold, unless `set_threshold` did.
        least = torch.where(picks.least.isfinite(), picks.least, threshold).to(threshold)
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
