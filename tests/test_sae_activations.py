"""ReLU and JumpReLU: codes of any width."""

from __future__ import annotations

import torch

from asi_lens.sae.activations import JumpReLU, stack_codes
from asi_lens.sae.dictionary import SAEConfig
from asi_lens.sae.sparse_ops import SparseCode


def test_codes_of_any_width_are_stacked() -> None:
    codes = [
        SparseCode(torch.tensor([[3, 1]]), torch.tensor([[1.0, 2.0]])),
        SparseCode(torch.tensor([[5], [6]]), torch.tensor([[0.5], [0.0]])),
    ]
    found = stack_codes(codes)
    assert found.indices.tolist() == [[3, 1], [5, 0], [6, 0]]
    assert found.values.tolist() == [[1, 2], [0.5, 0], [0, 0]]


def test_a_jump_relu_of_nothing_fires_nowhere() -> None:
    part = JumpReLU(SAEConfig(d_in=2, d_sae=3, k=3))
    with torch.no_grad():
        part.threshold.fill_(float("inf"))
    code = part.code(torch.ones(4, 2), torch.ones(3, 2), torch.zeros(3))
    assert code.values.shape == (4, 1)
    assert not code.values.any()
