"""TopK: the k largest pre-activations of each token, with negative values set to 0 (Gao et al. 2024)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.topk import Workspace, encode_topk
from asi_lens.sae.kinds.kind import Kind, Sizes


class TopK(Kind):
    """TopK(ReLU(.)), trained with the main loss alone."""

    title = "TopK"
    picks_k = True
    over_ranks = True
    saelens = "topk"
    sparsify = True

    def __init__(self, config: Sizes):
        super().__init__(config)
        self.k = config.k

    def code(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        workspace: Workspace | None = None,
    ) -> SparseCode:
        """See `Kind.code`."""
        return encode_topk(x, encoder, bias, self.k, workspace=workspace)
