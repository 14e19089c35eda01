"""Codes of any width."""

from __future__ import annotations

import torch

from asi_lens.sae.dictionary import SAEConfig
from asi_lens.sae.kinds.jumprelu import JumpReLU


def test_a_jump_relu_of_nothing_fires_nowhere() -> None:
    part = JumpReLU(SAEConfig(d_in=2, d_sae=3, k=3))
    with torch.no_grad():
        part.threshold.fill_(float("inf"))
    code = part.code(torch.ones(4, 2), torch.ones(3, 2), torch.zeros(3))
    assert code.values.shape == (4, 1)
    assert not code.values.any()
