"""BatchTopK: the largest of a batch."""

from __future__ import annotations

import torch
from small_kinds import D_SAE, K, make
from small_trainings import quick, rows

from asi_lens.sae.train import Trainer


def test_batchtopk_keeps_the_largest_of_the_batch() -> None:
    sae, x = make("batchtopk"), rows(50).double()
    # One row far stronger than the others holds more than its share.
    x[0] = 30 * (x[0] - 1) + 1
    trainer = Trainer(sae, quick())
    centered = sae.normalize(x) - sae.b_dec.detach()
    code = trainer.sparsity.picks(centered, 0).code
    dense = torch.zeros(50, D_SAE, dtype=torch.float64).scatter_add(1, code.indices, code.values)
    z = (centered @ sae.W_enc + sae.b_enc).detach().relu()
    least = z.flatten().topk(K * 50).values.min()
    torch.testing.assert_close(dense, z * (z >= least))
    assert (dense[0] > 0).sum() > 4 * K
    trainer.step(x)
    torch.testing.assert_close(sae.activation.threshold, least)
