"""State of every encoder row during training: its bias, its norm, and its angle to the mean of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from asi_lens.sae.train import Trainer

STATES = ("bias", "norm", "mean_cosine")
"""Names of the states: b_enc; |w_enc|; cosine of w_enc with the mean that is subtracted from the input."""


@torch.no_grad()
def row_states(trainer: Trainer) -> dict[str, Tensor]:
    """Return each of `STATES` [d_sae], in units of normalized inputs. The cosine is NaN without a mean."""
    sae = trainer.sae
    rows, mean = sae.encoder_rows, sae.input_mean.to(sae.W_dec)
    norm = torch.linalg.vector_norm(rows, dim=1)
    cosine = rows @ mean / (norm * torch.linalg.vector_norm(mean))
    return {"bias": sae.b_enc.detach().clone(), "norm": norm, "mean_cosine": cosine}
