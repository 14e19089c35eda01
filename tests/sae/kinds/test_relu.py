"""ReLU: its penalty is steered to the target."""

from __future__ import annotations

import pytest
from small_kinds import D_SAE, K, make
from small_trainings import quick, rows

from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.threshold import set_threshold
from asi_lens.sae.train import Trainer


@pytest.mark.parametrize("l0", [1, D_SAE // 2])
def test_the_coefficient_follows_l0(l0: int) -> None:
    sae, x = make("relu"), rows(64).double()
    set_threshold(sae, x, l0)
    trainer = Trainer(sae, quick(), SparsityConfig(coefficient=0.5))
    output = trainer.step(x)
    assert (output.l0 > K) == (l0 > K)
    assert output.penalty > 0
    # By 3 % at most.
    least = 0.5 * 0.97 if l0 < K else 0.5
    assert least <= trainer.sparsity.coefficient < least * 1.031
