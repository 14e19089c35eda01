"""Aligned training: the encoder and the decoder row of every feature keep the inner product 1.

Brzozowski and Chung (arXiv 2605.18629) reparametrize dictionaries so that w_enc . w_dec = 1 for every
feature. Here each step is followed by the smallest change of the encoder row that meets the constraint,
w_enc + (1 - w_enc . w_dec) w_dec / |w_dec|^2. The constraint is theirs; gradients are not taken through it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from asi_lens.activations.pairs import Pair
from asi_lens.base.doors import checked
from asi_lens.base.errors import require
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.drift import Drift
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.train import Trainer
from asi_lens.training.config import TrainConfig
from asi_lens.training.learner import StepOutput
from asi_lens.training.mesh import Part

_ROWS = 4096


@torch.no_grad()
def align(sae: SparseAutoencoder) -> None:
    """Change every encoder row as little as possible, in place, so that w_enc . w_dec = 1.

    Raises OptionError for a transcoder, whose rows live in different spaces.
    """
    require(not sae.is_transcoder, "sae", "a transcoder", "an autoencoder")
    for encoder, decoder in zip(sae.encoder_rows.split(_ROWS), sae.W_dec.data.split(_ROWS), strict=True):
        missing = (1 - (encoder * decoder).sum(1, keepdim=True)) / decoder.square().sum(1, keepdim=True)
        encoder.addcmul_(missing, decoder)


@checked
class AlignedTrainer(Trainer):
    """Trainer that aligns the dictionary before the first step and after every step, in plain arithmetic."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        config: TrainConfig | None = None,
        sparsity: SparsityConfig | None = None,
        drift: Drift | None = None,
        search: str = "exact",
    ):
        """Raises OptionError for a transcoder, or a search in a subspace (it keeps products of the rows)."""
        require(search == "exact", "search", search, "'exact' for aligned training")
        align(sae)
        super().__init__(sae, replace(config or TrainConfig(), kernels="plain"), sparsity, drift)

    @torch.no_grad()
    def step(self, batch: Tensor | Pair | Part) -> StepOutput:
        """Do the step of `Trainer`, then align. Raises as `Trainer.step`."""
        output = super().step(batch)
        align(self.sae)
        return output

    def describe(self) -> dict[str, Any]:
        """Return the options that a checkpoint must share for this trainer to continue it (JSON values)."""
        return {**super().describe(), "aligned": True}
