"""Gated: what closed gates let through."""

from __future__ import annotations

import torch
from small_kinds import buried


def test_aux_k_reaches_behind_closed_gates() -> None:
    trainer, before, output = buried("gated")
    sae = trainer.sae
    assert output.aux_loss > 0
    assert not torch.equal(sae.encoder_rows[50:], before)
    # Only Adam's step for no gradient at all would leave these where they are.
    assert torch.equal(sae.b_enc[50:], torch.full_like(sae.b_enc[50:], -50))
